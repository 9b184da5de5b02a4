#include "index/key_index.h"

namespace kvseek::index {

SearchResult KeyIndex::Search(const KvView& view, const SearchQuery& query,
                              const SearchOptions& options, Scratch& scratch) const {
  const std::unique_ptr<SearchPlan> plan = Plan(view, query, options, scratch);
  for (int piece = 0; piece < plan->pieces(); ++piece) plan->Run(piece, scratch);
  return plan->Finish(scratch);
}

}  // namespace kvseek::index
