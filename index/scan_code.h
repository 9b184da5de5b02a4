// The scan codes of a ladder search's keys, as that search's queries see them: what estimates every
// key's score, and what stands for the values of the keys that are not read. There are two kinds:
// the sign codes and block means of every segment (sign_scan.h), and a product index's codes and
// value sketches (product_scan.h).
#ifndef KVSEEK_INDEX_SCAN_CODE_H_
#define KVSEEK_INDEX_SCAN_CODE_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "index/scratch.h"
#include "index/segment.h"
#include "kernels/attention_state.h"
#include "kernels/cpu/ladder_codes.h"
#include "kernels/cpu/sample.h"

namespace kvseek::index {

/// The queries of one search. What it points at must outlive the ScanCode.
struct ScanQueries {
  int group = 0;
  const float* scaled = nullptr;   ///< (group, key_dim), times the softmax scale
  const float* rotated = nullptr;  ///< (group, padded_dim), not scaled (kernels/cpu/rotation.h)
  const float* centre_scores = nullptr;  ///< (segments, group): scores of the centres
  int64_t first_segment = 0;             ///< of centre_scores
};

/// When a key is chosen and what weights are relative to, (group) each.
struct ScanBounds {
  absl::Span<const float> thresholds;  ///< of estimates; empty: no key is chosen
  const float* reference;              ///< ln
};

/// Consecutive blocks of one segment, numbered over the session, and which of them are weighed: the
/// rest is estimated from these, each standing for as many others.
struct SegmentPart {
  int64_t block;  ///< the first
  int blocks;
  kernels::WeighedBlocks weighed = {};

  int Weighed() const { return weighed.Count(blocks); }
  /// How many blocks each of the weighed ones stands for.
  float Factor() const { return static_cast<float>(blocks) / static_cast<float>(Weighed()); }
};

/// Results for the keys of one segment part, and what AddRest needs of them. Weights are of
/// unchosen keys and times SegmentPart::Factor().
struct ScanResults {
  uint32_t* chosen;      ///< (1024) ascending indices into the segment
  float* block_weights;  ///< (group, weighed blocks): of each; null: not wanted (RestByBlock)
  uint8_t*
      key_weights;      ///< (group, blocks * 64), of weighed blocks, in weight_units: product codes
  float* weight_units;  ///< (group): product codes only
  float* sums;          ///< (group): summed weight
};

/// Sets results.sums from its block weights.
void SumBlockWeights(const ScanResults& results, int group, int weighed);

/// What stands for the values of unread keys, added up over consecutive segments.
struct RestSums {
  static constexpr int kSegments = 16;

  float* acc;         ///< (group, value_dim)
  float* weights;     ///< (group, kSegments), of segments that wait: product codes only
  float* components;  ///< (group, kernels::kSketchDim), of their keys: product codes only
  int64_t first_segment = 0;
  int segments = 0;  ///< that wait to be added to acc
};

/// The mean values of a part's blocks, of `segment`, as what stands for values: adds the weighed
/// blocks' times their weights to acc (group, value_dim), or fetches them.
void AddBlockMeans(const Segment& segment, const SegmentPart& part, const ScanResults& results,
                   int group, int value_dim, float* acc);
void PrefetchBlockMeans(const Segment& segment, const SegmentPart& part, int value_dim);

/// Bytes of a key's sum for each head. What they are is the code's own affair.
inline constexpr size_t kSumBytes = 2;

/// Thread-safe because immutable, once its tables are built. Blocks are numbered over the session;
/// sums are (group, blocks * 64, kSumBytes), 64-byte aligned.
class ScanCode {
 public:
  virtual ~ScanCode() = default;

  /// Parts of the tables that are left to BuildTables.
  virtual int TableParts() const { return 0; }
  /// Builds a part, each once and before anything is scanned, sampled or weighed; several at once
  /// by several threads. `scratch` lends memory; it is not reset.
  virtual void BuildTables(int part, Scratch& scratch) {
    (void)part;
    (void)scratch;
  }
  /// Adds up the tables' entries for every key. `next`: Block of as many blocks again that will be
  /// scanned next, or null.
  virtual void Scan(const SegmentPart& part, const uint8_t* next, std::byte* sums) const = 0;
  /// Estimates and weighs `blocks`, ascending and anywhere; the weights of block i count factors[i]
  /// times. Of the blocks, the first kernels::kSampleAhead are the caller's to fetch. `scratch`
  /// lends memory; it is not reset.
  virtual void Sample(absl::Span<const int64_t> blocks, const float* factors,
                      const kernels::SampleResults& results, Scratch& scratch) const = 0;
  /// Whether AddRest reads ScanResults::block_weights, so that Select has to be given them.
  virtual bool RestByBlock() const = 0;
  /// Chooses keys and weighs the others; returns how many it chose.
  virtual int Select(const SegmentPart& part, const std::byte* sums, const ScanBounds& bounds,
                     const uint8_t* next, const ScanResults& results) const = 0;
  /// Adds the unchosen keys' weights times what stands for their values. Calls are for consecutive
  /// segments.
  virtual void AddRest(const SegmentPart& part, const ScanResults& results,
                       RestSums& rest) const = 0;
  /// Completes rest.acc.
  virtual void FinishRest(RestSums& rest) const = 0;
  /// One block and one head: weights over exp(reference), and each estimate's deviation; (64) each.
  virtual void Weigh(int64_t block, int head, float reference, float* weights,
                     float* deviations) const = 0;
  /// Fetches what AddRest will read.
  virtual void PrefetchRest(const SegmentPart& part) const = 0;

  virtual const uint8_t* Block(int64_t block) const = 0;
  /// What Scan, Sample and Select read of a block: its first bytes.
  virtual int ScannedBytes() const = 0;
  /// All that a search reads through it, with `sampled` of its blocks read twice and one in
  /// `weighed_step` weighed.
  virtual int64_t BytesRead(int64_t blocks, int64_t sampled, int weighed_step) const = 0;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SCAN_CODE_H_
