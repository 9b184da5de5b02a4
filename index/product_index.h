// The ladder with trained scan codes: product codes and value sketches in place of the sign codes
// and the block means (docs/indexes.md, "product").
//
// Codes belong to stretches of 64 segments, each with its own codebook, since keys drift. Bytes a
// key: 9 with 11 sub-spaces (18 with 22), and 4 with a sketch. The 4-bit records and the rows are
// those of the segments.
#ifndef KVSEEK_INDEX_PRODUCT_INDEX_H_
#define KVSEEK_INDEX_PRODUCT_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "index/built_index.h"
#include "index/product_codebook.h"
#include "index/scratch.h"
#include "index/slab_memory.h"

namespace kvseek::index {

inline constexpr int kStretchSegments = 64;
inline constexpr int kProductQueriesMin = 64;  ///< tokens whose queries are needed to train

/// Bytes of a segment's codes, and of its sketches: 0 without.
size_t CodeBytes(const kernels::ProductLayout& layout);
size_t SketchBytes(const kernels::ProductLayout& layout);

/// What a stretch of segments has in place of sign codes. Immutable.
struct ProductStretch {
  std::shared_ptr<const ProductCodebook> codebook;
  int segments = 0;                    ///< 1..kStretchSegments
  uint8_t* codes = nullptr;            ///< (segments * 16) blocks
  uint8_t* sketches = nullptr;         ///< the same; with a sketch only, as value_means
  AlignedArray<uint16_t> value_means;  ///< (segments, value_dim) bf16
  Slot memory;                         ///< of codes and sketches, with room for a few more

  /// With memory for so many segments, not yet filled, on NUMA node `node`.
  ProductStretch(std::shared_ptr<const ProductCodebook> codebook, int segments, int value_dim,
                 int node = 0);

  size_t Bytes(int value_dim) const;
  /// Of one block.
  const uint8_t* Block(int64_t block) const {
    return codes + block * codebook->layout.BlockBytes();
  }
  const uint8_t* Sketches(int64_t block) const {
    return sketches + block * kernels::kSketchBlockBytes;
  }
};

class ProductIndex final : public BuiltIndex {
 public:
  /// Trained on the second moment of input.queries. Null if nothing is sealed, if there are queries
  /// of less than kProductQueriesMin tokens, or when it is given up.
  /// A stretch keeps its codebook until it has twice the segments that this was trained on; one
  /// with few segments borrows the codebook before it.
  static std::shared_ptr<const ProductIndex> Build(const BuildInput& input,
                                                   const kernels::ProductLayout& layout);

  /// `stretches`: at least one; all but the last are full. `value_dim` is that of the values.
  ProductIndex(std::vector<std::shared_ptr<const ProductStretch>> stretches, int value_dim,
               double build_core_seconds);

  absl::string_view name() const override { return "product"; }
  int64_t covered() const override;
  size_t Bytes() const override;
  double build_core_seconds() const override { return build_core_seconds_; }
  PlanPtr Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
               Scratch& scratch) const override;

  const kernels::ProductLayout& layout() const { return stretches_.front()->codebook->layout; }
  int value_dim() const { return value_dim_; }
  const std::vector<std::shared_ptr<const ProductStretch>>& stretches() const { return stretches_; }

 private:
  std::vector<std::shared_ptr<const ProductStretch>> stretches_;
  int value_dim_;
  double build_core_seconds_;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_PRODUCT_INDEX_H_
