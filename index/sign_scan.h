// Scan codes of 1 or 2 bits a dimension, which every segment has from its seal
// (kernels/cpu/ladder_scan.h).
#ifndef KVSEEK_INDEX_SIGN_SCAN_H_
#define KVSEEK_INDEX_SIGN_SCAN_H_

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <vector>

#include "index/key_index.h"
#include "index/scan_code.h"
#include "index/scratch.h"
#include "kernels/cpu/ladder_scan.h"
#include "kernels/cpu/ladder_select.h"

namespace kvseek::index {

class SignScan final : public ScanCode {
 public:
  /// `view` must outlive it.
  /// Its tables stand in `memory`.
  SignScan(const KvView& view, const ScanQueries& queries, Scratch& memory);

  void Scan(const SegmentPart& part, const uint8_t* next, std::byte* sums) const override;
  void Sample(absl::Span<const int64_t> blocks, const float* factors,
              const kernels::SampleResults& results, Scratch& scratch) const override;
  bool RestByBlock() const override { return true; }
  int Select(const SegmentPart& part, const std::byte* sums, const ScanBounds& bounds,
             const uint8_t* next, const ScanResults& results) const override;
  void AddRest(const SegmentPart& part, const ScanResults& results, RestSums& rest) const override;
  void FinishRest(RestSums& /*rest*/) const override {}
  void Weigh(int64_t block, int head, float reference, float* weights,
             float* deviations) const override;
  void PrefetchRest(const SegmentPart& part) const override;
  const uint8_t* Block(int64_t block) const override;
  int ScannedBytes() const override;
  int64_t BytesRead(int64_t blocks, int64_t sampled, int weighed_step) const override;

 private:
  /// What turns the sums of a segment into scores.
  void FillHeads(int64_t segment, const ScanBounds& bounds, kernels::ScanHead* heads) const;
  /// Of one unit of a sum times its key's gain, and (group) of a segment's centre.
  float Slope(size_t head) const;
  const float* CentreScores(int64_t segment) const;
  const Segment& SegmentOf(int64_t block) const;

  const KvView& view_;
  ScanQueries queries_;
  int symbols_;
  int8_t* tables_;                       ///< (group, symbols, 64)
  std::pmr::vector<float> table_units_;  ///< (group)
  std::pmr::vector<float> query_norms_;  ///< (group)
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SIGN_SCAN_H_
