// Requests to bytes and answers back. Requests are checked before anything is sent:
// invalid_argument names the field. Answers are checked against their request: whatever a daemon
// sends, the result has the promised shapes or is data_loss.
#ifndef KVSEEK_CLIENT_MESSAGES_H_
#define KVSEEK_CLIENT_MESSAGES_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/channel.h"
#include "client/kv_client.h"

namespace kvseek::client {

/// What decoding a search's answer needs to know of its request.
struct SearchShape {
  struct Item {
    uint32_t tokens = 0;
    ModelShape shape;
  };
  std::vector<Item> items;
  std::optional<uint32_t> k{};  ///< TopK only
  bool with_positions = false;  ///< position_counts and positions follow
  bool with_rows = false;
  bool with_state = true;
};

absl::StatusOr<Message> EncodeOpen(const ModelShape& shape, const OpenOptions& options);
absl::StatusOr<Session> DecodeOpen(const ModelShape& shape, const Answer& answer);

absl::StatusOr<Message> EncodeAppend(const Session& session, uint32_t layer, uint64_t start,
                                     uint32_t tokens, absl::Span<const uint16_t> keys,
                                     absl::Span<const uint16_t> values);
absl::StatusOr<uint64_t> DecodeAppend(const Answer& answer);

absl::StatusOr<Message> EncodeAttend(const AttendRequest& request);
absl::StatusOr<Message> EncodeTopK(const TopKRequest& request);
SearchShape ShapeOf(const AttendRequest& request);
SearchShape ShapeOf(const TopKRequest& request);
absl::StatusOr<SearchResponse> DecodeSearch(const SearchShape& shape, const Answer& answer);

absl::StatusOr<Message> EncodeFetchRows(const Session& session, uint32_t layer, uint32_t kv_head,
                                        absl::Span<const int64_t> positions);
absl::StatusOr<Rows> DecodeFetchRows(const ModelShape& shape, size_t count, const Answer& answer);

absl::StatusOr<Message> EncodeFork(const Session& session, std::optional<uint64_t> tokens,
                                   const OpenOptions& options);
absl::StatusOr<Session> DecodeFork(const ModelShape& shape, const Answer& answer);

Message EncodeTruncate(const Session& session, uint64_t tokens);
Message EncodeClose(const Session& session);
Message EncodeStats(bool with_sessions);
Message EncodeHealth();
absl::Status DecodeTruncate(const Answer& answer);
absl::Status DecodeClose(const Answer& answer);
absl::StatusOr<DaemonStats> DecodeStats(const Answer& answer);
absl::Status DecodeHealth(const Answer& answer);

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_MESSAGES_H_
