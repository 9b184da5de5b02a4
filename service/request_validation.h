// From messages of a client, which may hold anything, to requests that may be run. Attend and TopK
// are checked in search_validation.h.
//
// Every function checks all that it hands on and names what is wrong in full, e.g.
// "query_positions[1]". Nothing here changes a session, apart from renewing the leases of the
// sessions found.
#ifndef KVSEEK_SERVICE_REQUEST_VALIDATION_H_
#define KVSEEK_SERVICE_REQUEST_VALIDATION_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "service/options.h"
#include "service/session.h"
#include "service/session_store.h"

namespace kvseek::service {

inline constexpr size_t kSessionNameBytesMax = 256;  ///< of a model's, too

/// A checked Append. The rows point into the request's payload, the positions of sampled queries
/// and of landmarks into its message.
struct CheckedAppend {
  std::shared_ptr<Session> session;
  uint32_t layer = 0;       ///< the first
  uint32_t layers = 1;      ///< one or more
  LayerRows rows;           ///< of the first
  size_t layer_stride = 0;  ///< bytes from a layer's rows to the next one's

  /// Of `layer` + i.
  LayerRows Rows(uint32_t i) const;
};

/// A checked FetchRows.
struct CheckedFetch {
  std::shared_ptr<Session> session;
  std::shared_ptr<const LayerState> layer;
  uint32_t kv_head = 0;
  absl::Span<const int64_t> positions;  ///< in the request's payload
};

/// Checks requests of one daemon, other than searches, against its limits. Thread-safe.
class RequestValidator {
 public:
  /// Both must outlive the validator.
  RequestValidator(const DaemonOptions& options, SessionStore& store)
      : options_(options), store_(store) {}

  absl::StatusOr<SessionSettings> Check(const proto::OpenSessionRequest& message) const;
  absl::StatusOr<CheckedAppend> Check(const proto::AppendRequest& message,
                                      absl::Span<const uint8_t> payload, TimePoint now) const;
  absl::StatusOr<CheckedFetch> Check(const proto::FetchRowsRequest& message,
                                     absl::Span<const uint8_t> payload, TimePoint now) const;

  /// Layers, heads and dimensions; element type and scale do not count.
  absl::Status CheckShape(const proto::ModelShape& shape) const;
  /// The session that is to be closed, taken out of the store.
  absl::StatusOr<std::shared_ptr<Session>> TakeSession(const proto::CloseSessionRequest& message,
                                                       TimePoint now) const;
  /// Ops that carry no tensors.
  static absl::Status CheckNoPayload(size_t payload_bytes);
  static absl::Status CheckName(const std::string& name);
  /// A lease off the wire; one that no clock can count is as long as it gets.
  static std::chrono::milliseconds Lease(uint64_t lease_ms);

 private:
  /// The plan of a session to be opened; null: none.
  absl::StatusOr<std::shared_ptr<const proto::HeadPlan>> CheckPlan(
      const proto::OpenSessionRequest& message) const;
  absl::Status CheckErrorTarget(float target) const;

  const DaemonOptions& options_;
  SessionStore& store_;
};

/// Fills a message from a request's metadata; invalid_argument naming "metadata".
absl::Status ParseMetadata(const std::string& metadata, google::protobuf::MessageLite& message);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_REQUEST_VALIDATION_H_
