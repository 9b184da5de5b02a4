#include "index/reuse.h"

#include <utility>

#include "index/ladder_plan.h"

namespace kvseek::index {

uint64_t LastSearch::Bytes() const {
  const size_t floats =
      block_weights.capacity() + reference.capacity() + queries.capacity() + missed.capacity();
  return sizeof(LastSearch) + positions.capacity() * sizeof(int64_t) + floats * sizeof(float);
}

PlanPtr PlanReuse(std::shared_ptr<const LastSearch> last, const ReuseOptions& reuse,
                  const KvView& view, const SearchQuery& query, const SearchOptions& options,
                  Scratch& scratch) {
  if (last->begin != query.begin || last->group != query.group ||
      query.end < last->last_block * kernels::kScanBlock) {
    return nullptr;
  }
  return MakePlan<LadderPlan>(view, query, options, scratch,
                              Recall{std::move(last), reuse.samples, reuse.tolerance});
}

PlanPtr SelectionReuse::Plan(const KvView& view, const SearchQuery& query,
                             const SearchOptions& options, Scratch& scratch) {
  ++steps_since_;
  if (last_ == nullptr || steps_since_ >= options_.every) return nullptr;
  return PlanReuse(last_, options_, view, query, options, scratch);
}

SearchOptions SelectionReuse::ForSearch(SearchOptions options) const {
  options.keep = options_.every > 1 ? options_.keep : 0;
  return options;
}

void SelectionReuse::Remember(const SearchResult& result) {
  last_ = result.last;
  steps_since_ = 0;
}

SearchResult SelectionReuse::Search(const KeyIndex& index, const KvView& view,
                                    const SearchQuery& query, const SearchOptions& options,
                                    Scratch& scratch) {
  int64_t wasted = 0;
  if (const PlanPtr plan = Plan(view, query, options, scratch)) {
    SearchResult result = RunAll(*plan, scratch);
    if (result.report.trusted) return result;
    wasted = result.report.bytes_touched;
  }
  SearchResult result = index.Search(view, query, ForSearch(options), scratch);
  result.report.bytes_touched += wasted;
  Remember(result);
  return result;
}

}  // namespace kvseek::index
