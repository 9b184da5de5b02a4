#include "index/search_audit.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "index/selection.h"
#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

float RelativeDistance(const float* out, const float* truth, size_t dim) {
  double difference = 0.0;
  double norm = 0.0;
  for (size_t d = 0; d < dim; ++d) {
    const double delta = double{out[d]} - double{truth[d]};
    difference += delta * delta;
    norm += double{truth[d]} * double{truth[d]};
  }
  return static_cast<float>(std::sqrt(norm > 0.0 ? difference / norm : difference));
}

}  // namespace

SearchAudit::SearchAudit(const KvView& view, const SearchQuery& query, Scratch& scratch)
    : begin_(query.begin),
      range_(query.end - query.begin),
      truth_(ExactIndex().Search(view, query, {}, scratch)),
      scores_(static_cast<size_t>(query.group) * static_cast<size_t>(range_)) {
  const AlignedArray<float> queries = ScaleQueries(query, view.shape);
  const auto stride = static_cast<int>(range_);
  VisitRows(view, query.begin, query.end,
            [&](const uint16_t* keys, const uint16_t*, int64_t first, int tokens) {
              kernels::ScoreRows(queries.get(), query.group, keys, view.shape.dtype, tokens,
                                 view.shape.key_dim, scores_.data() + (first - begin_), stride);
            });
  const int64_t top = std::min(kAuditTopKeys, range_);
  for (size_t h = 0; top > 0 && h < static_cast<size_t>(query.group); ++h) {
    std::vector<float> order(Scores(h), Scores(h) + range_);
    std::nth_element(order.begin(), order.begin() + (top - 1), order.end(), std::greater<>());
    top_.push_back(order[static_cast<size_t>(top - 1)]);
  }
}

AuditFigures SearchAudit::Compare(const SearchResult& result) const {
  const size_t group = truth_.lse.size();
  const size_t dim = truth_.out.size() / group;
  AuditFigures figures;
  for (size_t h = 0; h < group; ++h) {
    figures.output_error.push_back(
        RelativeDistance(result.out.data() + h * dim, truth_.out.data() + h * dim, dim));
    if (static_cast<int64_t>(result.positions.size()) == range_) {
      figures.recall.push_back(1.0F);
      figures.missed.push_back(0.0F);
      continue;
    }
    int64_t found = 0;
    double read = 0.0;
    for (const int64_t position : result.positions) {
      const float score = Scores(h)[position - begin_];
      found += score >= top_[h] ? 1 : 0;
      read += std::exp(double{score} - double{truth_.lse[h]});
    }
    const int64_t top = std::min(kAuditTopKeys, range_);
    figures.recall.push_back(static_cast<float>(std::min(found, top)) / static_cast<float>(top));
    figures.missed.push_back(static_cast<float>(std::max(0.0, 1.0 - read)));
  }
  return figures;
}

}  // namespace kvseek::index
