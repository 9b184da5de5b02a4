// Kernels that start early (kernels/cuda/launch.h) keep the order of their stream.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/kv_pages.h"
#include "kernels/cuda/publish.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace kvseek::kernels::cuda {
namespace {

constexpr int kSequences = 3;
constexpr int kKvHeads = 2;
constexpr int kGroup = 4;
constexpr int kHeads = kSequences * kKvHeads * kGroup;
constexpr int kRows = 2000;
constexpr int kPoolRows = kSequences * kKvHeads * kRows;
constexpr int kSteps = 24;
constexpr int kScattered = 48;  // rows that a step writes

// Steps of four kernels, of which each reads what the one before wrote, or writes what it read:
// rows go into the pool, are attended to, the result is merged into the sum of all steps, and that
// is the next step's queries. ScatterRows does not start early, the others do.
class LaunchTest : public CudaTest, public testing::WithParamInterface<int> {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (stream_ == nullptr) return;
    pool_ = RandomRows(2 * kPoolRows);
    queries_ = RandomRows(kHeads);
    for (int step = 0; step < kSteps; ++step) {
      const std::vector<uint16_t> rows = RandomRows(kScattered * kKvHeads);
      rows_.insert(rows_.end(), rows.begin(), rows.end());
      const int first = Below(kSequences * kRows);
      for (int i = 0; i < kScattered; ++i) {
        slots_.push_back((first + 7 * i) % (kSequences * kRows));
      }
    }
  }

  std::vector<uint16_t> RandomRows(int rows) {
    std::vector<uint16_t> elements(static_cast<size_t>(rows) * GetParam());
    for (uint16_t& element : elements) element = FloatToBf16(Normal());
    return elements;
  }

  // Memory of one run.
  struct Run {
    explicit Run(const LaunchTest& test)
        : pool(test.pool_),
          queries(test.queries_),
          rows(test.rows_),
          slots(test.slots_),
          part_out(static_cast<size_t>(kHeads) * GetParam()),
          sum_out(std::vector<float>(static_cast<size_t>(kHeads) * GetParam(), 0.0F)),
          workspace(std::vector<uint8_t>(
              AttendWorkspaceBytes(kSequences * kKvHeads, 1, kGroup, GetParam()))) {}

    DeviceArray<uint16_t> pool;
    DeviceArray<uint16_t> queries;
    DeviceArray<uint16_t> rows;
    DeviceArray<int32_t> slots;
    DeviceArray<int32_t> counts{std::vector<int32_t>(kSequences, kRows)};
    DeviceArray<float> part_out;
    DeviceArray<float> part_lse{static_cast<size_t>(kHeads)};
    DeviceArray<float> sum_out;
    DeviceArray<float> sum_lse{std::vector<float>(kHeads, -kInfinity)};
    DeviceArray<uint8_t> workspace;
  };

  // Enqueues all steps; `after` is called after each kernel.
  template <typename After>
  void Enqueue(const Run& run, After after) {
    const int dim = GetParam();
    KvPages pages;
    uint16_t* values = run.pool.get() + static_cast<int64_t>(kPoolRows) * dim;
    pages.pool = {run.pool.get(), values, kKvHeads, kRows, dim, dim, DType::kBf16};
    pages.counts = run.counts.get();
    pages.sequences = kSequences;
    const PageQueries queries{run.queries.get(), 1, kGroup, 0.1F, false};
    const AttendWorkspace workspace{run.workspace.get(),
                                    AttendWorkspaceBytes(kSequences * kKvHeads, 1, kGroup, dim)};
    const StateList lists[] = {{run.sum_out.get(), run.sum_lse.get(), 1},
                               {run.part_out.get(), run.part_lse.get(), 1}};
    for (int step = 0; step < kSteps; ++step) {
      const uint16_t* rows =
          run.rows.get() + static_cast<int64_t>(step) * kScattered * kKvHeads * dim;
      EXPECT_CUDA(ScatterRows(rows, rows, run.slots.get() + step * kScattered, kScattered, kKvHeads,
                              pages.pool, stream_));
      after();
      EXPECT_CUDA(
          AttendPages(pages, queries, workspace, run.part_out.get(), run.part_lse.get(), stream_));
      after();
      EXPECT_CUDA(MergeStates(lists, 2, kHeads, dim, run.sum_out.get(), DType::kFp32,
                              run.sum_lse.get(), stream_));
      after();
      EXPECT_CUDA(
          MergeStates(lists, 1, kHeads, dim, run.queries.get(), DType::kBf16, nullptr, stream_));
      after();
    }
  }

  void ExpectSame(const Run& run, const Run& expected, const std::string& what) {
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ASSERT_EQ(run.sum_out.Download(), expected.sum_out.Download()) << what;
    ASSERT_EQ(run.sum_lse.Download(), expected.sum_lse.Download()) << what;
    ASSERT_EQ(run.queries.Download(), expected.queries.Download()) << what;
  }

  std::vector<uint16_t> pool_;
  std::vector<uint16_t> queries_;
  std::vector<uint16_t> rows_;  // of all steps
  std::vector<int32_t> slots_;
};

TEST_P(LaunchTest, KernelsThatFollowEachOtherSeeWhatWasWritten) {
  const Run expected(*this);
  Enqueue(expected, [&] { EXPECT_CUDA(cudaStreamSynchronize(stream_)); });
  for (int repeat = 0; repeat < 3; ++repeat) {
    const Run run(*this);
    Enqueue(run, [] {});
    ExpectSame(run, expected, "run " + std::to_string(repeat));
    if (HasFatalFailure()) return;
  }
}

TEST_P(LaunchTest, SoDoThoseOfAGraph) {
  const Run expected(*this);
  Enqueue(expected, [&] { EXPECT_CUDA(cudaStreamSynchronize(stream_)); });
  const Run run(*this);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  Enqueue(run, [] {});
  ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  EXPECT_CUDA(cudaGraphLaunch(executable, stream_));
  ExpectSame(run, expected, "graph");
  EXPECT_CUDA(cudaGraphExecDestroy(executable));
  EXPECT_CUDA(cudaGraphDestroy(graph));
}

INSTANTIATE_TEST_SUITE_P(Dims, LaunchTest, testing::Values(64, 128, 256));

class PermitTest : public CudaTest {};

TEST_F(PermitTest, MergeStatesReadsNothingBeforeIt) {
  constexpr int kDim = 128;
  constexpr size_t kElements = size_t{kHeads} * kDim;
  const DeviceArray<uint32_t> permit(std::vector<uint32_t>(1), Place::kPinnedHost);
  const DeviceArray<float> outs(kElements, Place::kPinnedHost);
  const DeviceArray<float> lses(kHeads, Place::kPinnedHost);
  const DeviceArray<float> out(kElements, Place::kPinnedHost);
  const DeviceArray<float> lse(kHeads, Place::kPinnedHost);
  const StateList list{outs.get(), lses.get(), 1};
  const auto merge = [&] {
    return MergeStates(&list, 1, kHeads, kDim, out.get(), DType::kFp32, lse.get(), stream_);
  };
  ASSERT_CUDA(AwaitPermit(permit.get(), 0, stream_));
  ASSERT_CUDA(merge());  // the code is loaded
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  for (uint32_t number = 1; number <= 200; ++number) {
    std::fill_n(outs.get(), kElements, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(lses.get(), kHeads, 0.0F);
    std::fill_n(lse.get(), kHeads, kInfinity);
    const cudaError_t awaits = AwaitPermit(permit.get(), number, stream_);
    const cudaError_t merges = merge();
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    bool early = false;
    while (std::chrono::steady_clock::now() < until) {
      early = early || std::atomic_ref<float>(*lse.get()).load() != kInfinity;
    }
    for (size_t i = 0; i < kElements; ++i) outs.get()[i] = Normal();
    for (int i = 0; i < kHeads; ++i) lses.get()[i] = Normal();
    Permit(permit.get(), number);
    ASSERT_CUDA(awaits);
    ASSERT_CUDA(merges);
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ASSERT_FALSE(early) << number;
    ASSERT_TRUE(std::equal(outs.get(), outs.get() + kElements, out.get())) << number;
    ASSERT_TRUE(std::equal(lses.get(), lses.get() + kHeads, lse.get())) << number;
  }
}

}  // namespace
}  // namespace kvseek::kernels::cuda
