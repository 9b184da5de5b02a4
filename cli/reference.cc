#include "cli/reference.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <utility>

#include "cli/reference_kernels.h"
#include "kernels/dtype.h"

namespace kvseek::cli {
namespace {

constexpr int kBlockKeys = 64;
constexpr size_t kScoreBytesMax = size_t{32} << 20;  // of one thread: what makes a chunk of steps
constexpr int kChunkRowsMax = 24;                    // more rows leave the first-level cache

int RoundUp(int value, int to) { return (value + to - 1) / to * to; }

void RowsToDouble(const uint16_t* rows, kernels::DType dtype, size_t elements, double* out) {
  if (dtype == kernels::DType::kBf16) {
    for (size_t i = 0; i < elements; ++i) out[i] = double{kernels::Bf16ToFloat(rows[i])};
  } else {
    for (size_t i = 0; i < elements; ++i) out[i] = double{kernels::Fp16ToFloat(rows[i])};
  }
}

/// Scaled queries of some steps as (key_dim, padded rows); padding is zero.
std::vector<double> TransposedQueries(const HeadTrace& trace, absl::Span<const int> steps,
                                      int padded_rows) {
  std::vector<double> queries(static_cast<size_t>(trace.key_dim * padded_rows), 0.0);
  for (size_t s = 0; s < steps.size(); ++s) {
    const float* from = trace.StepQueries(steps[s]);
    for (int h = 0; h < trace.group; ++h) {
      const size_t row = s * static_cast<size_t>(trace.group) + static_cast<size_t>(h);
      for (int d = 0; d < trace.key_dim; ++d) {
        queries[static_cast<size_t>(d) * static_cast<size_t>(padded_rows) + row] =
            double{trace.softmax_scale} * double{from[h * trace.key_dim + d]};
      }
    }
  }
  return queries;
}

/// The work of one chunk of steps, whose scores are held at once.
class Chunk {
 public:
  Chunk(const HeadTrace& trace, const ReferenceOptions& options, size_t first, size_t count,
        Reference& result)
      : trace_(trace),
        options_(options),
        first_(first),
        steps_(absl::MakeSpan(result.steps).subspan(first, count)),
        rows_(static_cast<int>(count) * trace.group),
        padded_(RoundUp(rows_, kReferenceRowTile)),
        result_(result) {}

  void Run() {
    Score();
    RankAll();
    Weigh();
    Attend();
  }

 private:
  size_t Row(int row) const {
    return first_ * static_cast<size_t>(trace_.group) + static_cast<size_t>(row);
  }
  double& ScoreOf(int64_t token, int row) {
    return scores_[static_cast<size_t>(token) * static_cast<size_t>(padded_) +
                   static_cast<size_t>(row)];
  }

  void Score() {
    const auto padded_tokens = (trace_.tokens + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
    scores_.resize(static_cast<size_t>(padded_tokens) * static_cast<size_t>(padded_));
    const std::vector<double> queries = TransposedQueries(trace_, steps_, padded_);
    std::vector<double> keys(static_cast<size_t>(kBlockKeys * trace_.key_dim), 0.0);
    for (int64_t t = 0; t < trace_.tokens; t += kBlockKeys) {
      const auto count = static_cast<size_t>(std::min<int64_t>(kBlockKeys, trace_.tokens - t));
      RowsToDouble(trace_.keys.data() + t * trace_.key_dim, trace_.dtype,
                   count * static_cast<size_t>(trace_.key_dim), keys.data());
      ReferenceScores(keys.data(), kBlockKeys, trace_.key_dim, queries.data(), padded_,
                      &ScoreOf(t, 0));
    }
  }

  /// Turns scores into weights exp(score - max); lse from their sums.
  void Weigh() {
    max_.assign(static_cast<size_t>(padded_), -std::numeric_limits<double>::infinity());
    sum_.assign(static_cast<size_t>(padded_), 0.0);
    for (int64_t t = 0; t < trace_.tokens; ++t) {
      const double* scores = &ScoreOf(t, 0);
      for (size_t r = 0; r < max_.size(); ++r) max_[r] = std::max(max_[r], scores[r]);
    }
    for (int64_t t = 0; t < trace_.tokens; ++t) {
      double* scores = &ScoreOf(t, 0);
      for (size_t r = 0; r < max_.size(); ++r) {
        scores[r] = std::exp(scores[r] - max_[r]);
        sum_[r] += scores[r];
      }
    }
    for (int r = 0; r < rows_; ++r) {
      const auto row = static_cast<size_t>(r);
      result_.lse[Row(r)] = max_[row] + std::log(sum_[row]);
    }
  }

  void Attend() {
    const auto dim = static_cast<size_t>(trace_.value_dim);
    std::vector<double> values(kBlockKeys * dim);
    std::vector<double> acc(static_cast<size_t>(padded_) * dim, 0.0);
    for (int64_t t = 0; t < trace_.tokens; t += kBlockKeys) {
      const auto count = static_cast<size_t>(std::min<int64_t>(kBlockKeys, trace_.tokens - t));
      RowsToDouble(trace_.values.data() + t * trace_.value_dim, trace_.dtype, count * dim,
                   values.data());
      ReferenceAccumulate(&ScoreOf(t, 0), padded_, values.data(), static_cast<int>(count),
                          trace_.value_dim, acc.data());
    }
    for (int r = 0; r < rows_; ++r) {
      for (size_t d = 0; d < dim; ++d) {
        result_.out[Row(r) * dim + d] =
            acc[static_cast<size_t>(r) * dim + d] / sum_[static_cast<size_t>(r)];
      }
    }
  }

  /// The true top keys of every row; needs scores, not weights.
  void RankAll() {
    int64_t most = result_.top;
    for (const int64_t k : options_.oracle_ks) most = std::max(most, std::min(k, trace_.tokens));
    std::vector<int32_t> order(static_cast<size_t>(trace_.tokens));
    std::vector<double> column(order.size());
    std::vector<std::vector<int32_t>> group_keys(options_.oracle_ks.size());
    for (int r = 0; r < rows_; ++r) {
      for (size_t t = 0; t < order.size(); ++t) {
        order[t] = static_cast<int32_t>(t);
        column[t] = ScoreOf(static_cast<int64_t>(t), r);
      }
      const auto before = [&](int32_t a, int32_t b) {
        const double x = column[static_cast<size_t>(a)];
        const double y = column[static_cast<size_t>(b)];
        return x > y || (x == y && a < b);
      };
      const auto middle = order.begin() + most;
      if (most > 4 * kRecallKeys) {
        if (middle != order.end()) std::nth_element(order.begin(), middle, order.end(), before);
        std::sort(order.begin(), middle, before);
      } else {
        std::partial_sort(order.begin(), middle, order.end(), before);
      }
      std::copy_n(order.begin(), result_.top,
                  result_.top_keys.begin() + static_cast<std::ptrdiff_t>(Row(r)) * result_.top);
      if (!options_.oracle_ks.empty()) AskOracle(r, order, column);
      for (size_t i = 0; i < group_keys.size(); ++i) {
        const int64_t k = std::min(options_.oracle_ks[i], trace_.tokens);
        group_keys[i].insert(group_keys[i].end(), order.begin(), order.begin() + k);
        if (r % trace_.group != trace_.group - 1) continue;
        std::sort(group_keys[i].begin(), group_keys[i].end());
        const auto last = std::unique(group_keys[i].begin(), group_keys[i].end());
        result_.oracles[i].keys_read[first_ + static_cast<size_t>(r / trace_.group)] =
            last - group_keys[i].begin();
        group_keys[i].clear();
      }
    }
  }

  /// Attends to the first k keys of `order`, for every k asked for.
  void AskOracle(int row, const std::vector<int32_t>& order, const std::vector<double>& scores) {
    const double max = scores[static_cast<size_t>(order[0])];
    double all = 0.0;
    for (const double score : scores) all += std::exp(score - max);
    const auto dim = static_cast<size_t>(trace_.value_dim);
    std::vector<double> acc(dim);
    std::vector<double> value(dim);
    for (OracleAnswers& oracle : result_.oracles) {
      const auto k = static_cast<size_t>(std::min(oracle.k, trace_.tokens));
      double sum = 0.0;
      std::fill(acc.begin(), acc.end(), 0.0);
      for (size_t i = 0; i < k; ++i) {
        const auto token = static_cast<size_t>(order[i]);
        const double weight = std::exp(scores[token] - max);
        RowsToDouble(trace_.values.data() + token * dim, trace_.dtype, dim, value.data());
        for (size_t d = 0; d < dim; ++d) acc[d] += weight * value[d];
        sum += weight;
      }
      oracle.mass[Row(row)] = std::min(1.0, sum / all);
      for (size_t d = 0; d < dim; ++d) oracle.out[Row(row) * dim + d] = acc[d] / sum;
    }
  }

  const HeadTrace& trace_;
  const ReferenceOptions& options_;
  size_t first_;
  absl::Span<const int> steps_;
  int rows_;
  int padded_;
  Reference& result_;
  std::vector<double> scores_;  // (tokens, padded rows)
  std::vector<double> max_;
  std::vector<double> sum_;
};

}  // namespace

Reference ComputeReference(const HeadTrace& trace, absl::Span<const int> steps,
                           const ReferenceOptions& options) {
  Reference result;
  result.steps.assign(steps.begin(), steps.end());
  const size_t rows = steps.size() * static_cast<size_t>(trace.group);
  const auto dim = static_cast<size_t>(trace.value_dim);
  result.top = static_cast<int>(std::min<int64_t>(kRecallKeys, trace.tokens));
  result.out.resize(rows * dim);
  result.lse.resize(rows);
  result.top_keys.resize(rows * static_cast<size_t>(result.top));
  for (const int64_t k : options.oracle_ks) {
    result.oracles.push_back({k, std::vector<double>(rows * dim), std::vector<double>(rows),
                              std::vector<int64_t>(steps.size())});
  }
  const size_t by_memory =
      kScoreBytesMax / sizeof(double) / static_cast<size_t>(trace.tokens + kBlockKeys);
  const size_t rows_at_once = std::min<size_t>(kChunkRowsMax, by_memory);
  const size_t chunk = std::max<size_t>(1, rows_at_once / static_cast<size_t>(trace.group));
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t first = next.fetch_add(chunk); first < steps.size();
         first = next.fetch_add(chunk)) {
      Chunk(trace, options, first, std::min(chunk, steps.size() - first), result).Run();
    }
  };
  std::vector<std::jthread> threads;
  for (int i = 1; i < options.threads; ++i) threads.emplace_back(work);
  work();
  threads.clear();  // joins
  return result;
}

std::vector<double> MassOfKeys(const HeadTrace& trace, int step, const double* lse,
                               absl::Span<const int64_t> positions) {
  const int padded = RoundUp(trace.group, kReferenceRowTile);
  const std::vector<double> queries =
      TransposedQueries(trace, absl::MakeConstSpan(&step, 1), padded);
  const auto dim = static_cast<size_t>(trace.key_dim);
  std::vector<double> keys(kBlockKeys * dim, 0.0);
  std::vector<double> scores(static_cast<size_t>(kBlockKeys * padded));
  std::vector<double> mass(static_cast<size_t>(trace.group), 0.0);
  for (size_t begin = 0; begin < positions.size(); begin += kBlockKeys) {
    const size_t count = std::min<size_t>(kBlockKeys, positions.size() - begin);
    for (size_t i = 0; i < count; ++i) {
      RowsToDouble(trace.keys.data() + positions[begin + i] * trace.key_dim, trace.dtype, dim,
                   keys.data() + i * dim);
    }
    ReferenceScores(keys.data(), kBlockKeys, trace.key_dim, queries.data(), padded, scores.data());
    for (size_t i = 0; i < count; ++i) {
      for (size_t h = 0; h < mass.size(); ++h) {
        mass[h] += std::exp(scores[i * static_cast<size_t>(padded) + h] - lse[h]);
      }
    }
  }
  return mass;
}

}  // namespace kvseek::cli
