// What turns the keys and values of a stretch of segments into product codes and value sketches.
//
// Keys. With S the second moment of the head's queries, S = L L^T, coordinates are y = E^T L^T (k -
// c), c being the segment's centre, and a query's q' = E^T L^-1 q, so that <q', y> = <q, k - c>:
// queries are alike in all directions there, and a distance of keys is the difference that queries
// see. E are the principal components of the stretch's keys in these coordinates. They are spread
// over the sub-spaces so that all have about the same product of variances, and each sub-space gets
// 64 centroids by k-means (optimised product quantisation, Ge et al. 2013, in the metric of the
// queries).
//
// Values. The 8 first principal components of the stretch's values less their segments' means.
#ifndef KVSEEK_INDEX_PRODUCT_CODEBOOK_H_
#define KVSEEK_INDEX_PRODUCT_CODEBOOK_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "index/cholesky.h"
#include "index/segment.h"
#include "index/slab_memory.h"
#include "kernels/cpu/product_codes.h"

namespace kvseek::index {

/// Immutable once trained.
struct ProductCodebook {
  kernels::ProductLayout layout;
  int trained_segments = 0;
  std::vector<uint32_t> starts;       ///< (subspaces + 1): sub-space g: [starts[g], starts[g + 1])
  std::vector<float> key_map;         ///< (key_dim, key_dim), a row for each coordinate: E^T L^T
  std::vector<uint16_t> query_map;    ///< the same for queries, bf16: E^T L^-1
  std::vector<float> centroids;       ///< (key_dim, 64): the centroids' coordinates side by side
  std::vector<float> errors;          ///< (64), ascending: the distance from its code of each level
  std::vector<float> components;      ///< (8, value_dim), orthonormal; empty without a sketch
  std::vector<uint16_t> sketch_rows;  ///< (8, value_dim) bf16: components times their steps
  std::vector<float> steps;           ///< (8) of the components' nibbles
  Slot search_rows;  ///< what a search reads of it, in one run: query_map, the centroids as bf16

  /// Of `segments`, at least one. `queries`: the factor L.
  static std::shared_ptr<const ProductCodebook> Train(
      const KvShape& shape, absl::Span<const std::shared_ptr<const Segment>> segments,
      const CholeskyFactor& queries, const kernels::ProductLayout& layout);

  /// Encodes a segment's 16 blocks into `codes`; and if there is a sketch, into `sketches`, and its
  /// mean value, bf16, into value_mean (value_dim).
  void Encode(const KvShape& shape, const Segment& segment, uint8_t* codes, uint8_t* sketches,
              uint16_t* value_mean) const;
  /// Sets search_rows, and sketch_rows if there is a sketch, from the others.
  void SetSearchRows();
  const uint16_t* search_query_map() const {
    return reinterpret_cast<const uint16_t*>(search_rows.get());
  }
  const uint16_t* search_centroids() const { return search_query_map() + query_map.size(); }
  size_t Bytes() const;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_PRODUCT_CODEBOOK_H_
