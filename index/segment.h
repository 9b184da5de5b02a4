// A segment: 1024 consecutive tokens of a head cache, immutable, with its codes.
#ifndef KVSEEK_INDEX_SEGMENT_H_
#define KVSEEK_INDEX_SEGMENT_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "index/scratch.h"
#include "index/slab_memory.h"
#include "kernels/cpu/ladder_codes.h"
#include "kernels/dtype.h"

namespace kvseek::index {

inline constexpr int kSegmentTokens = 1024;
inline constexpr int kTailChunkTokens = 64;
/// A segment's tokens are read as tail, exactly, until so many others follow them: its codes are
/// made in that time, beside the decoder's steps, and which keys have codes is a function of the
/// number of tokens alone.
inline constexpr int kSealDelay = 64;

/// How many of a head cache's first tokens stand in segments.
constexpr int64_t SealedTokens(int64_t tokens) {
  return tokens < kSealDelay ? 0 : (tokens - kSealDelay) / kSegmentTokens * kSegmentTokens;
}

/// What the keys and values of one head cache look like, and where they lie.
struct KvShape {
  int key_dim = 0;    ///< elements of a key row: a multiple of 8, 8..512
  int value_dim = 0;  ///< elements of a value row: a multiple of 8, 8..512
  kernels::DType dtype = kernels::DType::kBf16;  ///< of stored keys and values: bf16 or fp16
  float softmax_scale = 0.0F;                    ///< scores are softmax_scale * <q, k>
  int scan_bits = 2;  ///< bits a dimension of the ladder's scan code: 1 or 2
  int node = 0;       ///< NUMA node of their slabs (index/slab_memory.h); no answer depends on it

  size_t KeyRowBytes() const { return static_cast<size_t>(key_dim) * 2; }
  size_t ValueRowBytes() const { return static_cast<size_t>(value_dim) * 2; }
};

/// Thread-safe because immutable. Rows are contiguous: keys (1024, key_dim), values (1024,
/// value_dim).
class Segment {
 public:
  /// A segment's memory, for rows to be put into their places: no copy is made of them any more.
  class Draft {
   public:
    explicit Draft(const KvShape& shape);
    ~Draft();
    Draft(const Draft&) = delete;
    Draft& operator=(const Draft&) = delete;

    uint16_t* keys() { return segment_->keys_; }      ///< (1024, key_dim), uninitialised
    uint16_t* values() { return segment_->values_; }  ///< (1024, value_dim), uninitialised
    /// Encodes the rows, all of which are there; once. Takes from `scratch`.
    std::shared_ptr<const Segment> Encode(Scratch& scratch);

   private:
    const KvShape shape_;
    std::shared_ptr<Segment> segment_;
  };

  /// Copies 1024 rows of each and encodes them. `keys` and `values` are free to go afterwards.
  static std::shared_ptr<const Segment> Build(const KvShape& shape, const uint16_t* keys,
                                              const uint16_t* values);
  /// Bytes that a segment of this shape takes, all included.
  static size_t Bytes(const KvShape& shape);

  const uint16_t* keys() const { return keys_; }
  const uint16_t* values() const { return values_; }

  /// Codes of the ladder; layouts in kernels/cpu/ladder_codes.h.
  const float* centre() const { return centre_; }              ///< (key_dim), mean key
  const uint8_t* scan_blocks() const { return scan_blocks_; }  ///< 16 blocks
  float scan_noise() const { return scan_noise_; }
  const uint8_t* fine_records() const { return fine_records_; }               ///< 1024 records
  const kernels::FineFactors* fine_factors() const { return fine_factors_; }  ///< (1024)
  const uint16_t* block_means() const { return block_means_; }  ///< (16, value_dim) bf16

 private:
  struct Layout;
  Segment(const Layout& layout, int node);

  Slot memory_;  ///< all of the arrays
  uint16_t* keys_;
  uint16_t* values_;
  float* centre_;
  uint8_t* scan_blocks_;
  uint8_t* fine_records_;
  kernels::FineFactors* fine_factors_;
  uint16_t* block_means_;
  float scan_noise_ = 0.0F;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SEGMENT_H_
