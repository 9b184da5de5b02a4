#include "index/chosen_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cli/evaluation.h"
#include "tests/index/double_attention.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Sizes {
  int64_t covered = 2048;
  int parts = 60;
  int64_t begin = 0;
  int64_t end = 3000;
  double share = 0.3;  ///< of the parts, chosen
};

/// A trace, random parts of its first `covered` keys, and a random choice among them.
class Subject {
 public:
  Subject(const TraceShape& shape, const Sizes& sizes)
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
    return plan->Finish(scratch);
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
        reach_.push_back(PartReach(static_cast<float>(mean), static_cast<float>(variance),
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
        chosen_.reach.push_back(reach_[i * static_cast<size_t>(trace_.group) + h]);
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
  Sizes sizes_;
  std::mt19937_64 random_;
  std::shared_ptr<const KeyParts> parts_;
  ChosenKeys chosen_;
  std::vector<float> weights_, reach_;  ///< (unread, group)
  std::vector<int64_t> read_;
};

void ExpectState(const Subject& subject, const SearchResult& result, int head,
                 const DoubleState& truth) {
  const int dim = subject.trace().value_dim;
  const std::vector<double> out = truth.Out();
  EXPECT_LE(
      cli::OutputError(result.out.data() + static_cast<ptrdiff_t>(head) * dim, out.data(), dim),
      5e-5)
      << "head " << head;
  if (truth.Mass() > 0.0) {
    EXPECT_NEAR(result.lse[static_cast<size_t>(head)], truth.Lse(), 5e-5) << "head " << head;
  } else {
    EXPECT_EQ(result.lse[static_cast<size_t>(head)], -kInfinity);
  }
}

std::vector<Subject> Subjects() {
  std::vector<Subject> subjects;
  subjects.emplace_back(TraceShape{.group = 6, .seed = 11}, Sizes{});
  subjects.emplace_back(TraceShape{.tokens = 2048, .key_dim = 80, .value_dim = 24, .group = 1},
                        Sizes{.end = 2048, .share = 0.9});
  subjects.emplace_back(
      TraceShape{.tokens = 3100, .group = 7, .dtype = kernels::DType::kFp16, .seed = 12},
      Sizes{.parts = 300, .begin = 700, .end = 1900});
  subjects.emplace_back(TraceShape{.tokens = 12000, .group = 2, .seed = 13},
                        Sizes{.begin = 2047, .end = 11999});
  subjects.emplace_back(TraceShape{.seed = 14}, Sizes{.share = 0.0});  // nothing chosen
  subjects.emplace_back(TraceShape{.seed = 15}, Sizes{.end = 1500, .share = 0.0});
  subjects.emplace_back(TraceShape{.seed = 16}, Sizes{.share = 2.0});  // nothing left
  subjects.emplace_back(TraceShape{.seed = 17}, Sizes{.covered = 0, .begin = 5, .end = 2900});
  subjects.emplace_back(TraceShape{.seed = 18}, Sizes{.begin = 9, .end = 9});
  return subjects;
}

TEST(ChosenPlanTest, AttendIsWhatIsReadAndTheEstimatedRest) {
  for (const Subject& subject : Subjects()) {
    for (const bool rest : {true, false}) {
      const SearchResult result = subject.Search({.list_read = true, .estimate_rest = rest});
      EXPECT_EQ(result.positions, subject.read());
      EXPECT_EQ(result.report.keys_exact, static_cast<int64_t>(subject.read().size()));
      for (int h = 0; h < subject.trace().group; ++h) {
        const auto all = [](int64_t) { return true; };
        ExpectState(subject, result, h, subject.State(h, all, rest));
        // The report tells of the rest whether or not it is in the answer.
        const double read = subject.State(h, all, false).Mass();
        const double with_rest = subject.State(h, all, true).Mass();
        const double missed = with_rest > 0.0 ? 1.0 - read / with_rest : 0.0;
        const auto at = static_cast<size_t>(h);
        EXPECT_NEAR(result.report.missed_mass[at], missed, 1e-5);
        EXPECT_EQ(result.report.missed_low[at], result.report.missed_mass[at]);
        EXPECT_EQ(result.report.missed_high[at], result.report.missed_mass[at]);
      }
    }
  }
}

TEST(ChosenPlanTest, TopKReturnsTheBestOfThoseReadAndTheStateOfAllOthers) {
  for (const Subject& subject : Subjects()) {
    const int group = subject.trace().group;
    std::vector<double> lse;
    const auto all = [](int64_t) { return true; };
    for (int h = 0; h < group; ++h) lse.push_back(subject.State(h, all, true).Lse());
    const auto best_weight = [&](int64_t position) {
      double best = -kInfinity;
      for (int h = 0; h < group; ++h) {
        best =
            std::max(best, ScoreOf(subject.trace(), 0, h, position) - lse[static_cast<size_t>(h)]);
      }
      return best;
    };
    for (const int k : {0, 1, 100, 100000}) {
      const SearchResult result = subject.Search({.k = k});
      ASSERT_EQ(result.positions.size(), std::min<size_t>(k, subject.read().size()));
      ASSERT_TRUE(std::is_sorted(result.positions.begin(), result.positions.end()));
      const auto returned = [&](int64_t position) {
        return std::binary_search(result.positions.begin(), result.positions.end(), position);
      };
      double least_returned = kInfinity;
      double best_left = -kInfinity;
      for (const int64_t position : subject.read()) {
        double& bound = returned(position) ? least_returned : best_left;
        bound = returned(position) ? std::min(bound, best_weight(position))
                                   : std::max(bound, best_weight(position));
      }
      EXPECT_LE(best_left, least_returned + 1e-4);
      const auto left = [&](int64_t position) { return !returned(position); };
      for (int h = 0; h < group; ++h) {
        const DoubleState others = subject.State(h, left, true);
        ExpectState(subject, result, h, others);
        const double total = std::exp(lse[static_cast<size_t>(h)]);
        EXPECT_NEAR(result.report.missed_mass[static_cast<size_t>(h)],
                    total > 0.0 ? others.Mass() / total : 0.0, 1e-5);
      }
    }
  }
}

/// Share of audits whose interval has the truth in it, and their mean ratio to it.
std::pair<double, double> AuditCover(const Sizes& sizes) {
  int covered = 0;
  int trials = 0;
  double ratio = 0.0;
  for (uint64_t seed = 100; seed < 160; ++seed) {
    const Subject subject({.tokens = 2500, .group = 4, .seed = seed}, sizes);
    const SearchResult result = subject.Search({.audit_samples = 64, .seed = seed});
    for (int h = 0; h < 4; ++h, ++trials) {
      const double truth = subject.MissedMass(h);
      const auto at = static_cast<size_t>(h);
      covered += result.report.missed_low[at] <= truth && truth <= result.report.missed_high[at];
      ratio += result.report.missed_mass[at] / truth;
    }
  }
  return {static_cast<double>(covered) / trials, ratio / trials};
}

TEST(ChosenPlanTest, AuditCoversTheTruthAtTheNominalRate) {
  const auto [cover, ratio] = AuditCover({.begin = 300, .end = 2500, .share = 0.2});
  EXPECT_GE(cover, 0.9);
  EXPECT_NEAR(ratio, 1.0, 0.05);
}

TEST(ChosenPlanTest, AuditFindsASinkThatAPartHides) {
  // The sink is the first key; it has most of the mass of some heads.
  const auto [cover, ratio] = AuditCover({.parts = 200, .end = 2500, .share = 0.01});
  EXPECT_GE(cover, 0.9);
  EXPECT_NEAR(ratio, 1.0, 0.05);
}

TEST(ChosenPlanTest, PartWeightIsTheLogOfTheSumOfNormalScores) {
  EXPECT_NEAR(PartWeight(-2.5F, 0.0F, 1), -2.5F, 1e-6);
  EXPECT_NEAR(PartWeight(1.0F, 0.0F, 16), 1.0 + std::log(16.0), 1e-6);
  std::mt19937_64 random(1);
  std::normal_distribution<> normal(0.7, 1.2);
  double sum = 0.0;
  for (int i = 0; i < 1 << 16; ++i) sum += std::exp(normal(random));
  EXPECT_NEAR(PartWeight(0.7F, 1.44F, 1 << 16), std::log(sum), 0.03);
  // A wide part's tail is not believed in.
  EXPECT_EQ(PartWeight(0.0F, 400.0F, 16), PartWeight(0.0F, 1e9F, 16));
}

}  // namespace
}  // namespace kvseek::index
