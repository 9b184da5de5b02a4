#include "tests/proto/messages.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include "proto/kvseek.pb.h"

namespace kvseek::proto {
namespace {

template <typename Request, typename Response>
std::unique_ptr<google::protobuf::Message> Either(bool is_response) {
  if (is_response) return std::make_unique<Response>();
  return std::make_unique<Request>();
}

}  // namespace

std::unique_ptr<google::protobuf::Message> NewMessage(Op op, uint16_t flags) {
  const bool response = (flags & kFlagResponse) != 0;
  if (response && (flags & kFlagError) != 0) return std::make_unique<Error>();
  switch (op) {
    case Op::kHello:
      return Either<HelloRequest, HelloResponse>(response);
    case Op::kOpenSession:
      return Either<OpenSessionRequest, OpenSessionResponse>(response);
    case Op::kAppend:
      return Either<AppendRequest, AppendResponse>(response);
    case Op::kAttend:
      return Either<AttendRequest, AttendResponse>(response);
    case Op::kTopK:
      return Either<TopKRequest, TopKResponse>(response);
    case Op::kFetchRows:
      return Either<FetchRowsRequest, FetchRowsResponse>(response);
    case Op::kFork:
      return Either<ForkRequest, ForkResponse>(response);
    case Op::kTruncate:
      return Either<TruncateRequest, TruncateResponse>(response);
    case Op::kCloseSession:
      return Either<CloseSessionRequest, CloseSessionResponse>(response);
    case Op::kStats:
      return Either<StatsRequest, StatsResponse>(response);
    case Op::kHealth:
      return Either<HealthRequest, HealthResponse>(response);
    case Op::kCancel:
      return Either<CancelRequest, CancelResponse>(response);
    case Op::kOpenDoorbell:
      return Either<OpenDoorbellRequest, OpenDoorbellResponse>(response);
  }
  return nullptr;
}

std::string Serialize(const google::protobuf::Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    message.SerializeToCodedStream(&coded);
  }
  return bytes;
}

absl::Span<const uint8_t> BytesOf(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

}  // namespace kvseek::proto
