// Builds the indexes of `kvseek eval` that a daemon builds in the background, from a trace.
#ifndef KVSEEK_CLI_BUILD_INDEX_H_
#define KVSEEK_CLI_BUILD_INDEX_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cli/trace.h"
#include "index/built_index.h"
#include "index/graph_build.h"
#include "kernels/cpu/product_codes.h"

namespace kvseek::cli {

struct BuildSettings {
  int block = 16;                    ///< landmark: keys of a block
  std::string summary = "minmax";    ///< landmark: minmax, mean or given
  int keys_per_cluster = 16;         ///< cluster
  int degree = index::kGraphDegree;  ///< graph: neighbours of a key, at most
  kernels::ProductLayout product{};  ///< product

  bool operator==(const BuildSettings&) const = default;
};

/// Landmark keys as a client may have them, in the trace's dtype.
struct TraceLandmarks {
  std::vector<uint64_t> positions;  ///< of the blocks' first keys
  std::vector<uint16_t> rows;       ///< (positions.size(), key_dim)
};

/// What summary `given` takes for landmarks, since a trace has no trained ones: of each whole block
/// that begins in [begin, end), the key with the highest mean score of the prefill queries.
TraceLandmarks MakeLandmarks(const HeadTrace& trace, int block, int64_t begin, int64_t end);

/// `name`: landmark, cluster, graph or product. Trained on the trace's prefill queries only. Null
/// if the trace has no full segment, or for graph and product too few prefill queries. `view` is of
/// the trace's rows.
std::shared_ptr<const index::BuiltIndex> BuildIndex(const std::string& name, const HeadTrace& trace,
                                                    const index::KvView& view,
                                                    const BuildSettings& settings);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_BUILD_INDEX_H_
