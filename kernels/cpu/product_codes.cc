#include "kernels/cpu/product_codes.h"

#include <algorithm>
#include <cstddef>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/product_codes.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr int kVectors = kCentroids / kLanes;
// Points that share the centroids' loads.
constexpr int kPoints = kVectors <= 4 ? 4 : 1;

/// Squared distances of kCount points from all centroids, less the points' own squares.
template <int kCount>
HWY_INLINE void Distances(const float* points, int stride, const float* centroids,
                          const float* squares, int dim, float* out) {
  const DF d;
  for (int v = 0; v < kVectors; v += 4) {
    hn::Vec<DF> sums[kCount][4];
    for (int p = 0; p < kCount; ++p) {
      for (int j = 0; j < 4; ++j) sums[p][j] = hn::Load(d, squares + (v + j) * kLanes);
    }
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j < 4; ++j) {
        const auto centroid = hn::LoadU(d, centroids + i * kCentroids + (v + j) * kLanes);
        for (int p = 0; p < kCount; ++p) {
          const auto x = hn::Set(d, -2.0F * points[static_cast<ptrdiff_t>(p) * stride + i]);
          sums[p][j] = hn::MulAdd(x, centroid, sums[p][j]);
        }
      }
    }
    for (int p = 0; p < kCount; ++p) {
      for (int j = 0; j < 4; ++j) {
        hn::Store(sums[p][j], d, out + p * kCentroids + (v + j) * kLanes);
      }
    }
  }
}

/// The place of the least of 64 values, the first of several.
HWY_INLINE int FirstLeast(const float* values) {
  const DF d;
  auto least = hn::Load(d, values);
  for (int v = 1; v < kVectors; ++v) least = hn::Min(least, hn::Load(d, values + v * kLanes));
  const auto smallest = hn::MinOfLanes(d, least);
  for (int v = 0; v < kVectors; ++v) {
    const auto first = hn::FindFirstTrue(d, hn::Eq(hn::Load(d, values + v * kLanes), smallest));
    if (first >= 0) return v * kLanes + static_cast<int>(first);
  }
  return 0;
}

void NearestCentroidsImpl(const float* points, int stride, int count, const float* centroids,
                          int dim, uint8_t* symbols, int symbol_stride, float* squares) {
  HWY_ALIGN float centroid_squares[kCentroids] = {};
  for (int i = 0; i < dim; ++i) {
    for (int c = 0; c < kCentroids; ++c) {
      centroid_squares[c] += centroids[i * kCentroids + c] * centroids[i * kCentroids + c];
    }
  }
  HWY_ALIGN float distances[kPoints * kCentroids];
  for (int at = 0; at < count; at += kPoints) {
    const int some = std::min(kPoints, count - at);
    const float* const first = points + static_cast<ptrdiff_t>(at) * stride;
    if (some == kPoints) {
      Distances<kPoints>(first, stride, centroids, centroid_squares, dim, distances);
    } else {
      for (int p = 0; p < some; ++p) {
        Distances<1>(first + static_cast<ptrdiff_t>(p) * stride, stride, centroids,
                     centroid_squares, dim, distances + p * kCentroids);
      }
    }
    for (int p = 0; p < some; ++p) {
      const int best = FirstLeast(distances + p * kCentroids);
      symbols[static_cast<ptrdiff_t>(at + p) * symbol_stride] = static_cast<uint8_t>(best);
      float square = 0.0F;
      for (int i = 0; i < dim; ++i) {
        const float gap =
            first[static_cast<ptrdiff_t>(p) * stride + i] - centroids[i * kCentroids + best];
        square += gap * gap;
      }
      squares[at + p] += square;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(NearestCentroidsImpl);

void NearestCentroids(const float* points, int stride, int count, const float* centroids, int dim,
                      uint8_t* symbols, int symbol_stride, float* squares) noexcept {
  HWY_DYNAMIC_DISPATCH(NearestCentroidsImpl)
  (points, stride, count, centroids, dim, symbols, symbol_stride, squares);
}

void PackProductBlocks(const uint8_t* symbols, int blocks, const ProductLayout& layout,
                       uint8_t* out) noexcept {
  const int count = layout.Symbols();
  const int quads = count / 4;
  for (int b = 0; b < blocks; ++b, out += layout.BlockBytes()) {
    for (int key = 0; key < kScanBlock; ++key, symbols += count) {
      uint8_t* row = out + key;
      for (int quad = 0; quad < quads; ++quad) {
        const uint8_t* const four = symbols + 4 * quad;
        for (int r = 0; r < 3; ++r, row += kScanBlock) {
          *row = static_cast<uint8_t>(four[r] | (four[3] >> (2 * r) & 3) << 6);
        }
      }
      for (int g = 4 * quads; g < count; ++g, row += kScanBlock) *row = symbols[g];
    }
  }
}

void PackSketchBlocks(const uint8_t* nibbles, int blocks, uint8_t* out) noexcept {
  for (int b = 0; b < blocks; ++b, out += kSketchBlockBytes) {
    for (int key = 0; key < kScanBlock; ++key, nibbles += kSketchDim) {
      for (int r = 0; r < kSketchDim / 2; ++r) {
        out[r * kScanBlock + key] =
            static_cast<uint8_t>(nibbles[r] | nibbles[r + kSketchDim / 2] << 4);
      }
    }
  }
}

uint8_t ProductSymbol(const uint8_t* block, const ProductLayout& layout, int index,
                      int key) noexcept {
  const int quads = layout.Symbols() / 4;
  const uint8_t* const quad = block + index / 4 * 3 * kScanBlock + key;
  int symbol = 0;
  if (index >= 4 * quads) {
    symbol = block[(3 * quads + index - 4 * quads) * kScanBlock + key] & 63;
  } else if (index % 4 < 3) {
    symbol = quad[index % 4 * kScanBlock] & 63;
  } else {
    symbol = quad[0] >> 6 | quad[kScanBlock] >> 6 << 2 | quad[2 * kScanBlock] >> 6 << 4;
  }
  return static_cast<uint8_t>(symbol);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
