#include "index/reuse.h"

#include "index/ladder_plan.h"

namespace kvseek::index {

std::unique_ptr<SearchPlan> SelectionReuse::Plan(const KvView& view, const SearchQuery& query,
                                                 const SearchOptions& options, Scratch& scratch) {
  ++steps_since_;
  if (last_ == nullptr || steps_since_ >= options_.every || last_->begin != query.begin ||
      last_->group != query.group || query.end < last_->last_block * kernels::kScanBlock) {
    return nullptr;
  }
  return std::make_unique<LadderPlan>(view, query, options, scratch,
                                      Recall{last_, options_.samples, options_.tolerance});
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
  if (const std::unique_ptr<SearchPlan> plan = Plan(view, query, options, scratch)) {
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
