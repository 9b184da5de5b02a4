// Landmark keys that the client supplies for blocks of a layer's tokens, until an index is built
// with them (index/landmark_index.h, LandmarkSummary::kGiven).
//
// They come with the append that brings a block's last token, one key row for each KV head. A block
// has one landmark or none; the first that comes stays, as tokens do. Like the rest of a layer's
// state this is immutable: a layer's next state has the next LandmarkKeys, which shares all pages
// but those that changed, so a fork copies a pointer and a build reads without a lock.
#ifndef KVSEEK_SERVICE_LANDMARK_KEYS_H_
#define KVSEEK_SERVICE_LANDMARK_KEYS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/dtype.h"
#include "service/memory_budget.h"

namespace kvseek::service {

/// Landmarks of some blocks: (positions.size(), kv_heads, key_dim), in the session's dtype.
struct GivenLandmarks {
  absl::Span<const uint64_t> positions;  ///< of the blocks' first tokens, ascending
  const uint16_t* rows = nullptr;
  int block = 0;  ///< tokens of a block; the session's
};

/// Immutable, so thread-safe.
class LandmarkKeys {
 public:
  /// Blocks that share a page, which is what a change copies.
  static constexpr int kPageBlocks = 16;

  /// None. `block`: tokens; `block_elements`: of one block's landmarks, all KV heads.
  LandmarkKeys(int block, size_t block_elements) : block_(block), block_elements_(block_elements) {}

  /// `keys` (null: none) and those of `more` whose blocks had none; `keys` itself if all had.
  /// resource_exhausted naming "landmark_positions".
  static absl::StatusOr<std::shared_ptr<const LandmarkKeys>> With(
      const std::shared_ptr<const LandmarkKeys>& keys, const GivenLandmarks& more,
      size_t block_elements, MemoryBudget& budget);
  /// Those of blocks that end at `tokens` or before; `keys` itself (it may be null) if all do.
  /// resource_exhausted naming "tokens".
  static absl::StatusOr<std::shared_ptr<const LandmarkKeys>> Below(
      const std::shared_ptr<const LandmarkKeys>& keys, int64_t tokens, MemoryBudget& budget);

  /// How many blocks that end at `tokens` or before have a landmark.
  int64_t Count(int64_t tokens) const;
  /// First positions of the blocks that have one, ascending.
  std::vector<int64_t> Positions() const;
  /// The landmarks of one KV head as fp32: (Positions().size(), key_dim).
  std::vector<float> OfHead(size_t kv_head, size_t key_dim, kernels::DType dtype) const;

  /// Bytes that it takes, shared or not.
  uint64_t Bytes() const;
  /// The same for a sequence of so many tokens whose blocks all have one.
  static uint64_t Bytes(int64_t tokens, int block, size_t block_elements);

 private:
  struct Page {
    Page(size_t elements, MemoryBudget::Reservation reserved)
        : rows(elements), memory(std::move(reserved)) {}

    uint32_t known = 0;          ///< a bit for each block
    std::vector<uint16_t> rows;  ///< (kPageBlocks, kv_heads, key_dim)
    MemoryBudget::Reservation memory;
  };
  using Pages = std::vector<std::shared_ptr<const Page>>;

  static uint64_t PageBytes(size_t block_elements);
  static uint64_t ListBytes(size_t pages);
  /// A page like `page` (null: an empty one) that may be changed.
  absl::StatusOr<std::shared_ptr<Page>> CopyPage(const Page* page, MemoryBudget& budget,
                                                 absl::string_view field) const;
  /// One that holds these pages.
  absl::StatusOr<std::shared_ptr<const LandmarkKeys>> Make(Pages pages, MemoryBudget& budget,
                                                           absl::string_view field) const;
  bool Knows(int64_t block) const;
  /// Calls visit(block, its rows) for each block that has a landmark, ascending.
  template <typename Visitor>
  void Visit(const Visitor& visit) const;

  int block_;
  size_t block_elements_;
  Pages pages_;  ///< page i: blocks [i * kPageBlocks, (i + 1) * kPageBlocks); null: none of them
  MemoryBudget::Reservation memory_;  ///< of the list
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_LANDMARK_KEYS_H_
