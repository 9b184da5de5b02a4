#include "index/key_index.h"

namespace kvseek::index {

SearchResult RunAll(SearchPlan& plan, Scratch& scratch) {
  do {
    for (int piece = 0; piece < plan.pieces(); ++piece) plan.Run(piece, scratch);
  } while (plan.NextStep(scratch));
  return plan.Finish(scratch);
}

SearchResult KeyIndex::Search(const KvView& view, const SearchQuery& query,
                              const SearchOptions& options, Scratch& scratch) const {
  return RunAll(*Plan(view, query, options, scratch), scratch);
}

}  // namespace kvseek::index
