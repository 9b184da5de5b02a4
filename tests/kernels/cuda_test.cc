// The GPU kernels against naive references in double precision. Needs a GPU, but for the checks of
// arguments. KVSEEK_TEST_SEED repeats a run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"

namespace kvseek::kernels::cuda {
namespace {

constexpr double kTolerance = 1e-3;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

#define EXPECT_CUDA(call) EXPECT_STREQ(cudaGetErrorName(call), "cudaSuccess") << #call
#define ASSERT_CUDA(call) ASSERT_STREQ(cudaGetErrorName(call), "cudaSuccess") << #call

// An array in device memory; its bytes are 0xff, which is NaN in every float type, until something
// is written.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : bytes_(count * sizeof(T)) {
    EXPECT_CUDA(cudaMalloc(&data_, std::max<size_t>(bytes_, 16)));
    EXPECT_CUDA(cudaMemset(data_, 0xff, bytes_));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    EXPECT_CUDA(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { EXPECT_CUDA(cudaFree(data_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> Download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    EXPECT_CUDA(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

struct States {
  std::vector<float> out;  // (heads, value_dim)
  std::vector<float> lse;  // (heads)
};

// Compares head by head: elements relative to the head's largest, lse relative to the larger of
// itself and 1.
void ExpectNear(const States& actual, const std::vector<double>& out,
                const std::vector<double>& lse) {
  ASSERT_EQ(actual.out.size(), out.size());
  ASSERT_EQ(actual.lse.size(), lse.size());
  const size_t value_dim = lse.empty() ? 0 : out.size() / lse.size();
  for (size_t head = 0; head < lse.size(); ++head) {
    if (std::isinf(lse[head])) {
      ASSERT_EQ(actual.lse[head], -kInfinity) << "head " << head;
    } else {
      ASSERT_LE(std::abs(actual.lse[head] - lse[head]),
                kTolerance * std::max(1.0, std::abs(lse[head])))
          << "head " << head << ": " << actual.lse[head] << " for " << lse[head];
    }
    double largest = 0.0;
    for (size_t d = 0; d < value_dim; ++d)
      largest = std::max(largest, std::abs(out[head * value_dim + d]));
    for (size_t d = 0; d < value_dim; ++d) {
      const size_t i = head * value_dim + d;
      ASSERT_LE(std::abs(actual.out[i] - out[i]), kTolerance * largest)  // also fails for a NaN
          << "head " << head << " element " << d << ": " << actual.out[i] << " for " << out[i];
    }
  }
}

uint64_t Seed() {
  const char* given = std::getenv("KVSEEK_TEST_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
}

// What the tests that need a GPU share: a stream, and random numbers that are new in each run.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
    }
    ASSERT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_ == nullptr) return;
    EXPECT_CUDA(cudaGetLastError());
    EXPECT_CUDA(cudaStreamDestroy(stream_));
    if (HasFailure()) ADD_FAILURE() << "KVSEEK_TEST_SEED=" << seed_ << " repeats this";
  }

  float Normal() { return std::normal_distribution<float>()(random_); }
  int Below(int bound) { return std::uniform_int_distribution<int>(0, bound - 1)(random_); }

  const uint64_t seed_ = Seed();
  std::mt19937_64 random_{seed_};
  cudaStream_t stream_ = nullptr;
};

uint16_t ToHalf(float value, DType dtype) {
  return dtype == DType::kBf16 ? FloatToBf16(value) : FloatToFp16(value);
}

// ---- AttendGatheredRows -------------------------------------------------------------------------

// One problem on the host. Rows past each count are NaN, so that reading one shows.
struct Problem {
  GatheredRows rows;  // without pointers
  std::vector<uint8_t> queries;
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;
  std::vector<int32_t> counts;

  size_t Heads() const { return static_cast<size_t>(rows.groups) * rows.group; }
};

class GatheredAttentionTest : public CudaTest {
 protected:
  // Normal numbers with outliers: some keys are long, some value elements large, and every group
  // has one key that is nearly a query and wins by far.
  Problem MakeProblem(const GatheredRows& rows, std::vector<int32_t> counts) {
    Problem problem{rows, {}, {}, {}, std::move(counts)};
    problem.rows.groups = static_cast<int>(problem.counts.size());
    problem.rows.softmax_scale = 1.0F / std::sqrt(static_cast<float>(rows.key_dim));
    const size_t query_count = problem.Heads() * rows.key_dim;
    std::vector<float> queries(query_count);
    for (float& query : queries) query = Normal() * (Below(50) == 0 ? 6.0F : 1.0F);
    problem.queries.resize(query_count * DTypeBytes(rows.query_dtype));
    for (size_t i = 0; i < query_count; ++i) {
      if (rows.query_dtype == DType::kFp32) {
        std::memcpy(problem.queries.data() + 4 * i, &queries[i], 4);
      } else {
        const uint16_t half = ToHalf(queries[i], rows.query_dtype);
        std::memcpy(problem.queries.data() + 2 * i, &half, 2);
      }
    }
    const size_t row_count = problem.counts.size() * rows.rows_max;
    problem.keys.assign(row_count * rows.key_dim, 0x7fff);
    problem.values.assign(row_count * rows.value_dim, 0x7fff);
    for (size_t group = 0; group < problem.counts.size(); ++group) {
      const int count = std::clamp(problem.counts[group], 0, rows.rows_max);
      const int winner = count > 0 ? Below(count) : -1;
      for (int row = 0; row < count; ++row) {
        const size_t index = group * rows.rows_max + row;
        const float length = Below(40) == 0 ? 5.0F : 1.0F;
        for (int d = 0; d < rows.key_dim; ++d) {
          const float key = row == winner ? 2.0F * queries[group * rows.group * rows.key_dim + d]
                                          : length * Normal();
          problem.keys[index * rows.key_dim + d] = ToHalf(key, rows.row_dtype);
        }
        for (int d = 0; d < rows.value_dim; ++d) {
          const float value = Normal() * (Below(100) == 0 ? 30.0F : 1.0F);
          problem.values[index * rows.value_dim + d] = ToHalf(value, rows.row_dtype);
        }
      }
    }
    return problem;
  }

  // Runs the kernel on poisoned outputs. With splits the parts are merged on the GPU too.
  States Run(const Problem& problem) {
    const DeviceArray<uint8_t> queries(problem.queries);
    const DeviceArray<uint16_t> keys(problem.keys);
    const DeviceArray<uint16_t> values(problem.values);
    const DeviceArray<int32_t> counts(problem.counts);
    GatheredRows rows = problem.rows;
    rows.queries = queries.get();
    rows.keys = keys.get();
    rows.values = values.get();
    rows.row_counts = counts.get();
    const size_t heads = problem.Heads();
    const DeviceArray<float> outs(rows.splits * heads * rows.value_dim);
    const DeviceArray<float> lses(rows.splits * heads);
    EXPECT_CUDA(AttendGatheredRows(rows, outs.get(), lses.get(), stream_));
    if (rows.splits == 1) {
      EXPECT_CUDA(cudaStreamSynchronize(stream_));
      return {outs.Download(), lses.Download()};
    }
    const DeviceArray<float> out(heads * rows.value_dim);
    const DeviceArray<float> lse(heads);
    EXPECT_CUDA(MergeStates(outs.get(), lses.get(), rows.splits, static_cast<int>(heads),
                            rows.value_dim, out.get(), lse.get(), stream_));
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
    return {out.Download(), lse.Download()};
  }

  // Computes in double precision, and compares.
  void Check(const Problem& problem) {
    const GatheredRows& rows = problem.rows;
    std::vector<double> out(problem.Heads() * rows.value_dim, 0.0);
    std::vector<double> lse(problem.Heads(), -kInfinity);
    for (size_t head = 0; head < problem.Heads(); ++head) {
      const size_t group = head / rows.group;
      const int count = std::clamp(problem.counts[group], 0, rows.rows_max);
      if (count == 0) continue;
      std::vector<double> scores(count, 0.0);
      for (int row = 0; row < count; ++row) {
        for (int d = 0; d < rows.key_dim; ++d) {
          const double query =
              LoadElement(problem.queries.data(), rows.query_dtype, head * rows.key_dim + d);
          const size_t key = (group * rows.rows_max + row) * rows.key_dim + d;
          scores[row] += query * LoadElement(problem.keys.data(), rows.row_dtype, key);
        }
        scores[row] *= rows.softmax_scale;
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0.0;
      for (const double score : scores) sum += std::exp(score - max);
      lse[head] = max + std::log(sum);
      for (int row = 0; row < count; ++row) {
        const double weight = std::exp(scores[row] - lse[head]);
        for (int d = 0; d < rows.value_dim; ++d) {
          const size_t value = (group * rows.rows_max + row) * rows.value_dim + d;
          out[head * rows.value_dim + d] +=
              weight * LoadElement(problem.values.data(), rows.row_dtype, value);
        }
      }
    }
    ExpectNear(Run(problem), out, lse);
  }

  static GatheredRows Shape(int group, int rows_max, int key_dim, int value_dim, DType row_dtype,
                            DType query_dtype = DType::kFp32, int splits = 1) {
    GatheredRows rows;
    rows.group = group;
    rows.rows_max = rows_max;
    rows.key_dim = key_dim;
    rows.value_dim = value_dim;
    rows.row_dtype = row_dtype;
    rows.query_dtype = query_dtype;
    rows.splits = splits;
    return rows;
  }
};

class GatheredAttentionShapeTest : public GatheredAttentionTest,
                                   public testing::WithParamInterface<int> {};

TEST_P(GatheredAttentionShapeTest, AgreesWithTheReference) {
  const int dim = GetParam();
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const int group : {1, 3, 6, 7, 16}) {
      SCOPED_TRACE(std::string(DTypeName(dtype)) + " group " + std::to_string(group));
      const DType query_dtype = group % 2 == 1 ? DType::kFp32 : dtype;
      Check(MakeProblem(Shape(group, 333, dim, dim, dtype, query_dtype),
                        {333, 0, 1, 2 + Below(300), 64, 331}));
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, GatheredAttentionShapeTest,
                         testing::Values(8, 64, 80, 96, 128, 256));

TEST_F(GatheredAttentionTest, KeysAndValuesMayDifferInWidth) {
  for (const auto& [key_dim, value_dim] : {std::pair(192, 128), {128, 192}, {64, 256}, {72, 8}}) {
    SCOPED_TRACE(std::to_string(key_dim) + " x " + std::to_string(value_dim));
    Check(MakeProblem(Shape(5, 201, key_dim, value_dim, DType::kBf16), {201, 77, 0}));
    if (HasFatalFailure()) return;
  }
}

TEST_F(GatheredAttentionTest, QueriesOfAnyType) {
  for (const DType query_dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    SCOPED_TRACE(DTypeName(query_dtype));
    Check(MakeProblem(Shape(kMaxGroup, 50, 128, 128, DType::kFp16, query_dtype), {50, 13}));
    if (HasFatalFailure()) return;
  }
}

TEST_F(GatheredAttentionTest, SplitsMergeToTheWhole) {
  for (const int splits : {2, 7, 40}) {
    SCOPED_TRACE(splits);
    Check(MakeProblem(Shape(4, 1025, 128, 128, DType::kBf16, DType::kFp32, splits),
                      {1025, 1, 0, 39, 500}));
    if (HasFatalFailure()) return;
  }
}

TEST_F(GatheredAttentionTest, CountsAreClamped) {
  Check(MakeProblem(Shape(2, 20, 64, 64, DType::kBf16),
                    {-5, 1000, std::numeric_limits<int32_t>::max(), 20}));
  Check(MakeProblem(Shape(2, 0, 64, 64, DType::kBf16), {3, 0}));
}

TEST_F(GatheredAttentionTest, OneHugeScoreTakesAll) {
  Problem problem = MakeProblem(Shape(3, 100, 64, 64, DType::kBf16), {100});
  problem.rows.softmax_scale = 200.0F;
  Check(problem);
}

TEST_F(GatheredAttentionTest, CanBeCapturedInAGraph) {
  const DeviceArray<uint16_t> rows_data(std::vector<uint16_t>(16 * 64, FloatToBf16(1.0F)));
  const DeviceArray<float> queries(std::vector<float>(64, 0.5F));
  const DeviceArray<int32_t> counts(std::vector<int32_t>{16});
  const DeviceArray<float> out(64);
  const DeviceArray<float> lse(1);
  GatheredRows rows = Shape(1, 16, 64, 64, DType::kBf16);
  rows.groups = 1;
  rows.softmax_scale = 0.125F;
  rows.queries = queries.get();
  rows.keys = rows_data.get();
  rows.values = rows_data.get();
  rows.row_counts = counts.get();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  EXPECT_CUDA(AttendGatheredRows(rows, out.get(), lse.get(), stream_));
  EXPECT_CUDA(MergeStates(out.get(), lse.get(), 1, 1, 64, out.get(), lse.get(), stream_));
  ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  ASSERT_CUDA(cudaGraphLaunch(executable, stream_));
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  ExpectNear({out.Download(), lse.Download()}, std::vector<double>(64, 1.0),
             {4.0 + std::log(16.0)});
  EXPECT_CUDA(cudaGraphExecDestroy(executable));
  EXPECT_CUDA(cudaGraphDestroy(graph));
}

// ---- MergeStates --------------------------------------------------------------------------------

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

  States Merge(const States& states, int heads) {
    const int count = static_cast<int>(states.lse.size()) / heads;
    const int value_dim = static_cast<int>(states.out.size() / states.lse.size());
    const DeviceArray<float> outs(states.out);
    const DeviceArray<float> lses(states.lse);
    const DeviceArray<float> out(static_cast<size_t>(heads) * value_dim);
    const DeviceArray<float> lse(heads);
    EXPECT_CUDA(MergeStates(outs.get(), lses.get(), count, heads, value_dim, out.get(), lse.get(),
                            stream_));
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
    return {out.Download(), lse.Download()};
  }

  static States Concat(const States& a, const States& b) {
    States both = a;
    both.out.insert(both.out.end(), b.out.begin(), b.out.end());
    both.lse.insert(both.lse.end(), b.lse.begin(), b.lse.end());
    return both;
  }

  static void Check(const States& merged, const States& states, int heads) {
    const size_t count = states.lse.size() / heads;
    const size_t value_dim = states.out.size() / states.lse.size();
    std::vector<double> out(heads * value_dim, 0.0);
    std::vector<double> lse(heads, -kInfinity);
    for (int head = 0; head < heads; ++head) {
      double max = -kInfinity;
      for (size_t i = 0; i < count; ++i) max = std::max<double>(max, states.lse[i * heads + head]);
      if (std::isinf(max)) continue;
      double sum = 0.0;
      for (size_t i = 0; i < count; ++i) sum += std::exp(states.lse[i * heads + head] - max);
      lse[head] = max + std::log(sum);
      for (size_t i = 0; i < count; ++i) {
        const size_t state = i * heads + head;
        if (std::isinf(states.lse[state])) continue;
        const double weight = std::exp(states.lse[state] - lse[head]);
        for (size_t d = 0; d < value_dim; ++d) {
          out[head * value_dim + d] += weight * states.out[state * value_dim + d];
        }
      }
    }
    ExpectNear(merged, out, lse);
  }
};

TEST_F(MergeStatesTest, AgreesWithTheReference) {
  for (const int value_dim : {4, 64, 80, 96, 128, 132, 256, 520}) {
    for (const int count : {1, 2, 3, 31, 33, 100}) {
      for (const int heads : {1, 3, 32, 97}) {
        SCOPED_TRACE(std::to_string(count) + " states, " + std::to_string(heads) + " heads, " +
                     std::to_string(value_dim) + " elements");
        const States states = MakeStates(count, heads, value_dim, 3.0F);
        Check(Merge(states, heads), states, heads);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(MergeStatesTest, LseFarApart) {
  const States states = MakeStates(6, 40, 128, 1e4F);
  Check(Merge(states, 40), states, 40);
}

TEST_F(MergeStatesTest, IsAssociative) {
  constexpr int kHeads = 24;
  const States a = MakeStates(1, kHeads, 128, 4.0F);
  const States b = MakeStates(1, kHeads, 128, 4.0F);
  const States c = MakeStates(1, kHeads, 128, 4.0F);
  const States all = Concat(Concat(a, b), c);
  Check(Merge(all, kHeads), all, kHeads);
  Check(Merge(Concat(Merge(Concat(a, b), kHeads), c), kHeads), all, kHeads);
  Check(Merge(Concat(a, Merge(Concat(b, c), kHeads)), kHeads), all, kHeads);
}

TEST_F(MergeStatesTest, NothingMergesToTheEmptyState) {
  const DeviceArray<float> out(8 * 64);
  const DeviceArray<float> lse(8);
  EXPECT_CUDA(MergeStates(nullptr, nullptr, 0, 8, 64, out.get(), lse.get(), stream_));
  EXPECT_CUDA(cudaStreamSynchronize(stream_));
  EXPECT_EQ(out.Download(), std::vector<float>(8 * 64, 0.0F));
  EXPECT_EQ(lse.Download(), std::vector<float>(8, -kInfinity));
}

TEST_F(MergeStatesTest, MergesInPlace) {
  const States states = MakeStates(4, 10, 96, 3.0F);
  const DeviceArray<float> outs(states.out);
  const DeviceArray<float> lses(states.lse);
  EXPECT_CUDA(MergeStates(outs.get(), lses.get(), 4, 10, 96, outs.get() + 10 * 96, lses.get() + 10,
                          stream_));
  EXPECT_CUDA(cudaStreamSynchronize(stream_));
  const std::vector<float> out = outs.Download();
  const std::vector<float> lse = lses.Download();
  Check({{out.begin() + 960, out.begin() + 1920}, {lse.begin() + 10, lse.begin() + 20}}, states,
        10);
}

// ---- arguments: no GPU needed -------------------------------------------------------------------

class CudaArgumentsTest : public testing::Test {
 protected:
  // Valid but for what a test changes; never launched, so the pointers may point anywhere.
  GatheredRows Valid() {
    GatheredRows rows;
    rows.queries = rows.keys = rows.values = memory_;
    rows.row_counts = reinterpret_cast<const int32_t*>(memory_);
    rows.groups = rows.group = rows.rows_max = 1;
    rows.key_dim = rows.value_dim = 64;
    rows.softmax_scale = 1.0F;
    return rows;
  }
  template <typename Change>
  cudaError_t Attend(Change change) {
    GatheredRows rows = Valid();
    change(rows);
    return AttendGatheredRows(rows, memory_, memory_, nullptr);
  }

  alignas(16) float memory_[8] = {};
};

TEST_F(CudaArgumentsTest, AttendGatheredRowsRefuses) {
  const auto refused = cudaErrorInvalidValue;
  EXPECT_EQ(Attend([](GatheredRows& r) { r.groups = -1; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.group = 0; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.group = kMaxGroup + 1; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.rows_max = -1; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.rows_max = kMaxRows + 1; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.key_dim = 0; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.key_dim = 65; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.key_dim = 264; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.value_dim = 4; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.row_dtype = DType::kFp32; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.query_dtype = static_cast<DType>(9); }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.softmax_scale = kInfinity; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.splits = 0; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.splits = kMaxSplits + 1; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.queries = nullptr; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.row_counts = nullptr; }), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.keys = static_cast<const char*>(r.keys) + 2; }),
            refused);
  EXPECT_EQ(AttendGatheredRows(Valid(), nullptr, memory_, nullptr), refused);
  EXPECT_EQ(AttendGatheredRows(Valid(), memory_, nullptr, nullptr), refused);
  EXPECT_EQ(Attend([](GatheredRows& r) { r.groups = 0; }), cudaSuccess);
}

TEST_F(CudaArgumentsTest, MergeStatesRefuses) {
  const auto refused = cudaErrorInvalidValue;
  EXPECT_EQ(MergeStates(memory_, memory_, -1, 1, 64, memory_, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_, memory_, 1, -1, 64, memory_, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_, memory_, 1, 1, 0, memory_, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_, memory_, 1, 1, 66, memory_, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_, memory_, 1, 1, kMaxValueDim + 4, memory_, memory_, nullptr),
            refused);
  EXPECT_EQ(MergeStates(nullptr, memory_, 1, 1, 64, memory_, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_ + 1, memory_, 1, 1, 64, memory_, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_, nullptr, 1, 1, 64, memory_, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_, memory_, 1, 1, 64, nullptr, memory_, nullptr), refused);
  EXPECT_EQ(MergeStates(memory_, memory_, 1, 1, 64, memory_, nullptr, nullptr), refused);
  EXPECT_EQ(MergeStates(nullptr, nullptr, 1, 0, 64, nullptr, nullptr, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
