// MergeStates as an algebra, against a naive reference in double precision.
#include <memory>
#include <string>

#include "kernels/cuda/attention.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace kvseek::kernels::cuda {
namespace {

class MergeStatesTest : public CudaTest {
 protected:
  // `count` states of `heads` heads. lse in +-`spread`; one state in five is empty, with NaN as its
  // output.
  States MakeStates(int count, int heads, int value_dim, float spread) {
    States states;
    for (int i = 0; i < count * heads; ++i) {
      const bool is_empty = Below(5) == 0;
      states.lse.push_back(
          is_empty ? -kInfinity : std::uniform_real_distribution<float>(-spread, spread)(random_));
      for (int d = 0; d < value_dim; ++d) {
        const float value = Normal() * (Below(50) == 0 ? 100.0F : 1.0F);
        states.out.push_back(is_empty ? std::numeric_limits<float>::quiet_NaN() : value);
      }
    }
    return states;
  }

  // Merges lists of states of equal shape; `value_dim` elements.
  States Merge(const std::vector<States>& lists, int heads, int value_dim,
               Place place = Place::kDevice) {
    std::vector<std::unique_ptr<DeviceArray<float>>> memory;
    std::vector<StateList> arguments;
    for (const States& states : lists) {
      memory.push_back(std::make_unique<DeviceArray<float>>(states.out, place));
      memory.push_back(std::make_unique<DeviceArray<float>>(states.lse, place));
      arguments.push_back({memory[memory.size() - 2]->get(), memory.back()->get(),
                           static_cast<int>(states.lse.size()) / heads});
    }
    const DeviceArray<float> out(static_cast<size_t>(heads) * value_dim);
    const DeviceArray<float> lse(heads);
    EXPECT_CUDA(MergeStates(arguments.data(), static_cast<int>(arguments.size()), heads, value_dim,
                            out.get(), DType::kFp32, lse.get(), stream_));
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
    return {out.Download(), lse.Download()};
  }

  static States Concat(const std::vector<States>& lists) {
    States all;
    for (const States& states : lists) {
      all.out.insert(all.out.end(), states.out.begin(), states.out.end());
      all.lse.insert(all.lse.end(), states.lse.begin(), states.lse.end());
    }
    return all;
  }

  static Expected Reference(const States& states, int heads, int value_dim) {
    const size_t count = states.lse.size() / heads;
    Expected expected{std::vector<double>(static_cast<size_t>(heads) * value_dim, 0.0),
                      std::vector<double>(heads, -kInfinity)};
    for (int head = 0; head < heads; ++head) {
      double max = -kInfinity;
      for (size_t i = 0; i < count; ++i) max = std::max<double>(max, states.lse[i * heads + head]);
      if (std::isinf(max)) continue;
      double sum = 0.0;
      for (size_t i = 0; i < count; ++i) sum += std::exp(states.lse[i * heads + head] - max);
      expected.lse[head] = max + std::log(sum);
      for (size_t i = 0; i < count; ++i) {
        const size_t state = i * heads + head;
        if (std::isinf(states.lse[state])) continue;
        const double weight = std::exp(states.lse[state] - expected.lse[head]);
        for (int d = 0; d < value_dim; ++d) {
          expected.out[head * value_dim + d] += weight * states.out[state * value_dim + d];
        }
      }
    }
    return expected;
  }

  void Check(const std::vector<States>& lists, int heads, int value_dim,
             Place place = Place::kDevice) {
    ExpectNear(Merge(lists, heads, value_dim, place), Reference(Concat(lists), heads, value_dim));
  }
};

TEST_F(MergeStatesTest, AgreesWithTheReference) {
  for (const int value_dim : {8, 64, 80, 128, 136, 256, 520, 4000}) {
    for (const int count : {1, 2, 3, 4, 5, 31}) {
      for (const int heads : {1, 3, 97}) {
        if (value_dim * count * heads > 1000000) continue;
        SCOPED_TRACE(std::to_string(count) + " states, " + std::to_string(heads) + " heads, " +
                     std::to_string(value_dim) + " elements");
        Check({MakeStates(count, heads, value_dim, 3.0F)}, heads, value_dim);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(MergeStatesTest, SeveralLists) {
  constexpr int kHeads = 33;
  constexpr int kDim = 96;
  for (const Place place : {Place::kDevice, Place::kPinnedHost}) {
    std::vector<States> lists;
    for (const int count : {1, 0, 6, 2}) {
      lists.push_back(MakeStates(count, kHeads, kDim, 5.0F));
      Check(lists, kHeads, kDim, place);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(MergeStatesTest, LseFarApart) { Check({MakeStates(6, 40, 128, 1e4F)}, 40, 128); }

TEST_F(MergeStatesTest, IsAssociative) {
  constexpr int kHeads = 24;
  constexpr int kDim = 128;
  const States a = MakeStates(1, kHeads, kDim, 4.0F);
  const States b = MakeStates(1, kHeads, kDim, 4.0F);
  const States c = MakeStates(1, kHeads, kDim, 4.0F);
  const Expected expected = Reference(Concat({a, b, c}), kHeads, kDim);
  ExpectNear(Merge({a, b, c}, kHeads, kDim), expected);
  ExpectNear(Merge({Merge({a, b}, kHeads, kDim), c}, kHeads, kDim), expected);
  ExpectNear(Merge({a, Merge({c, b}, kHeads, kDim)}, kHeads, kDim), expected);
}

TEST_F(MergeStatesTest, NothingMergesToTheEmptyState) {
  const States none = Merge({}, 8, 64);
  EXPECT_EQ(none.out, std::vector<float>(8 * 64, 0.0F));
  EXPECT_EQ(none.lse, std::vector<float>(8, -kInfinity));
}

TEST_F(MergeStatesTest, MergesInPlace) {
  for (const int value_dim : {96, 2048}) {
    const States states = MakeStates(4, 10, value_dim, 3.0F);
    const DeviceArray<float> outs(states.out);
    const DeviceArray<float> lses(states.lse);
    const StateList list{outs.get(), lses.get(), 4};
    EXPECT_CUDA(MergeStates(&list, 1, 10, value_dim, outs.get() + 10 * value_dim, DType::kFp32,
                            lses.get() + 10, stream_));
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
    const std::vector<float> out = outs.Download();
    const std::vector<float> lse = lses.Download();
    ExpectNear({{out.begin() + 10 * value_dim, out.begin() + 20 * value_dim},
                {lse.begin() + 10, lse.begin() + 20}},
               Reference(states, 10, value_dim));
  }
}

TEST_F(MergeStatesTest, HalfPrecisionOut) {
  constexpr int kHeads = 50;
  constexpr int kDim = 128;
  const States states = MakeStates(3, kHeads, kDim, 3.0F);
  const DeviceArray<float> outs(states.out);
  const DeviceArray<float> lses(states.lse);
  const StateList list{outs.get(), lses.get(), 3};
  Expected expected = Reference(states, kHeads, kDim);
  for (const auto& [dtype, tolerance] : {std::pair(DType::kBf16, 1e-2), {DType::kFp16, 2e-3}}) {
    const DeviceArray<uint16_t> out(kHeads * kDim);
    EXPECT_CUDA(MergeStates(&list, 1, kHeads, kDim, out.get(), dtype, nullptr, stream_));
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
    const std::vector<uint16_t> halves = out.Download();
    States actual{{}, std::vector<float>(expected.lse.begin(), expected.lse.end())};
    for (size_t i = 0; i < halves.size(); ++i) {
      actual.out.push_back(LoadElement(halves.data(), dtype, i));
    }
    ExpectNear(actual, expected, tolerance);
  }
}

// Needs no GPU.
TEST(MergeStatesArgumentsTest, Refused) {
  alignas(16) float memory[8] = {};
  const auto refused = cudaErrorInvalidValue;
  const StateList good{memory, memory, 1};
  const auto merge = [&](const StateList& list, int lists, int heads, int value_dim, void* out,
                         DType dtype = DType::kFp32) {
    return MergeStates(&list, lists, heads, value_dim, out, dtype, memory, nullptr);
  };
  EXPECT_EQ(merge(good, -1, 1, 64, memory), refused);
  EXPECT_EQ(merge(good, kMaxStateLists + 1, 1, 64, memory), refused);
  EXPECT_EQ(merge({memory, memory, -1}, 1, 1, 64, memory), refused);
  EXPECT_EQ(merge(good, 1, -1, 64, memory), refused);
  EXPECT_EQ(merge(good, 1, 1, 0, memory), refused);
  EXPECT_EQ(merge(good, 1, 1, 68, memory), refused);
  EXPECT_EQ(merge(good, 1, 1, kMaxValueDim + 8, memory), refused);
  EXPECT_EQ(merge({nullptr, memory, 1}, 1, 1, 64, memory), refused);
  EXPECT_EQ(merge({memory + 1, memory, 1}, 1, 1, 64, memory), refused);
  EXPECT_EQ(merge({memory, nullptr, 1}, 1, 1, 64, memory), refused);
  EXPECT_EQ(merge(good, 1, 1, 64, nullptr), refused);
  EXPECT_EQ(merge(good, 1, 1, 64, memory + 1), refused);
  EXPECT_EQ(merge(good, 1, 1, 64, memory, static_cast<DType>(9)), refused);
  EXPECT_EQ(MergeStates(nullptr, 1, 1, 64, memory, DType::kFp32, memory, nullptr), refused);
  EXPECT_EQ(merge({nullptr, nullptr, 0}, 1, 0, 64, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
