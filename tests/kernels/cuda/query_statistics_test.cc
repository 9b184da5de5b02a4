// Statistics of prefill queries against naive references in double precision. Needs a GPU, but for
// the checks of arguments.
#include "kernels/cuda/query_statistics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/cuda/cuda_fixture.h"

namespace kvseek::kernels::cuda {
namespace {

struct Shape {
  int count;
  int tokens;
  int kv_heads;
  int group;
  int dim;
  DType dtype = DType::kBf16;
  int step = 1;  ///< sampled tokens are so far apart in the tensor of queries
};

class QueryStatisticsTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    ASSERT_EQ(cublasCreate(&handle_), CUBLAS_STATUS_SUCCESS);
  }
  void TearDown() override {
    if (handle_ != nullptr) {
      EXPECT_EQ(cublasDestroy(handle_), CUBLAS_STATUS_SUCCESS);
    }
    CudaTest::TearDown();
  }

  /// Draws queries (count * step, heads, dim) and keys (tokens, kv_heads, dim): whole numbers from
  /// -2 to 2, of which all sums are exact and many equal, or normal ones.
  void Draw(const Shape& shape, bool whole, float deviation = 1.0F) {
    shape_ = shape;
    const auto element = [&] {
      const float x = whole ? static_cast<float>(Below(5) - 2) : deviation * Normal();
      return shape.dtype == DType::kBf16 ? FloatToBf16(x) : FloatToFp16(x);
    };
    const int query_row = shape.kv_heads * shape.group * shape.dim;
    queries_.resize(static_cast<size_t>(shape.count * shape.step * query_row));
    keys_.resize(static_cast<size_t>(shape.tokens * shape.kv_heads * shape.dim));
    limits_.resize(static_cast<size_t>(shape.count));
    std::generate(queries_.begin(), queries_.end(), element);
    std::generate(keys_.begin(), keys_.end(), element);
    for (int32_t& limit : limits_) limit = Below(shape.tokens + 20) - 5;
  }

  QuerySample Sample(const DeviceArray<uint16_t>& queries, const DeviceArray<uint16_t>& keys,
                     const DeviceArray<int32_t>* limits) const {
    return {
        .queries = queries.get(),
        .keys = keys.get(),
        .limits = limits == nullptr ? nullptr : limits->get(),
        .count = shape_.count,
        .tokens = shape_.tokens,
        .kv_heads = shape_.kv_heads,
        .group = shape_.group,
        .dim = shape_.dim,
        .dtype = shape_.dtype,
        .query_token_stride = int64_t{shape_.kv_heads} * shape_.group * shape_.dim * shape_.step,
        .key_token_stride = int64_t{shape_.kv_heads} * shape_.dim,
        .key_head_stride = shape_.dim};
  }

  int Heads() const { return shape_.kv_heads * shape_.group; }
  int Limit(int query, bool has_limits) const {
    const int limit = has_limits ? limits_[static_cast<size_t>(query)] : shape_.tokens;
    return std::clamp(limit, 0, shape_.tokens);
  }
  std::vector<float> Row(const std::vector<uint16_t>& tensor, size_t row) const {
    std::vector<float> out(static_cast<size_t>(shape_.dim));
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = LoadElement(tensor.data(), shape_.dtype, row * out.size() + i);
    }
    return out;
  }
  std::vector<float> Query(int token, int head) const {
    return Row(queries_, static_cast<size_t>(token * shape_.step * Heads() + head));
  }

  /// <q, k> of one query with all keys of its KV head.
  std::vector<double> Scores(int token, int head) {
    if (key_rows_.empty() || key_rows_head_ != head / shape_.group) {
      key_rows_head_ = head / shape_.group;
      key_rows_.clear();
      for (int t = 0; t < shape_.tokens; ++t) {
        key_rows_.push_back(Row(keys_, static_cast<size_t>(t * shape_.kv_heads + key_rows_head_)));
      }
    }
    const std::vector<float> query = Query(token, head);
    std::vector<double> scores;
    for (const auto& key : key_rows_) {
      double sum = 0.0;
      for (size_t i = 0; i < key.size(); ++i) {
        sum += static_cast<double>(key[i]) * static_cast<double>(query[i]);
      }
      scores.push_back(sum);
    }
    return scores;
  }

  /// NearestKeys of what was drawn; checks it exactly, or to within rounding of scores.
  void CheckNearest(int k, bool has_limits, double tolerance) {
    SCOPED_TRACE(std::to_string(shape_.tokens) + " tokens, k " + std::to_string(k));
    key_rows_.clear();
    const DeviceArray<uint16_t> queries(queries_);
    const DeviceArray<uint16_t> keys(keys_);
    const DeviceArray<int32_t> limits(limits_);
    const QuerySample sample = Sample(queries, keys, has_limits ? &limits : nullptr);
    const auto rows = static_cast<size_t>(shape_.count * Heads());
    const DeviceArray<int32_t> positions(rows * static_cast<size_t>(k));
    const DeviceArray<float> scores(rows * static_cast<size_t>(k));
    const DeviceArray<uint8_t> scratch(NearestKeysScratchBytes(sample, k));
    ASSERT_CUDA(
        NearestKeys(sample, k, handle_, scratch.get(), positions.get(), scores.get(), stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    const auto got_positions = positions.Download();
    const auto got_scores = scores.Download();
    for (int head = 0; head < Heads(); ++head) {
      for (int token = 0; token < shape_.count; ++token) {
        const size_t first = static_cast<size_t>(token * Heads() + head) * static_cast<size_t>(k);
        const std::vector<double> all = Scores(token, head);
        std::vector<int> order(static_cast<size_t>(Limit(token, has_limits)));
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
        const auto score = [&](int i) { return all[static_cast<size_t>(i)]; };
        std::stable_sort(order.begin(), order.end(),
                         [&](int a, int b) { return score(a) > score(b); });
        std::vector<int> seen;
        for (int i = 0; i < k; ++i) {
          const int position = got_positions[first + static_cast<size_t>(i)];
          const auto n = static_cast<size_t>(i);
          if (n >= order.size()) {
            ASSERT_EQ(position, -1) << "query " << token << ", head " << head << ", rank " << i;
            continue;
          }
          ASSERT_GE(position, 0);
          ASSERT_LT(position, Limit(token, has_limits));
          if (tolerance == 0.0) {
            ASSERT_EQ(position, order[n]) << "query " << token << ", head " << head << ", " << i;
          }
          ASSERT_NEAR(score(position), score(order[n]), tolerance) << token << ' ' << head;
          ASSERT_NEAR(static_cast<double>(got_scores[first + n]), score(position), tolerance);
          seen.push_back(position);
        }
        std::sort(seen.begin(), seen.end());
        ASSERT_EQ(std::adjacent_find(seen.begin(), seen.end()), seen.end()) << "a key twice";
      }
    }
  }

  /// MeasureFarMass of what was drawn.
  void CheckFarMass(const SteadyZone& zone, bool has_limits) {
    key_rows_.clear();
    const DeviceArray<uint16_t> queries(queries_);
    const DeviceArray<uint16_t> keys(keys_);
    const DeviceArray<int32_t> limits(limits_);
    const QuerySample sample = Sample(queries, keys, has_limits ? &limits : nullptr);
    const DeviceArray<float> shares(static_cast<size_t>(shape_.count * Heads()));
    const DeviceArray<float> means(static_cast<size_t>(shape_.kv_heads));
    const DeviceArray<uint8_t> scratch(FarMassScratchBytes(sample));
    ASSERT_CUDA(
        MeasureFarMass(sample, zone, handle_, scratch.get(), shares.get(), means.get(), stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    const auto got_shares = shares.Download();
    const auto got_means = means.Download();
    std::vector<double> sums(static_cast<size_t>(shape_.kv_heads));
    for (int head = 0; head < Heads(); ++head) {
      for (int token = 0; token < shape_.count; ++token) {
        const std::vector<double> scores = Scores(token, head);
        const int limit = Limit(token, has_limits);
        double max = -std::numeric_limits<double>::infinity();
        for (int i = 0; i < limit; ++i) max = std::max(max, scores[static_cast<size_t>(i)]);
        double near = 0.0;
        double far = 0.0;
        for (int i = 0; i < limit; ++i) {
          const double scale = static_cast<double>(zone.softmax_scale);
          const double weight = std::exp(scale * (scores[static_cast<size_t>(i)] - max));
          (i < zone.sink || i >= limit - zone.recent ? near : far) += weight;
        }
        const double share = limit == 0 ? 0.0 : far / (near + far);
        ASSERT_NEAR(static_cast<double>(got_shares[static_cast<size_t>(token * Heads() + head)]),
                    share, 1e-4)
            << "query " << token << " with limit " << limit << ", head " << head;
        sums[static_cast<size_t>(head / shape_.group)] += share;
      }
    }
    for (size_t h = 0; h < sums.size(); ++h) {
      const double mean = shape_.count == 0 ? 0.0 : sums[h] / (shape_.count * shape_.group);
      EXPECT_NEAR(static_cast<double>(got_means[h]), mean, 1e-4) << "KV head " << h;
    }
  }

  cublasHandle_t handle_ = nullptr;
  Shape shape_{};
  std::vector<uint16_t> queries_;
  std::vector<uint16_t> keys_;
  std::vector<int32_t> limits_;
  std::vector<std::vector<float>> key_rows_;
  int key_rows_head_ = 0;
};

TEST_F(QueryStatisticsTest, SecondMomentsAreExactForWholeNumbers) {
  const Shape shapes[] = {{1, 0, 1, 1, 64},
                          {37, 0, 2, 3, 80, DType::kFp16, 5},
                          {1000, 0, 3, 4, 128, DType::kBf16, 2},
                          {130, 0, 2, 7, 256, DType::kFp16}};
  for (const Shape& shape : shapes) {
    Draw(shape, true);
    const DeviceArray<uint16_t> queries(queries_);
    const size_t dim = static_cast<size_t>(shape.dim);
    const auto kv_heads = static_cast<size_t>(shape.kv_heads);
    const DeviceArray<float> moments(std::vector<float>(kv_heads * dim * dim, 1.0F));
    QuerySample sample = Sample(queries, queries, nullptr);
    sample.keys = nullptr;
    for (int call = 0; call < 2; ++call) {
      ASSERT_CUDA(AccumulateSecondMoments(sample, handle_, moments.get(), stream_));
    }
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    const auto got = moments.Download();
    std::vector<float> expected(got.size(), 1.0F);
    for (int token = 0; token < shape.count; ++token) {
      for (int head = 0; head < Heads(); ++head) {
        const std::vector<float> q = Query(token, head);
        float* moment = expected.data() + static_cast<size_t>(head / shape.group) * dim * dim;
        for (size_t i = 0; i < dim * dim; ++i) moment[i] += 2.0F * q[i / dim] * q[i % dim];
      }
    }
    ASSERT_EQ(got, expected) << shape.count << " queries of dim " << shape.dim;
  }
}

TEST_F(QueryStatisticsTest, NearestKeysAreExactWithTies) {
  for (const int tokens : {0, 1, 100, 4096, 4097, 9000}) {
    for (const int k : {1, 7, 256, 1024}) {
      Draw({9, tokens, 2, 3, 64, Below(2) == 0 ? DType::kBf16 : DType::kFp16, 3}, true);
      CheckNearest(k, Below(2) == 0, 0.0);
    }
  }
}

TEST_F(QueryStatisticsTest, NearestKeysOfManyQueries) {
  Draw({300, 5000, 1, 7, 80}, true);  // more than one block of queries
  CheckNearest(100, true, 0.0);
}

TEST_F(QueryStatisticsTest, NearestKeysOfNormalNumbers) {
  Draw({40, 13000, 2, 4, 128}, false);
  CheckNearest(200, true, 1e-4);
}

// All scores are 0, of either sign: positions alone decide.
TEST_F(QueryStatisticsTest, NearestKeysOfEqualScores) {
  Draw({5, 9000, 1, 2, 64}, true);
  for (uint16_t& element : queries_) element = element & 0x8000U;
  CheckNearest(1000, true, 0.0);
}

TEST_F(QueryStatisticsTest, FarMass) {
  Draw({50, 9000, 2, 3, 128, DType::kBf16, 2}, false);
  CheckFarMass({.sink = 16, .recent = 512, .softmax_scale = 0.1F}, true);
  CheckFarMass({.sink = 0, .recent = 0, .softmax_scale = 0.1F}, true);
  CheckFarMass({.sink = 5000, .recent = 5000, .softmax_scale = 0.1F}, false);
  CheckFarMass({.sink = 4, .recent = std::numeric_limits<int>::max(), .softmax_scale = 0.1F}, true);
  Draw({300, 700, 1, 4, 64, DType::kFp16}, false);
  CheckFarMass({.sink = 4, .recent = 64, .softmax_scale = 0.125F}, true);
}

TEST_F(QueryStatisticsTest, FarMassOfExtremes) {
  Draw({8, 5000, 1, 2, 64}, false, 40.0F);  // one key has nearly all the mass
  CheckFarMass({.sink = 16, .recent = 512, .softmax_scale = 0.125F}, true);
  Draw({3, 0, 2, 2, 64}, false);
  CheckFarMass({.sink = 16, .recent = 512, .softmax_scale = 0.1F}, true);
  Draw({0, 100, 2, 2, 64}, false);
  CheckFarMass({.sink = 16, .recent = 512, .softmax_scale = 0.1F}, true);
}

// ---- Arguments ----------------------------------------------------------------------------------

class QueryStatisticsArgumentsTest : public testing::Test {
 protected:
  QuerySample Valid() {
    return {.queries = memory_,
            .keys = memory_,
            .count = 1,
            .tokens = 1,
            .kv_heads = 1,
            .group = 1,
            .dim = 64,
            .query_token_stride = 64,
            .key_token_stride = 64};
  }
  template <typename Change>
  cudaError_t Nearest(Change change, int k = 1) {
    QuerySample sample = Valid();
    change(sample);
    return NearestKeys(sample, k, handle_, memory_, reinterpret_cast<int32_t*>(memory_), nullptr,
                       nullptr);
  }
  cudaError_t Far(const SteadyZone& zone) {
    return MeasureFarMass(Valid(), zone, handle_, memory_, nullptr, memory_, nullptr);
  }

  alignas(16) float memory_[64] = {};
  cublasHandle_t handle_ = reinterpret_cast<cublasHandle_t>(memory_);  // never used
};

TEST_F(QueryStatisticsArgumentsTest, Refuses) {
  const auto refused = cudaErrorInvalidValue;
  EXPECT_EQ(Nearest([](QuerySample& s) { s.count = -1; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.tokens = -1; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.kv_heads = -1; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.group = 0; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.group = kMaxSampleGroup + 1; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.dim = 60; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.dtype = DType::kFp32; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.query_token_stride = 56; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.key_token_stride = int64_t{1} << 31; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.key_head_stride = 4; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.queries = nullptr; }), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.keys = nullptr; }), refused);
  EXPECT_EQ(Nearest([](QuerySample&) {}, 0), refused);
  EXPECT_EQ(Nearest([](QuerySample&) {}, kMaxNearest + 1), refused);
  EXPECT_EQ(Nearest([](QuerySample& s) { s.count = 0; }), cudaSuccess);
  EXPECT_EQ(Far({.sink = -1}), refused);
  EXPECT_EQ(Far({.recent = -1}), refused);
  EXPECT_EQ(Far({.softmax_scale = std::numeric_limits<float>::infinity()}), refused);
  EXPECT_EQ(Far({}), refused) << "no shares";
  EXPECT_EQ(AccumulateSecondMoments(Valid(), handle_, nullptr, nullptr), refused);
  EXPECT_EQ(AccumulateSecondMoments(Valid(), nullptr, memory_, nullptr), refused);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
