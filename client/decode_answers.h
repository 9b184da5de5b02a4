// Answers back from bytes. They are checked against their request: whatever a daemon sends, the
// result has the promised shapes or is data_loss.
#ifndef KVSEEK_CLIENT_DECODE_ANSWERS_H_
#define KVSEEK_CLIENT_DECODE_ANSWERS_H_

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
    uint32_t kv_heads = 0;  ///< asked for
    ModelShape shape;
    absl::Span<const uint32_t> held{};  ///< as in the request, whose memory this is
    std::vector<uint32_t> held_counts{};
  };
  std::vector<Item> items;
  std::optional<uint32_t> k{};  ///< TopK only
  bool with_positions = false;  ///< position_counts and positions follow
  bool with_rows = false;
  bool with_state = true;
};

SearchShape ShapeOf(const AttendRequest& request);
SearchShape ShapeOf(const TopKRequest& request);

absl::StatusOr<Session> DecodeOpen(const ModelShape& shape, const Answer& answer);
absl::StatusOr<uint64_t> DecodeAppend(const Answer& answer);
/// Copies no tensors: the response shares the answer's payload.
absl::StatusOr<SearchResponse> DecodeSearch(const SearchShape& shape, const Answer& answer);
absl::StatusOr<Rows> DecodeFetchRows(const ModelShape& shape, size_t count, const Answer& answer);
absl::StatusOr<Session> DecodeFork(const ModelShape& shape, const Answer& answer);
absl::Status DecodeTruncate(const Answer& answer);
absl::Status DecodeClose(const Answer& answer);
absl::StatusOr<DaemonStats> DecodeStats(const Answer& answer);
absl::StatusOr<HeadPlan> DecodePlanOf(const Session& session, const Answer& answer);
absl::Status DecodeHealth(const Answer& answer);

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODE_ANSWERS_H_
