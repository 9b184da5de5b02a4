#include "index/ladder_plan.h"

namespace kvseek::index {
namespace {

class Ladder final : public KeyIndex {
 public:
  absl::string_view name() const override { return "ladder"; }
  PlanPtr Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
               Scratch& scratch) const override {
    return MakePlan<LadderPlan>(view, query, options, scratch);
  }
};

}  // namespace

const KeyIndex& LadderIndex() {
  static const Ladder index;
  return index;
}

}  // namespace kvseek::index
