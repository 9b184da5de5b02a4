// Indexes that are built in the background, beside the ladder that every segment has from its seal.
//
// A BuiltIndex covers the keys [0, covered()) of a head cache, all of them sealed. It is immutable
// and holds for every head cache that shares those segments: one that has grown since, and forks.
// Its searches read what it does not cover yet exactly, so an answer is right at any time; when
// much has been appended, the next build takes the last one's place.
#ifndef KVSEEK_INDEX_BUILT_INDEX_H_
#define KVSEEK_INDEX_BUILT_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/types/span.h"
#include "index/key_index.h"

namespace kvseek::index {

enum class BuiltKind : uint8_t { kLandmark, kCluster, kGraph, kProduct };
inline constexpr int kBuiltKinds = 4;

class BuiltIndex : public KeyIndex {
 public:
  virtual int64_t covered() const = 0;
  virtual size_t Bytes() const = 0;
  /// Time that the build took, summed over the cores it used; parts taken over cost nothing.
  virtual double build_core_seconds() const = 0;
};

/// What landmark keeps of a block to rank it by; see landmark_index.h.
enum class LandmarkSummary : uint8_t { kBounds, kMean, kGiven };

inline constexpr int kLandmarkBlockMin = 16;   ///< keys of a block; the sizes are powers of two ...
inline constexpr int kLandmarkBlockMax = 256;  ///< ... up to this

/// How landmark is built.
struct LandmarkOptions {
  int block = kLandmarkBlockMin;
  LandmarkSummary summary = LandmarkSummary::kBounds;
};

/// What an index is built from. What it points at must outlive the build.
struct BuildInput {
  KvView view;    ///< of which the sealed keys are to be covered
  int group = 1;  ///< query heads that share the KV head
  /// Queries that the decoder had at earlier tokens, fp32 (query_positions.size(), group, key_dim),
  /// not scaled; query i saw the keys up to query_positions[i], its own. May be empty: an index
  /// that needs some is not built then.
  absl::Span<const float> queries = {};
  absl::Span<const int64_t> query_positions = {};
  /// Landmark keys of the client's own, for LandmarkSummary::kGiven: fp32 (landmark_positions
  /// .size(), key_dim); landmark i is that of the block that begins at landmark_positions[i], a
  /// multiple of the block's size; ascending. Blocks that are not sealed whole do not count.
  absl::Span<const float> landmarks = {};
  absl::Span<const int64_t> landmark_positions = {};
  /// An index of the same kind, built with the same options over fewer of the same keys, parts of
  /// which may be taken over; or null.
  std::shared_ptr<const BuiltIndex> previous = nullptr;
  /// Asked now and then; true ends the build, which then returns null.
  std::function<bool()> give_up = [] { return false; };
};

/// Builds landmark as told and the other kinds with their usual settings, in the calling thread;
/// seconds for a long sequence. Null if there is nothing to build from (no sealed keys; a graph
/// without queries, product codes with few) or it was given up.
std::shared_ptr<const BuiltIndex> BuildIndex(BuiltKind kind, const BuildInput& input,
                                             const LandmarkOptions& landmark = {});

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_BUILT_INDEX_H_
