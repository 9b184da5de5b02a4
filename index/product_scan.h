// Scan codes of a product index (product_index.h, kernels/cpu/product_scan.h).
#ifndef KVSEEK_INDEX_PRODUCT_SCAN_H_
#define KVSEEK_INDEX_PRODUCT_SCAN_H_

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <vector>

#include "index/key_index.h"
#include "index/product_index.h"
#include "index/scan_code.h"
#include "index/scratch.h"
#include "kernels/cpu/product_scan.h"

namespace kvseek::index {

class ProductScan final : public ScanCode {
 public:
  /// For blocks of the segments [queries.first_segment, last_segment], which the index covers.
  /// `index` and `view` must outlive it. Its tables stand in `memory`; each codebook's are a part
  /// of them.
  ProductScan(const ProductIndex& index, const KvView& view, const ScanQueries& queries,
              int64_t last_segment, Scratch& memory);

  int TableParts() const override { return static_cast<int>(tables_.size()); }
  void BuildTables(int part, Scratch& scratch) override;
  void Scan(const SegmentPart& part, const uint8_t* next, std::byte* sums) const override;
  void Sample(absl::Span<const int64_t> blocks, const float* factors,
              const kernels::SampleResults& results, Scratch& scratch) const override;
  bool RestByBlock() const override { return !layout_.sketch; }
  int Select(const SegmentPart& part, const std::byte* sums, const ScanBounds& bounds,
             const uint8_t* next, const ScanResults& results) const override;
  void AddRest(const SegmentPart& part, const ScanResults& results, RestSums& rest) const override;
  void FinishRest(RestSums& rest) const override;
  void Weigh(int64_t block, int head, float reference, float* weights,
             float* deviations) const override;
  void PrefetchRest(const SegmentPart& part) const override;
  const uint8_t* Block(int64_t block) const override;
  int ScannedBytes() const override { return layout_.BlockBytes(); }
  int64_t BytesRead(int64_t blocks, int64_t sampled, int weighed_step) const override;

 private:
  /// The queries' tables for one codebook.
  struct Tables {
    const ProductCodebook* book;
    uint8_t* entries;               ///< (group, symbols, 64)
    kernels::ProductTables* heads;  ///< (group)
  };

  const ProductStretch& StretchOf(int64_t block) const;
  const Tables& TablesOf(int64_t block) const;
  /// (group), of the block's segment.
  const float* CentreScores(int64_t block) const;
  void FillHeads(int64_t block, const ScanBounds& bounds, kernels::ProductHead* heads) const;

  const ProductIndex& index_;
  const KvView& view_;
  ScanQueries queries_;
  kernels::ProductLayout layout_;
  int64_t first_stretch_;
  std::pmr::vector<Tables> tables_;     ///< of each codebook
  std::pmr::vector<size_t> tables_of_;  ///< (stretches): which
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_PRODUCT_SCAN_H_
