// A daemon's core without sockets, and calls that wait for its answers.
#ifndef KVSEEK_TESTS_SERVICE_SERVICE_FIXTURE_H_
#define KVSEEK_TESTS_SERVICE_SERVICE_FIXTURE_H_

#include <chrono>
#include <cstdint>
#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "service/compute_pool.h"
#include "service/index_builder.h"
#include "service/memory_budget.h"
#include "service/request_handler.h"
#include "service/session_store.h"
#include "tests/kernels/reference.h"

namespace kvseek::service {

/// A payload put together part by part, and taken apart again.
class Tensors {
 public:
  Tensors() = default;
  explicit Tensors(const Payload& payload)
      : bytes_(payload.data.get(), payload.data.get() + payload.bytes) {}

  template <typename T>
  Tensors& Add(const std::vector<T>& part) {
    const size_t bytes = part.size() * sizeof(T);
    const size_t offset = layout_.Add(bytes);
    bytes_.resize(layout_.bytes());
    if (bytes > 0) std::memcpy(bytes_.data() + offset, part.data(), bytes);
    return *this;
  }
  /// The next part; empty when the payload is too short for it.
  template <typename T>
  std::vector<T> Take(size_t count) {
    const size_t offset = layout_.Add(count * sizeof(T));
    if (layout_.bytes() > bytes_.size()) return {};
    std::vector<T> part(count);
    if (count > 0) std::memcpy(part.data(), bytes_.data() + offset, count * sizeof(T));
    return part;
  }
  /// Whether everything has been taken.
  bool AllTaken() const { return layout_.bytes() == bytes_.size(); }

  Payload Copy() const {
    Payload payload = MakePayload(bytes_.size());
    if (!bytes_.empty()) std::memcpy(payload.data.get(), bytes_.data(), bytes_.size());
    return payload;
  }
  std::vector<uint8_t>& bytes() { return bytes_; }
  std::string Text() const { return {bytes_.begin(), bytes_.end()}; }

 private:
  proto::PayloadLayout layout_;
  std::vector<uint8_t> bytes_;
};

/// The outcome of a call.
template <typename Message>
struct Answer {
  absl::Status status;
  Message message;
  Tensors tensors;

  bool ok() const { return status.ok(); }
};

/// "code field", e.g. "INVALID_ARGUMENT items[0].layer": what the tests of errors compare.
inline std::string Describe(const absl::Status& status) {
  const std::string field = proto::ErrorField(status);
  return absl::StatusCodeToString(status.code()) + (field.empty() ? "" : " " + field);
}

class Service {
 public:
  Service() : Service(SmallOptions(2)) {}
  explicit Service(DaemonOptions options, const Topology& topology = OneNode())
      : options_(std::move(options)),
        budget_(options_.memory_limit_bytes, options_.retry_after),
        store_(options_, budget_, static_cast<int>(topology.size())),
        pool_(options_, topology),
        builder_(options_, budget_),
        handler_(options_, store_, pool_, builder_, {[] { return uint64_t{7}; }}) {}

  static DaemonOptions SmallOptions(int workers) {
    DaemonOptions options;
    options.workers = workers;
    options.memory_limit_bytes = uint64_t{1} << 30;
    return options;
  }

  MemoryBudget& budget() { return budget_; }
  SessionStore& store() { return store_; }
  ComputePool& pool() { return pool_; }
  IndexBuilder& builder() { return builder_; }
  RequestHandler& handler() { return handler_; }

  /// Starts a call; the future holds its answer.
  std::future<Response> Start(proto::Op op, std::string metadata, Payload payload = {},
                              std::chrono::milliseconds deadline = std::chrono::seconds(60),
                              std::shared_ptr<std::atomic<bool>> cancelled = nullptr) {
    Request request;
    request.op = op;
    request.metadata = std::move(metadata);
    request.payload = std::move(payload);
    request.deadline = std::chrono::steady_clock::now() + deadline;
    request.cancelled = std::move(cancelled);
    const auto promise = std::make_shared<std::promise<Response>>();
    std::future<Response> future = promise->get_future();
    handler_.Handle(std::move(request),
                    [promise](Response response) { promise->set_value(std::move(response)); });
    return future;
  }

  template <typename Message>
  static Answer<Message> Wait(std::future<Response> future) {
    Response response = future.get();
    Answer<Message> answer;
    if (response.error) {
      proto::Error error;
      error.ParseFromString(response.metadata);
      answer.status = proto::FromError(error);
    } else if (!answer.message.ParseFromString(response.metadata)) {
      answer.status = absl::DataLossError("the answer's message does not parse");
    }
    answer.tensors = Tensors(response.payload);
    return answer;
  }

  Answer<proto::OpenSessionResponse> Call(const proto::OpenSessionRequest& m) {
    return Run<proto::OpenSessionResponse>(proto::Op::kOpenSession, m, {});
  }
  Answer<proto::AppendResponse> Call(const proto::AppendRequest& m, const Tensors& t) {
    return Run<proto::AppendResponse>(proto::Op::kAppend, m, t);
  }
  Answer<proto::AttendResponse> Call(const proto::AttendRequest& m, const Tensors& t) {
    return Run<proto::AttendResponse>(proto::Op::kAttend, m, t);
  }
  Answer<proto::TopKResponse> Call(const proto::TopKRequest& m, const Tensors& t) {
    return Run<proto::TopKResponse>(proto::Op::kTopK, m, t);
  }
  Answer<proto::FetchRowsResponse> Call(const proto::FetchRowsRequest& m, const Tensors& t) {
    return Run<proto::FetchRowsResponse>(proto::Op::kFetchRows, m, t);
  }
  Answer<proto::ForkResponse> Call(const proto::ForkRequest& m) {
    return Run<proto::ForkResponse>(proto::Op::kFork, m, {});
  }
  Answer<proto::TruncateResponse> Call(const proto::TruncateRequest& m) {
    return Run<proto::TruncateResponse>(proto::Op::kTruncate, m, {});
  }
  Answer<proto::CloseSessionResponse> Call(const proto::CloseSessionRequest& m) {
    return Run<proto::CloseSessionResponse>(proto::Op::kCloseSession, m, {});
  }
  Answer<proto::StatsResponse> Call(const proto::StatsRequest& m) {
    return Run<proto::StatsResponse>(proto::Op::kStats, m, {});
  }
  Answer<proto::HealthResponse> Call(const proto::HealthRequest& m) {
    return Run<proto::HealthResponse>(proto::Op::kHealth, m, {});
  }

 private:
  template <typename Response, typename Request>
  Answer<Response> Run(proto::Op op, const Request& message, const Tensors& tensors) {
    return Wait<Response>(Start(op, message.SerializeAsString(), tensors.Copy()));
  }

  const DaemonOptions options_;
  MemoryBudget budget_;
  SessionStore store_;
  ComputePool pool_;
  IndexBuilder builder_;
  RequestHandler handler_;
};

/// Shape of the sessions of most tests: small, with odd numbers of everything.
inline proto::ModelShape SmallShape() {
  proto::ModelShape shape;
  shape.set_layers(2);
  shape.set_kv_heads(2);
  shape.set_query_heads(6);
  shape.set_key_dim(16);
  shape.set_value_dim(24);
  shape.set_dtype(proto::DTYPE_BF16);
  return shape;
}

/// One layer's rows as a client has them.
struct Rows {
  std::vector<uint16_t> keys;    ///< (tokens, kv_heads, key_dim)
  std::vector<uint16_t> values;  ///< (tokens, kv_heads, value_dim)
};

inline Rows RandomRows(uint32_t seed, const proto::ModelShape& shape, size_t tokens) {
  const auto dtype = static_cast<kernels::DType>(shape.dtype());
  const size_t rows = tokens * shape.kv_heads();
  return {reference::RandomElements(seed, rows * shape.key_dim(), 1.5F, dtype),
          reference::RandomElements(seed + 1, rows * shape.value_dim(), 1.0F, dtype)};
}

/// The rows of one KV head, contiguous: (tokens, dim).
inline std::vector<uint16_t> HeadRows(const std::vector<uint16_t>& rows, size_t kv_heads,
                                      size_t dim, size_t head) {
  std::vector<uint16_t> own;
  own.reserve(rows.size() / kv_heads);
  for (size_t begin = head * dim; begin < rows.size(); begin += kv_heads * dim) {
    own.insert(own.end(), rows.begin() + static_cast<ptrdiff_t>(begin),
               rows.begin() + static_cast<ptrdiff_t>(begin + dim));
  }
  return own;
}

inline proto::SessionRef OpenSession(Service& service, const proto::ModelShape& shape) {
  proto::OpenSessionRequest request;
  *request.mutable_shape() = shape;
  return service.Call(request).message.session();
}

inline Answer<proto::AppendResponse> AppendRows(Service& service, const proto::SessionRef& session,
                                                uint32_t layer, uint64_t start, size_t tokens,
                                                const Rows& rows) {
  proto::AppendRequest request;
  *request.mutable_session() = session;
  request.set_layer(layer);
  request.set_start(start);
  request.set_tokens(static_cast<uint32_t>(tokens));
  return service.Call(request, Tensors().Add(rows.keys).Add(rows.values));
}

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_SERVICE_FIXTURE_H_
