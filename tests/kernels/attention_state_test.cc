#include "kernels/attention_state.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/reference.h"

namespace kvseek::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kGroup = 3;
constexpr int kValueDim = 24;
constexpr double kTolerance = 1e-5;

/// Tokens of a group, and their attention in each of its forms.
struct Part {
  Part(uint32_t seed, int count, float shift, float deviation = 2.0F) : tokens(count) {
    values =
        reference::RandomElements(seed, static_cast<size_t>(count * kValueDim), 1.0F, DType::kBf16);
    for (const float s :
         reference::RandomFloats(seed + 100, static_cast<size_t>(kGroup * count), deviation)) {
      scores.push_back(static_cast<double>(s + shift));
    }
  }

  int tokens;
  std::vector<uint16_t> values;
  std::vector<double> scores;  // (kGroup, tokens)
};

struct State {
  State() : storage(static_cast<size_t>(GroupStateFloats(kGroup, kValueDim)), NAN) {
    ResetState(View());
  }
  explicit State(const Part& part) : State() {
    const GroupState view = View();
    for (size_t h = 0; h < kGroup; ++h) {
      const double* scores = part.scores.data() + h * static_cast<size_t>(part.tokens);
      for (int t = 0; t < part.tokens; ++t) {
        view.max[h] = std::max(view.max[h], static_cast<float>(scores[t]));
      }
      for (int t = 0; t < part.tokens; ++t) {
        const double weight = std::exp(scores[t] - static_cast<double>(view.max[h]));
        view.sum[h] += static_cast<float>(weight);
        for (int i = 0; i < kValueDim; ++i) {
          const float value = Bf16ToFloat(part.values[static_cast<size_t>(t * kValueDim + i)]);
          view.acc[h * kValueDim + static_cast<size_t>(i)] += static_cast<float>(weight) * value;
        }
      }
    }
  }
  GroupState View() { return BindState(storage.data(), kGroup, kValueDim); }

  std::vector<float> storage;
};

State Merged(State a, State b) {
  MergeState(a.View(), b.View());
  return a;
}

/// (o, lse).
struct Finished {
  explicit Finished(State state) : out(kGroup * kValueDim, NAN), lse(kGroup, NAN) {
    FinishState(state.View(), out.data(), lse.data());
  }
  std::vector<float> out;
  std::vector<float> lse;
};

Finished Merged(Finished a, const Finished& b) {
  MergeFinished(a.out.data(), a.lse.data(), b.out.data(), b.lse.data(), kGroup, kValueDim);
  return a;
}

/// Attention over all the parts' tokens at once, in double precision.
reference::Attention Expected(const std::vector<const Part*>& parts) {
  int tokens = 0;
  std::vector<uint16_t> values;
  for (const Part* part : parts) {
    tokens += part->tokens;
    values.insert(values.end(), part->values.begin(), part->values.end());
  }
  std::vector<double> scores;
  for (size_t h = 0; h < kGroup; ++h) {
    for (const Part* part : parts) {
      const auto begin = part->scores.begin() + static_cast<long>(h) * part->tokens;
      scores.insert(scores.end(), begin, begin + part->tokens);
    }
  }
  return reference::Attend(scores, kGroup, values.data(), DType::kBf16, tokens, kValueDim);
}

void ExpectClose(const reference::Attention& expected, const Finished& actual) {
  double largest = 1;
  for (const double lse : expected.lse) {
    if (std::isfinite(lse)) largest = std::max(largest, std::fabs(lse));
  }
  const auto error = reference::Compare(expected, actual.out.data(), actual.lse.data());
  EXPECT_LE(error.out, kTolerance);
  EXPECT_LE(error.lse, kTolerance + 1.2e-7 * largest);  // half an fp32 step of lse itself
}

/// Parts of ordinary, very low and very high scores, and one huge logit.
class MergeTest : public ::testing::TestWithParam<float> {
 protected:
  const Part a_{1, 50, 0.0F};
  const Part b_{2, 30, GetParam()};
  const Part c_{3, 1, 1.0F};
};

TEST_P(MergeTest, EqualsAttentionOverAll) {
  const reference::Attention expected = Expected({&a_, &b_, &c_});
  ExpectClose(expected, Finished(Merged(Merged(State(a_), State(b_)), State(c_))));
  ExpectClose(expected,
              Merged(Merged(Finished(State(a_)), Finished(State(b_))), Finished(State(c_))));
}

TEST_P(MergeTest, IsAssociative) {
  const reference::Attention expected = Expected({&a_, &b_, &c_});
  ExpectClose(expected, Finished(Merged(State(a_), Merged(State(b_), State(c_)))));
  ExpectClose(expected,
              Merged(Finished(State(a_)), Merged(Finished(State(b_)), Finished(State(c_)))));
}

TEST_P(MergeTest, IsCommutative) {
  const reference::Attention expected = Expected({&a_, &b_});
  ExpectClose(expected, Finished(Merged(State(b_), State(a_))));
  ExpectClose(expected, Merged(Finished(State(b_)), Finished(State(a_))));
}

TEST_P(MergeTest, HasTheEmptyPartAsNeutralElement) {
  EXPECT_EQ(Merged(State(b_), State()).storage, State(b_).storage);
  EXPECT_EQ(Merged(State(), State(b_)).storage, State(b_).storage);
  const Finished b{State(b_)};
  const Finished empty{State()};
  for (const Finished& merged : {Merged(b, empty), Merged(empty, b)}) {
    EXPECT_EQ(merged.out, b.out);
    EXPECT_EQ(merged.lse, b.lse);
  }
}

INSTANTIATE_TEST_SUITE_P(Shifts, MergeTest, ::testing::Values(0.0F, -1e4F, 1e4F, 3e4F, -40.0F));

TEST(AttentionState, ResetIsEmpty) {
  State state;
  const GroupState view = state.View();
  EXPECT_THAT(std::vector<float>(view.max, view.max + kGroup), ::testing::Each(-kInfinity));
  EXPECT_THAT(std::vector<float>(view.sum, view.sum + kGroup), ::testing::Each(0.0F));
  EXPECT_THAT(std::vector<float>(view.acc, view.acc + kGroup * kValueDim), ::testing::Each(0.0F));
}

TEST(AttentionState, EmptyMergedWithEmptyStaysEmpty) {
  const Finished from_states{Merged(State(), State())};
  const Finished from_finished = Merged(Finished(State()), Finished(State()));
  for (const Finished& empty : {from_states, from_finished}) {
    EXPECT_THAT(empty.out, ::testing::Each(0.0F));
    EXPECT_THAT(empty.lse, ::testing::Each(-kInfinity));
  }
}

TEST(AttentionState, ReferenceAboveAllScoresChangesNothing) {
  const Part part(5, 20, 0.0F);
  State raised(part);
  const GroupState view = raised.View();
  for (int h = 0; h < kGroup; ++h) {
    const float lift = 9.0F;
    view.max[h] += lift;
    view.sum[h] *= std::exp(-lift);
    for (int i = 0; i < kValueDim; ++i) view.acc[h * kValueDim + i] *= std::exp(-lift);
  }
  ExpectClose(Expected({&part}), Finished(raised));
  const Part other(6, 20, 3.0F);
  ExpectClose(Expected({&part, &other}), Finished(Merged(raised, State(other))));
}

TEST(AttentionState, FinitelyReferencedButEmptyIsEmpty) {
  // A caller may know a bound of the scores before any row is added.
  State state;
  std::fill_n(state.View().max, kGroup, 5.0F);
  EXPECT_THAT(Finished(state).lse, ::testing::Each(-kInfinity));
  EXPECT_THAT(Finished(state).out, ::testing::Each(0.0F));
  const Part part(7, 10, 0.0F);
  ExpectClose(Expected({&part}), Finished(Merged(state, State(part))));
}

TEST(AttentionState, HeadsAreIndependent) {
  // Head 1 of one part is empty, head 2 of the other.
  const Part part(8, 10, 0.0F);
  State a(part);
  State b(part);
  const auto clear = [](State& state, int head) {
    state.View().max[head] = -kInfinity;
    state.View().sum[head] = 0;
    std::fill_n(state.View().acc + head * kValueDim, kValueDim, 0.0F);
  };
  clear(a, 1);
  clear(b, 2);
  const Finished whole{State(part)};
  const Finished merged{Merged(a, b)};
  EXPECT_NEAR(merged.lse[0], whole.lse[0] + std::log(2.0F), kTolerance);
  EXPECT_EQ(merged.lse[1], whole.lse[1]);
  EXPECT_EQ(merged.lse[2], whole.lse[2]);
}

}  // namespace
}  // namespace kvseek::kernels
