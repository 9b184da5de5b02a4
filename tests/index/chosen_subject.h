// A made-up search that has chosen at random: what chosen_plan.h and chosen_audit.h are tested on.
#ifndef KVSEEK_TESTS_INDEX_CHOSEN_SUBJECT_H_
#define KVSEEK_TESTS_INDEX_CHOSEN_SUBJECT_H_

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "index/chosen_plan.h"
#include "tests/index/double_attention.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {

struct ChosenSizes {
  int64_t covered = 2048;
  int parts = 60;
  int64_t begin = 0;
  int64_t end = 3000;
  double share = 0.3;         ///< of the parts, chosen
  double weight_noise = 0.0;  ///< standard deviation, in nats, of head 0's estimated weights
};

/// A trace, random parts of its first `covered` keys, and a random choice among them.
class ChosenSubject {
 public:
  ChosenSubject(const TraceShape& shape, const ChosenSizes& sizes)
      : trace_(RandomTrace(shape)), head_(trace_, 2), sizes_(sizes), random_(shape.seed) {
    std::vector<uint16_t> part_of;
    for (int64_t i = 0; i < sizes.covered; ++i) {
      const auto part = i < sizes.parts ? i : static_cast<int64_t>(random_() % sizes.parts);
      part_of.push_back(static_cast<uint16_t>(part));
    }
    if (sizes.covered > 0) {
      parts_ = KeyParts::Make(head_.view(), 0, part_of, sizes.parts, /*bounds=*/false);
    }
    Choose();
  }

  const cli::HeadTrace& trace() const { return trace_; }
  const ChosenKeys& chosen() const { return chosen_; }
  /// Keys of the range that are read, ascending.
  const std::vector<int64_t>& read() const { return read_; }

  SearchResult Search(const SearchOptions& options) const {
    Scratch scratch;
    const KvView view = head_.view();
    const auto plan = PlanChosen(
        view, {trace_.StepQueries(0), trace_.group, sizes_.begin, sizes_.end}, options, chosen_);
    do {
      for (int piece = plan->pieces() - 1; piece >= 0; --piece) plan->Run(piece, scratch);
    } while (plan->NextStep(scratch));
    SearchResult result;
    plan->Finish(result, scratch);
    return result;
  }

  /// State of keys of the range that `keep` accepts, and of the estimated rest.
  template <typename Keep>
  DoubleState State(int head, const Keep& keep, bool with_rest) const {
    DoubleState state(trace_.value_dim);
    for (const int64_t position : read_) {
      if (keep(position)) state.Add(ScoreOf(trace_, 0, head, position), ValueOf(trace_, position));
    }
    for (size_t i = 0; i < chosen_.unread.size() && with_rest; ++i) {
      const UnreadPart& part = chosen_.unread[i];
      std::vector<double> mean;
      for (int d = 0; d < trace_.value_dim; ++d) {
        mean.push_back(
            kernels::Bf16ToFloat(part.parts->mean_values()[part.part * trace_.value_dim + d]));
      }
      state.Add(chosen_.weights[static_cast<size_t>(head) * chosen_.unread.size() + i], mean);
    }
    return state;
  }

  /// Softmax mass, within the range, of the keys that are not read.
  double MissedMass(int head) const {
    double missed = 0.0;
    double all = 0.0;
    for (int64_t p = sizes_.begin; p < sizes_.end; ++p) {
      const double weight = std::exp(ScoreOf(trace_, 0, head, p));
      all += weight;
      if (!std::binary_search(read_.begin(), read_.end(), p)) missed += weight;
    }
    return missed / all;
  }

 private:
  void Choose() {
    chosen_.covered = sizes_.covered;
    std::vector<double> variances(static_cast<size_t>(trace_.group));
    for (int p = 0; p < (parts_ == nullptr ? 0 : sizes_.parts); ++p) {
      std::vector<int64_t> keys;
      for (const uint16_t member : parts_->Members(p)) {
        if (member >= sizes_.begin && member < sizes_.end) keys.push_back(member);
      }
      if (keys.empty()) continue;
      if (std::uniform_real_distribution<>()(random_) < sizes_.share) {
        chosen_.positions.insert(chosen_.positions.end(), keys.begin(), keys.end());
        continue;
      }
      // Now and then a single key of a part is read, as a graph does.
      if (sizes_.share > 0.0 && keys.size() > 1 && random_() % 3 == 0) {
        chosen_.positions.push_back(keys[1]);
        keys.erase(keys.begin() + 1);
      }
      chosen_.unread.push_back({parts_.get(), p, static_cast<int>(keys.size())});
      for (int h = 0; h < trace_.group; ++h) {
        const auto [mean, variance] = ScoreMoments(h, keys);
        weights_.push_back(PartWeight(static_cast<float>(mean), static_cast<float>(variance),
                                      static_cast<int>(keys.size())));
        variances[static_cast<size_t>(h)] += variance;
      }
    }
    std::sort(chosen_.positions.begin(), chosen_.positions.end());
    const size_t unread = chosen_.unread.size();
    for (int h = 0; h < trace_.group; ++h) {
      const double variance = unread > 0 ? variances[static_cast<size_t>(h)] / unread : 0.0;
      chosen_.spread.push_back(static_cast<float>(std::sqrt(variance)));
      for (size_t i = 0; i < unread; ++i) {
        chosen_.weights.push_back(weights_[i * static_cast<size_t>(trace_.group) + h]);
        if (h > 0 || sizes_.weight_noise == 0.0) continue;
        chosen_.weights.back() +=
            static_cast<float>(std::normal_distribution<>(0.0, sizes_.weight_noise)(random_));
      }
    }
    read_ = chosen_.positions;
    for (int64_t p = std::max(sizes_.begin, sizes_.covered); p < sizes_.end; ++p) {
      read_.push_back(p);
    }
  }

  /// Mean and variance of the keys' scores.
  std::pair<double, double> ScoreMoments(int head, const std::vector<int64_t>& keys) const {
    double sum = 0.0;
    double squares = 0.0;
    for (const int64_t key : keys) {
      const double score = ScoreOf(trace_, 0, head, key);
      sum += score;
      squares += score * score;
    }
    const double mean = sum / static_cast<double>(keys.size());
    return {mean, squares / static_cast<double>(keys.size()) - mean * mean};
  }

  cli::HeadTrace trace_;
  cli::StoredHead head_;
  ChosenSizes sizes_;
  std::mt19937_64 random_;
  std::shared_ptr<const KeyParts> parts_;
  ChosenKeys chosen_;
  std::vector<float> weights_;  ///< (unread, group)
  std::vector<int64_t> read_;
};

}  // namespace kvseek::index

#endif  // KVSEEK_TESTS_INDEX_CHOSEN_SUBJECT_H_
