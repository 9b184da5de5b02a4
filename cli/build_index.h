// Builds the indexes of `kvseek eval` that a daemon builds in the background, from a trace.
#ifndef KVSEEK_CLI_BUILD_INDEX_H_
#define KVSEEK_CLI_BUILD_INDEX_H_

#include <memory>
#include <string>

#include "cli/trace.h"
#include "index/built_index.h"
#include "index/graph_build.h"
#include "kernels/cpu/product_codes.h"

namespace kvseek::cli {

struct BuildSettings {
  int block = 16;                    ///< landmark: keys of a block
  std::string summary = "minmax";    ///< landmark: minmax or mean
  int keys_per_cluster = 16;         ///< cluster
  int degree = index::kGraphDegree;  ///< graph: neighbours of a key, at most
  kernels::ProductLayout product{};  ///< product

  bool operator==(const BuildSettings&) const = default;
};

/// `name`: landmark, cluster, graph or product. Trained on the trace's prefill queries only. Null
/// if the trace has no full segment, or for graph and product too few prefill queries. `view` is of
/// the trace's rows.
std::shared_ptr<const index::BuiltIndex> BuildIndex(const std::string& name, const HeadTrace& trace,
                                                    const index::KvView& view,
                                                    const BuildSettings& settings);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_BUILD_INDEX_H_
