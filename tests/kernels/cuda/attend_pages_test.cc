// AttendPages against a naive reference in double precision.
#include <memory>
#include <numeric>
#include <string>

#include "kernels/cuda/attention.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace kvseek::kernels::cuda {
namespace {

struct Shape {
  int kv_heads = 2;
  int group = 4;
  int key_dim = 64;
  int value_dim = 64;
  int page_tokens = 16;
  int pages_max = 20;
  DType dtype = DType::kBf16;
  bool is_listed = true;
  int tokens = 1;
  bool is_causal = false;
  Place place = Place::kDevice;

  int RowsMax() const { return (is_listed ? pages_max : 1) * page_tokens; }
};

// One problem on the host. Rows and page numbers that no sequence uses are NaN and absurd.
struct Problem {
  Shape shape;
  float softmax_scale;
  std::vector<int32_t> counts;
  std::vector<int32_t> pages;  // (sequences, pages_max)
  std::vector<uint16_t> queries;
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;

  int Count(int sequence) const { return std::clamp(counts[sequence], 0, shape.RowsMax()); }
  size_t Heads() const {
    return counts.size() * shape.tokens * shape.kv_heads * static_cast<size_t>(shape.group);
  }
  size_t PoolRow(int sequence, int head, int row) const {
    const size_t index = static_cast<size_t>(sequence) * shape.pages_max + row / shape.page_tokens;
    const size_t page = shape.is_listed ? pages[index] : sequence;
    return (page * shape.kv_heads + head) * shape.page_tokens + row % shape.page_tokens;
  }
  size_t QueryRow(int sequence, int token, int head, int query) const {
    return ((static_cast<size_t>(sequence) * shape.tokens + token) * shape.kv_heads + head) *
               shape.group +
           query;
  }
};

class AttendPagesTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (stream_ == nullptr) return;
    // One for all calls of a test: a call must leave it ready for the next, of whatever shape.
    workspace_ = std::make_unique<DeviceArray<uint8_t>>(
        AttendWorkspaceBytes(4096, kMaxTokens, kMaxGroup, kMaxRowDim));
    ASSERT_CUDA(cudaMemset(workspace_->get(), 0, Workspace().bytes));
  }
  AttendWorkspace Workspace() const {
    return {workspace_->get(), AttendWorkspaceBytes(4096, kMaxTokens, kMaxGroup, kMaxRowDim)};
  }

  void ListPages(Problem& problem) {
    const Shape& shape = problem.shape;
    const int sequences = static_cast<int>(problem.counts.size());
    problem.pages.assign(static_cast<size_t>(sequences) * shape.pages_max, 0x7fffffff);
    std::vector<int32_t> numbers(problem.pages.size());
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), random_);
    for (int sequence = 0; sequence < sequences; ++sequence) {
      for (int row = 0; row < problem.Count(sequence); row += shape.page_tokens) {
        const size_t index =
            static_cast<size_t>(sequence) * shape.pages_max + row / shape.page_tokens;
        problem.pages[index] = numbers[index];
      }
    }
  }

  // Normal numbers with outliers: some keys are long, some value elements large, and every group
  // has one key that is nearly a query and wins by far.
  Problem MakeProblem(const Shape& shape, std::vector<int32_t> counts) {
    Problem problem{
        shape, 1.0F / std::sqrt(static_cast<float>(shape.key_dim)), std::move(counts), {}, {}, {},
        {}};
    const int sequences = static_cast<int>(problem.counts.size());
    ListPages(problem);
    problem.queries.resize(problem.Heads() * shape.key_dim);
    for (uint16_t& query : problem.queries) {
      query = ToHalf(Normal() * (Below(50) == 0 ? 6.0F : 1.0F), shape.dtype);
    }
    const size_t pages = shape.is_listed ? problem.pages.size() : problem.counts.size();
    const size_t rows = pages * shape.kv_heads * shape.page_tokens;
    problem.keys.assign(rows * shape.key_dim, 0x7fff);
    problem.values.assign(rows * shape.value_dim, 0x7fff);
    for (int sequence = 0; sequence < sequences; ++sequence) {
      const int count = problem.Count(sequence);
      for (int head = 0; head < shape.kv_heads; ++head) {
        const int winner = count > 0 ? Below(count) : -1;
        const uint16_t* query =
            problem.queries.data() + problem.QueryRow(sequence, 0, head, 0) * shape.key_dim;
        for (int row = 0; row < count; ++row) {
          const size_t index = problem.PoolRow(sequence, head, row);
          FillRow(problem, index, row == winner ? query : nullptr);
        }
      }
    }
    return problem;
  }

  void FillRow(Problem& problem, size_t index, const uint16_t* query) {
    const Shape& shape = problem.shape;
    const float length = Below(40) == 0 ? 5.0F : 1.0F;
    uint16_t* key = problem.keys.data() + index * shape.key_dim;
    uint16_t* value = problem.values.data() + index * shape.value_dim;
    for (int d = 0; d < shape.key_dim; ++d) {
      key[d] = query != nullptr ? query[d] : ToHalf(length * Normal(), shape.dtype);
    }
    for (int d = 0; d < shape.value_dim; ++d) {
      value[d] = ToHalf(Normal() * (Below(100) == 0 ? 30.0F : 1.0F), shape.dtype);
    }
  }

  // Runs the kernel `calls` times on poisoned outputs.
  std::vector<States> Run(const Problem& problem, int calls = 1) {
    const Shape& shape = problem.shape;
    const DeviceArray<uint16_t> query_rows(problem.queries);
    const DeviceArray<uint16_t> keys(problem.keys, shape.place);
    const DeviceArray<uint16_t> values(problem.values, shape.place);
    const DeviceArray<int32_t> counts(problem.counts);
    const DeviceArray<int32_t> numbers(problem.pages);
    KvPages pages;
    pages.pool = {keys.get(),    values.get(),    shape.kv_heads, shape.page_tokens,
                  shape.key_dim, shape.value_dim, shape.dtype};
    pages.pages = shape.is_listed ? numbers.get() : nullptr;
    pages.counts = counts.get();
    pages.pages_max = shape.pages_max;
    pages.sequences = static_cast<int>(problem.counts.size());
    const PageQueries queries{query_rows.get(), shape.tokens, shape.group, problem.softmax_scale,
                              shape.is_causal};
    std::vector<States> results;
    for (int call = 0; call < calls; ++call) {
      const DeviceArray<float> out(problem.Heads() * shape.value_dim);
      const DeviceArray<float> lse(problem.Heads());
      EXPECT_CUDA(AttendPages(pages, queries, Workspace(), out.get(), lse.get(), stream_));
      EXPECT_CUDA(cudaStreamSynchronize(stream_));
      results.push_back({out.Download(), lse.Download()});
    }
    return results;
  }

  static std::vector<float> Floats(const std::vector<uint16_t>& elements, DType dtype) {
    std::vector<float> floats(elements.size());
    for (size_t i = 0; i < elements.size(); ++i) {
      floats[i] = LoadElement(elements.data(), dtype, i);
    }
    return floats;
  }

  static Expected Reference(const Problem& problem) {
    const Shape& shape = problem.shape;
    const std::vector<float> queries = Floats(problem.queries, shape.dtype);
    const std::vector<float> keys = Floats(problem.keys, shape.dtype);
    const std::vector<float> values = Floats(problem.values, shape.dtype);
    Expected expected{std::vector<double>(problem.Heads() * shape.value_dim, 0.0),
                      std::vector<double>(problem.Heads(), -kInfinity)};
    const int per_token = shape.kv_heads * shape.group;
    for (size_t index = 0; index < problem.Heads(); ++index) {
      const int head = static_cast<int>(index) % per_token / shape.group;
      const int token = static_cast<int>(index) / per_token % shape.tokens;
      const int sequence = static_cast<int>(index) / per_token / shape.tokens;
      const int hidden = shape.is_causal ? shape.tokens - 1 - token : 0;
      const int count = std::max(0, problem.Count(sequence) - hidden);
      if (count == 0) continue;
      std::vector<double> scores(count, 0.0);
      for (int row = 0; row < count; ++row) {
        const float* query = queries.data() + index * shape.key_dim;
        const float* key = keys.data() + problem.PoolRow(sequence, head, row) * shape.key_dim;
        for (int d = 0; d < shape.key_dim; ++d) scores[row] += double{query[d]} * key[d];
        scores[row] *= problem.softmax_scale;
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0.0;
      for (const double score : scores) sum += std::exp(score - max);
      expected.lse[index] = max + std::log(sum);
      double* out = expected.out.data() + index * shape.value_dim;
      for (int row = 0; row < count; ++row) {
        const double weight = std::exp(scores[row] - expected.lse[index]);
        const float* value = values.data() + problem.PoolRow(sequence, head, row) * shape.value_dim;
        for (int d = 0; d < shape.value_dim; ++d) out[d] += weight * value[d];
      }
    }
    return expected;
  }

  void Check(const Problem& problem) { ExpectNear(Run(problem).front(), Reference(problem)); }

  std::unique_ptr<DeviceArray<uint8_t>> workspace_;
};

class AttendPagesDimTest : public AttendPagesTest, public testing::WithParamInterface<int> {};

TEST_P(AttendPagesDimTest, AgreesWithTheReference) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const int group : {1, 3, 4, 6, 7, 8, 16, 20}) {
      SCOPED_TRACE(std::string(DTypeName(dtype)) + " group " + std::to_string(group));
      Shape shape;
      shape.dtype = dtype;
      shape.group = group;
      shape.key_dim = shape.value_dim = GetParam();
      Check(MakeProblem(shape, {319, 0, 1, 2 + Below(300), 64}));
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, AttendPagesDimTest, testing::Values(8, 64, 80, 96, 128, 256));

TEST_F(AttendPagesTest, KeysAndValuesMayDifferInWidth) {
  for (const auto& [key_dim, value_dim] : {std::pair(192, 128), {128, 192}, {64, 256}, {72, 8}}) {
    SCOPED_TRACE(std::to_string(key_dim) + " x " + std::to_string(value_dim));
    Shape shape;
    shape.group = 5;
    shape.key_dim = key_dim;
    shape.value_dim = value_dim;
    Check(MakeProblem(shape, {201, 77, 0}));
    if (HasFatalFailure()) return;
  }
}

TEST_F(AttendPagesTest, SeveralTokens) {
  for (const int group : {1, 4, 6}) {
    for (int tokens = 1; tokens <= 5; ++tokens) {
      for (const bool is_causal : {false, true}) {
        SCOPED_TRACE(std::to_string(tokens) + " tokens of " + std::to_string(group) +
                     (is_causal ? " heads, causal" : " heads"));
        Shape shape;
        shape.group = group;
        shape.tokens = tokens;
        shape.is_causal = is_causal;
        Check(MakeProblem(shape, {1, 0, 3, 4, 17, 66, 300, 128 + Below(20)}));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(AttendPagesTest, LargestQueries) {
  Shape shape;
  shape.kv_heads = 1;
  shape.group = kMaxGroup;
  shape.tokens = kMaxTokens;
  shape.is_causal = true;
  Check(MakeProblem(shape, {70, 40}));
}

class AttendPagesLayoutTest : public AttendPagesTest,
                              public testing::WithParamInterface<std::pair<bool, int>> {};

TEST_P(AttendPagesLayoutTest, AgreesWithTheReference) {
  Shape shape;
  shape.is_listed = GetParam().first;
  shape.page_tokens = GetParam().second;
  shape.pages_max = shape.is_listed ? 700 / shape.page_tokens : 1;
  for (const int kv_heads : {1, 3}) {
    for (const Place place : {Place::kDevice, Place::kPinnedHost}) {
      SCOPED_TRACE(std::to_string(kv_heads) + " heads" +
                   (place == Place::kDevice ? "" : " in pinned memory"));
      shape.kv_heads = kv_heads;
      shape.place = place;
      Check(MakeProblem(shape, {0, 37, 1, 0, 0, 600, 16, 1 + Below(500), 64, 0}));
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, AttendPagesLayoutTest,
                         testing::Values(std::pair(true, 1), std::pair(true, 16),
                                         std::pair(true, 64), std::pair(false, 600),
                                         std::pair(false, 37)));

TEST_F(AttendPagesTest, OneLongGroupOverManyBlocks) {
  for (const int group : {4, 12}) {
    Shape shape;
    shape.kv_heads = 1;
    shape.group = group;
    shape.pages_max = 2000;
    Check(MakeProblem(shape, {20001 + Below(10000)}));
  }
}

TEST_F(AttendPagesTest, MixedLengths) {
  Shape shape;
  shape.key_dim = shape.value_dim = 128;
  shape.pages_max = 400;
  Check(MakeProblem(shape, {3, 5000 + Below(1000), 0, 0, 200, 1, 3000, 31, 0, 129}));
}

TEST_F(AttendPagesTest, ManyGroups) {
  for (const int page_tokens : {1, 16}) {
    Shape shape;
    shape.kv_heads = 1;
    shape.group = 2;
    shape.page_tokens = page_tokens;
    shape.pages_max = 40 / page_tokens;
    std::vector<int32_t> counts(3000);
    for (int32_t& count : counts) count = Below(3) == 0 ? 0 : Below(40);
    Check(MakeProblem(shape, counts));
  }
}

TEST_F(AttendPagesTest, AllEmpty) { Check(MakeProblem(Shape(), std::vector<int32_t>(300, 0))); }

TEST_F(AttendPagesTest, CountsAreClamped) {
  Check(MakeProblem(Shape(), {-5, 1000, std::numeric_limits<int32_t>::max(), 20,
                              std::numeric_limits<int32_t>::min()}));
}

TEST_F(AttendPagesTest, ScalesOfAnySize) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const float scale : {200.0F, -1.0F, 0.0F, 1e-6F}) {
      SCOPED_TRACE(scale);
      Shape shape;
      shape.dtype = dtype;
      Problem problem = MakeProblem(shape, {100, 7});
      problem.softmax_scale = scale;
      Check(problem);
      if (HasFatalFailure()) return;
    }
  }
}

// 20000 keys that each weigh 2^-24 of the largest one make a part of the sum that must not be lost.
TEST_F(AttendPagesTest, ManySmallWeights) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    SCOPED_TRACE(DTypeName(dtype));
    Shape shape;
    shape.kv_heads = shape.group = 1;
    shape.dtype = dtype;
    shape.pages_max = 1250;
    Problem problem = MakeProblem(shape, {20000});
    problem.softmax_scale = 1.0F;
    std::fill(problem.queries.begin(), problem.queries.end(), ToHalf(1.0F, dtype));
    for (int row = 0; row < 20000; ++row) {
      const size_t index = problem.PoolRow(0, 0, row);
      const bool is_heavy = row == 7777;
      std::fill_n(problem.keys.begin() + index * 64, 64, ToHalf(is_heavy ? 0.26F : 0.0F, dtype));
      std::fill_n(problem.values.begin() + index * 64, 64, ToHalf(is_heavy ? 1.0F : 90.0F, dtype));
    }
    Check(problem);
  }
}

TEST_F(AttendPagesTest, SameBitsAgain) {
  Shape shape;
  shape.pages_max = 600;
  shape.tokens = 2;
  const Problem problem = MakeProblem(shape, {9000 + Below(600), 40, 2001, 0, 7});
  const std::vector<States> results = Run(problem, 20);
  for (const States& result : results) {
    ASSERT_EQ(result.out, results.front().out);
    ASSERT_EQ(result.lse, results.front().lse);
  }
}

TEST_F(AttendPagesTest, CanBeCapturedInAGraph) {
  const DeviceArray<uint16_t> rows(std::vector<uint16_t>(1600 * 64, FloatToBf16(1.0F)));
  const DeviceArray<uint16_t> queries(std::vector<uint16_t>(64, FloatToBf16(0.5F)));
  const DeviceArray<int32_t> counts(std::vector<int32_t>{1600});
  const DeviceArray<float> out(64);
  const DeviceArray<float> lse(1);
  KvPages pages;
  pages.pool = {rows.get(), rows.get(), 1, 1600, 64, 64, DType::kBf16};
  pages.counts = counts.get();
  pages.sequences = 1;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  EXPECT_CUDA(AttendPages(pages, {queries.get(), 1, 1, 0.125F, false}, Workspace(), out.get(),
                          lse.get(), stream_));
  const StateList list{out.get(), lse.get(), 1};
  EXPECT_CUDA(MergeStates(&list, 1, 1, 64, out.get(), DType::kFp32, lse.get(), stream_));
  ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  for (int launch = 0; launch < 2; ++launch) {
    ASSERT_CUDA(cudaGraphLaunch(executable, stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ExpectNear({out.Download(), lse.Download()},
               {std::vector<double>(64, 1.0), {4.0 + std::log(1600.0)}});
  }
  EXPECT_CUDA(cudaGraphExecDestroy(executable));
  EXPECT_CUDA(cudaGraphDestroy(graph));
}

// ---- arguments: no GPU needed -------------------------------------------------------------------

class AttendPagesArgumentsTest : public testing::Test {
 protected:
  // Valid but for what a test changes; never launched, so the pointers may point anywhere.
  template <typename Change>
  cudaError_t Attend(Change change) {
    KvPages pages;
    pages.pool = {memory_, memory_, 1, 16, 64, 64, DType::kBf16};
    pages.pages = pages.counts = reinterpret_cast<const int32_t*>(memory_);
    pages.sequences = 1;
    PageQueries queries{memory_, 1, 1, 1.0F, false};
    AttendWorkspace workspace{memory_, size_t{1} << 40};
    change(pages, queries, workspace);
    return AttendPages(pages, queries, workspace, memory_, memory_, nullptr);
  }

  template <typename Change>
  void ExpectRefused(const char* what, Change change) {
    EXPECT_EQ(Attend(change), cudaErrorInvalidValue) << what;
  }

  alignas(16) float memory_[8] = {};
};

#define EXPECT_REFUSED(statement)                                                           \
  ExpectRefused(#statement,                                                                 \
                [&]([[maybe_unused]] KvPages& pages, [[maybe_unused]] PageQueries& queries, \
                    [[maybe_unused]] AttendWorkspace& workspace) { statement; })

TEST_F(AttendPagesArgumentsTest, Refused) {
  EXPECT_REFUSED(pages.sequences = -1);
  EXPECT_REFUSED(pages.pages_max = 0);
  EXPECT_REFUSED(pages.pages_max = kMaxRows / 16 + 1);
  EXPECT_REFUSED(pages.pool.kv_heads = 0);
  EXPECT_REFUSED(pages.pool.page_tokens = 0);
  EXPECT_REFUSED(pages.pool.page_tokens = 12);
  EXPECT_REFUSED(pages.pool.key_dim = 0);
  EXPECT_REFUSED(pages.pool.key_dim = 65);
  EXPECT_REFUSED(pages.pool.key_dim = 264);
  EXPECT_REFUSED(pages.pool.value_dim = 4);
  EXPECT_REFUSED(pages.pool.dtype = DType::kFp32);
  EXPECT_REFUSED(pages.pool.dtype = static_cast<DType>(9));
  EXPECT_REFUSED(pages.pool.keys = nullptr);
  EXPECT_REFUSED(pages.pool.values = reinterpret_cast<char*>(memory_) + 2);
  EXPECT_REFUSED(pages.counts = nullptr);
  EXPECT_REFUSED(queries.queries = nullptr);
  EXPECT_REFUSED(queries.tokens = 0);
  EXPECT_REFUSED(queries.tokens = kMaxTokens + 1);
  EXPECT_REFUSED(queries.group = 0);
  EXPECT_REFUSED(queries.group = kMaxGroup + 1);
  EXPECT_REFUSED(queries.softmax_scale = kInfinity);
  EXPECT_REFUSED(workspace.data = nullptr);
}

TEST_F(AttendPagesArgumentsTest, NoSequencesAreFine) {
  EXPECT_EQ(Attend([](KvPages& pages, PageQueries&, AttendWorkspace&) { pages.sequences = 0; }),
            cudaSuccess);
}

TEST_F(AttendPagesTest, ASmallWorkspaceIsRefused) {
  const DeviceArray<float> memory(1024);
  KvPages pages;
  pages.pool = {memory.get(), memory.get(), 1, 1, 64, 64, DType::kBf16};
  pages.counts = reinterpret_cast<const int32_t*>(memory.get());
  pages.sequences = 1;
  const size_t bytes = AttendWorkspaceBytes(1, 1, 1, 64);
  EXPECT_EQ(AttendPages(pages, {memory.get(), 1, 1, 1.0F, false}, {memory.get(), bytes - 1},
                        memory.get(), memory.get(), stream_),
            cudaErrorInvalidValue);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
