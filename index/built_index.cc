#include "index/built_index.h"

#include "index/cluster_index.h"
#include "index/graph_index.h"
#include "index/landmark_index.h"
#include "index/product_index.h"

namespace kvseek::index {

std::shared_ptr<const BuiltIndex> BuildIndex(BuiltKind kind, const BuildInput& input,
                                             const LandmarkOptions& landmark) {
  switch (kind) {
    case BuiltKind::kLandmark:
      return BuildLandmark(input, landmark);
    case BuiltKind::kCluster:
      return BuildCluster(input, {});
    case BuiltKind::kGraph:
      return GraphIndex::Build(input, {});
    case BuiltKind::kProduct:
      return ProductIndex::Build(input, {});
  }
  return nullptr;
}

}  // namespace kvseek::index
