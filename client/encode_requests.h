// Requests to bytes. They are checked before anything is sent: invalid_argument names the field.
// A request of one tensor points at the caller's memory, an append's tensors are sent from there;
// others are to be brought together. The tensors' elements are not read in here.
#ifndef KVSEEK_CLIENT_ENCODE_REQUESTS_H_
#define KVSEEK_CLIENT_ENCODE_REQUESTS_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/channel.h"
#include "client/doorbell.h"
#include "client/kv_client.h"

namespace kvseek::client {

absl::StatusOr<Message> EncodeOpen(const ModelShape& shape, const OpenOptions& options);
absl::StatusOr<Message> EncodeAppend(const Session& session, uint32_t layer, uint64_t start,
                                     uint32_t tokens, absl::Span<const LayerTensors> layers,
                                     const SampledQueries& queries = {},
                                     const LandmarkKeys& landmarks = {});
absl::StatusOr<Message> EncodeAttend(const AttendRequest& request);
absl::StatusOr<Message> EncodeTopK(const TopKRequest& request);
absl::StatusOr<Message> EncodeFetchRows(const Session& session, uint32_t layer, uint32_t kv_head,
                                        absl::Span<const int64_t> positions);
absl::StatusOr<Message> EncodeFork(const Session& session, std::optional<uint64_t> tokens,
                                   const OpenOptions& options);
Message EncodeTruncate(const Session& session, uint64_t tokens);
Message EncodeClose(const Session& session);
Message EncodeStats(bool with_sessions);
Message EncodePlanOf(const Session& session);
Message EncodeHealth();
absl::StatusOr<Message> EncodeOpenDoorbell(const DoorbellOptions& options);

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_ENCODE_REQUESTS_H_
