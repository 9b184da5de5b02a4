#include "service/query_sample.h"

#include <algorithm>
#include <utility>

#include "index/rest_audit.h"

namespace kvseek::service {
namespace {

/// Of a position, evenly spread in [0, 1).
double Rank(int64_t position) { return index::UniformHash(0, static_cast<uint64_t>(position), 0); }

}  // namespace

std::vector<QuerySample::Pick> QuerySample::Picks() const {
  std::vector<Pick> picks;
  for (size_t i = 0; i < positions_.size(); ++i) {
    picks.push_back({positions_[i], rows_.data() + i * token_elements_});
  }
  return picks;
}

absl::StatusOr<std::shared_ptr<const QuerySample>> QuerySample::Copy(const std::vector<Pick>& picks,
                                                                     size_t token_elements,
                                                                     MemoryBudget& budget) {
  const size_t elements = picks.size() * token_elements;
  auto memory = budget.Reserve(elements * sizeof(uint16_t) + picks.size() * sizeof(int64_t),
                               "query_positions");
  if (!memory.ok()) return memory.status();
  auto copy = std::make_shared<QuerySample>(token_elements);
  copy->memory_ = *std::move(memory);
  copy->positions_.reserve(picks.size());
  copy->rows_.reserve(elements);
  for (const Pick& pick : picks) {
    copy->positions_.push_back(pick.position);
    copy->rows_.insert(copy->rows_.end(), pick.row, pick.row + token_elements);
  }
  return copy;
}

absl::StatusOr<std::shared_ptr<const QuerySample>> QuerySample::With(const SampledQueries& more,
                                                                     MemoryBudget& budget) const {
  std::vector<Pick> picks = Picks();
  for (size_t i = 0; i < more.positions.size(); ++i) {
    picks.push_back({static_cast<int64_t>(more.positions[i]), more.rows + i * token_elements_});
  }
  const auto before = [](const Pick& a, const Pick& b) { return a.position < b.position; };
  std::stable_sort(picks.begin(), picks.end(), before);
  const auto same = [](const Pick& a, const Pick& b) { return a.position == b.position; };
  picks.erase(std::unique(picks.begin(), picks.end(), same), picks.end());
  if (picks.size() > kQuerySampleMax) {
    const auto last = picks.begin() + kQuerySampleMax;
    std::nth_element(picks.begin(), last, picks.end(), [](const Pick& a, const Pick& b) {
      return Rank(a.position) < Rank(b.position);
    });
    picks.erase(last, picks.end());
    std::sort(picks.begin(), picks.end(), before);
  }
  return Copy(picks, token_elements_, budget);
}

absl::StatusOr<std::shared_ptr<const QuerySample>> QuerySample::Below(
    const std::shared_ptr<const QuerySample>& sample, int64_t tokens, MemoryBudget& budget) {
  if (sample == nullptr || sample->positions_.empty() || sample->positions_.back() < tokens) {
    return sample;
  }
  std::vector<Pick> picks = sample->Picks();
  std::erase_if(picks, [tokens](const Pick& pick) { return pick.position >= tokens; });
  return Copy(picks, sample->token_elements_, budget);
}

std::vector<float> QuerySample::OfHead(size_t kv_head, size_t group, size_t key_dim,
                                       kernels::DType dtype) const {
  const size_t count = group * key_dim;
  std::vector<float> queries;
  queries.reserve(positions_.size() * count);
  for (size_t i = 0; i < positions_.size(); ++i) {
    const uint16_t* const row = rows_.data() + i * token_elements_ + kv_head * count;
    for (size_t e = 0; e < count; ++e) queries.push_back(kernels::LoadElement(row, dtype, e));
  }
  return queries;
}

}  // namespace kvseek::service
