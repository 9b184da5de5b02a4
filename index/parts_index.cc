#include "index/parts_index.h"

#include <time.h>

#include <algorithm>
#include <utility>

#include "index/chosen_plan.h"
#include "index/parts_search.h"

namespace kvseek::index {
namespace {

/// CPU time of the calling thread.
double ThreadSeconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

PartsIndex::PartsIndex(std::string name, PartRank rank,
                       std::vector<std::shared_ptr<const PartsRun>> runs, double build_core_seconds)
    : name_(std::move(name)),
      rank_(rank),
      runs_(std::move(runs)),
      build_core_seconds_(build_core_seconds) {}

size_t PartsIndex::Bytes() const {
  size_t bytes = runs_.front()->parts->basis()->Bytes();
  for (const auto& run : runs_) {
    bytes += run->parts->Bytes() + run->landmarks.size() * sizeof(float);
    if (run->nodes != nullptr) bytes += run->nodes->Bytes();
  }
  return bytes;
}

PlanPtr PartsIndex::Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
                         Scratch& scratch) const {
  scratch.Reset();
  return PlanChosen(view, query, options,
                    PartsSearch(runs_, rank_, view, query, options, scratch).Choose());
}

std::shared_ptr<const BuiltIndex> BuildParts(const BuildInput& input, const std::string& name,
                                             PartRank rank, const MakePartsRun& make,
                                             const RenewPartsRun& renew) {
  const double started = ThreadSeconds();
  const auto* const previous = dynamic_cast<const PartsIndex*>(input.previous.get());
  const int64_t sealed = input.view.SealedTokens();
  std::vector<std::shared_ptr<const PartsRun>> runs;
  for (int64_t begin = 0; begin < sealed; begin += kRunTokens) {
    const int64_t end = std::min(begin + kRunTokens, sealed);
    const size_t i = runs.size();
    if (previous != nullptr && i < previous->runs().size() &&
        previous->runs()[i]->parts->end() == end) {
      const std::shared_ptr<const PartsRun>& run = previous->runs()[i];
      runs.push_back(renew == nullptr ? run : renew(run));
      continue;
    }
    if (input.give_up()) return nullptr;
    runs.push_back(make(begin, end, i == 0 ? nullptr : runs.front()->parts->basis()));
  }
  if (runs.empty()) return nullptr;
  return std::make_shared<const PartsIndex>(name, rank, std::move(runs), ThreadSeconds() - started);
}

}  // namespace kvseek::index
