#include "index/key_index.h"

#include <utility>

namespace kvseek::index {

absl::string_view NameOf(SearchPhase phase) {
  constexpr absl::string_view kNames[kSearchPhases] = {"plan", "sample", "scan", "refine",
                                                       "finish"};
  return kNames[static_cast<size_t>(phase)];
}

void SearchResult::Clear() {
  SearchResult fresh;
  const auto keep = [](auto& array, auto& fresh_array) {
    array.clear();
    fresh_array.swap(array);
  };
  keep(out, fresh.out);
  keep(lse, fresh.lse);
  keep(positions, fresh.positions);
  keep(report.missed_mass, fresh.report.missed_mass);
  keep(report.missed_low, fresh.report.missed_low);
  keep(report.missed_high, fresh.report.missed_high);
  *this = std::move(fresh);
}

size_t SearchResult::Bytes() const {
  const size_t floats = out.capacity() + lse.capacity() + report.missed_mass.capacity() +
                        report.missed_low.capacity() + report.missed_high.capacity();
  return floats * sizeof(float) + positions.capacity() * sizeof(int64_t);
}

SearchResult RunAll(SearchPlan& plan, Scratch& scratch) {
  do {
    for (int piece = 0; piece < plan.pieces(); ++piece) plan.Run(piece, scratch);
  } while (plan.NextStep(scratch));
  SearchResult result;
  plan.Finish(result, scratch);
  return result;
}

SearchResult KeyIndex::Search(const KvView& view, const SearchQuery& query,
                              const SearchOptions& options, Scratch& scratch) const {
  return RunAll(*Plan(view, query, options, scratch), scratch);
}

}  // namespace kvseek::index
