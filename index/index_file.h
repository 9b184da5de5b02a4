// Built indexes as bytes: what a snapshot keeps of them.
//
// A loaded index is the saved one: it answers with the same bits at the same SIMD level, and the
// next build may take parts over from it. The bytes do not hold the keys; they are worth something
// only beside the very keys that the index was built over, which is for the caller to see to, as is
// a checksum. Everything is little-endian and unaligned. First a header of 36 bytes:
//
//   offset  bytes
//        0      8  "kvsindex"
//        8      4  version, 2
//       12      1  kind: BuiltKind (0 landmark, 1 cluster, 2 graph, 3 product)
//       13      1  rank: PartRank of landmark (0 bound, 1 spread, 2 landmark) and cluster (1); 0
//       14      1  dtype of keys and values: 1 bf16, 2 fp16
//       15      1  0
//       16      4  key_dim
//       20      4  value_dim
//       24      8  covered: keys, a positive multiple of 1024
//       32      4  softmax_scale, fp32
//
// then sections to the end, each an array: 8 bytes, the array's length in bytes, then its elements.
//
//   landmark and cluster
//     build seconds    fp64 (1)
//     basis            fp32 (key_dim, key_dim), CholeskyFactor::columns
//     then for each run of 4096 keys, the last one of what is left
//       part of key    u16 (keys of the run); parts are numbered from 0 and none is empty
//       summaries of its parts
//       rank bound:    summaries of its nodes, of 16 neighbouring parts each
//       rank landmark: landmarks, fp32 (parts, key_dim)
//   graph
//     build seconds    fp64 (4), the fields of GraphBuildTimes in order
//     basis            as above
//     for each 65536 keys, the last time those that are left
//       summaries of its stretches of 64 keys
//     query factor     fp32 (key_dim, key_dim), CholeskyFactor::columns
//     starts           u32 (covered + 1), and so on: the arrays of KeyGraph
//     neighbours       u32 (last of starts)
//     distances        bf16 (last of starts)
//     entries          u32 (8)
//     part entries     u32 (covered / 64, 2)
//     deviations       bf16 (covered)
//
//   product
//     build seconds    fp64 (1)
//     layout           u32 (2): sub-spaces, 1..63; 1 with a sketch, else 0
//     for each 64 segments, the last time those that are left
//       trained        u32 (1): segments that its codebook was trained on; 0: it has the one before
//       codebook, unless it has the one before
//       codes          u8: blocks as in kernels/cpu/product_codes.h, 16 a segment
//       sketches       u8: the same, with a sketch only
//       value means    bf16 (segments, value_dim), with a sketch only
//
//   codebook: the fields of ProductCodebook, the last two with a sketch only
//     starts           u32 (sub-spaces + 1)
//     key map          fp32 (key_dim, key_dim)
//     query map        bf16 (key_dim, key_dim)
//     centroids        fp32 (key_dim, 64)
//     errors           fp32 (64)
//     components       fp32 (8, value_dim)
//     steps            fp32 (8)
//
//   summaries: five sections, of which the bounds are there for rank bound only
//     mean keys        fp32 (parts, key_dim)
//     key variances    bf16 (parts, key_dim)
//     lower bounds     bf16 (parts, key_dim)
//     upper bounds     bf16 (parts, key_dim)
//     mean values      bf16 (parts, value_dim)
#ifndef KVSEEK_INDEX_INDEX_FILE_H_
#define KVSEEK_INDEX_INDEX_FILE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "index/built_index.h"

namespace kvseek::index {

/// The index's bytes, about as many as index.Bytes(). `shape`: that of the keys it was built over.
/// Thread-safe.
std::string SaveIndex(const BuiltIndex& index, const KvShape& shape);

/// The index that was saved, for keys of `shape` (scan_bits does not matter). Bytes from anywhere
/// are safe: counts, ids and numbers are checked, lengths before anything is allocated, and what is
/// wrong with them is kDataLoss with the section's name. Bytes that were changed and still make an
/// index load, and it answers, wrongly. An index over keys that are not finite does not load. Does
/// not refer to `bytes` afterwards. Thread-safe.
absl::StatusOr<std::shared_ptr<const BuiltIndex>> LoadIndex(absl::string_view bytes,
                                                            const KvShape& shape);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_INDEX_FILE_H_
