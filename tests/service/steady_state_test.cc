// What a daemon's answering path takes from malloc once a session is warm: nothing for a search,
// and a bound for each kind of request, which is what is left.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "index/built_index.h"
#include "service/search_executor.h"
#include "tests/service/allocation_counter.h"
#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

constexpr uint32_t kLayers = 4;
constexpr uint32_t kKvHeads = 2;
constexpr uint32_t kQueryHeads = 8;
constexpr int kGroup = 4;
constexpr uint32_t kDim = 64;
constexpr uint32_t kTokens = 5000;
constexpr int kRepeats = 40;

class SteadyStateTest : public testing::Test {
 protected:
  /// One worker, so that it is always the same one whose scratch is warm.
  static DaemonOptions Options() {
    DaemonOptions options = Service::SmallOptions(1);
    options.build_from_tokens = 1024;
    return options;
  }
  SteadyStateTest() : service_(Options()) {}

  void SetUp() override {
    if (!CanCountAllocations()) GTEST_SKIP() << "a sanitizer has its own malloc";
    proto::OpenSessionRequest open;
    proto::ModelShape& shape = *open.mutable_shape();
    shape.set_layers(kLayers);
    shape.set_kv_heads(kKvHeads);
    shape.set_query_heads(kQueryHeads);
    shape.set_key_dim(kDim);
    shape.set_value_dim(kDim);
    shape.set_dtype(proto::DTYPE_BF16);
    open.add_build(proto::INDEX_PRODUCT);
    session_ = service_.Call(open).message.session();
    const Rows rows = RandomRows(3, shape, kTokens);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      proto::AppendRequest append;
      *append.mutable_session() = session_;
      append.set_layer(layer);
      append.set_tokens(kTokens);
      for (uint32_t t = 0; t < kTokens; t += 50) append.add_query_positions(t);
      const auto sampled = static_cast<size_t>(append.query_positions_size());
      const auto queries =
          reference::RandomElements(5, sampled * kQueryHeads * kDim, 1.0F, kernels::DType::kBf16);
      Tensors tensors;
      tensors.Add(rows.keys).Add(rows.values).Add(queries);
      ASSERT_TRUE(service_.Call(append, tensors).ok());
    }
    const auto late = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (service_.builder().built() < kLayers * kKvHeads) {
      ASSERT_LT(std::chrono::steady_clock::now(), late);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    queries_ = reference::RandomFloats(7, kQueryHeads * kDim, 1.0F);
  }

  /// The middle of what was counted once everything was warm: a buffer that grows now and then does
  /// not count.
  static uint64_t Middle(std::vector<uint64_t> counts) {
    const auto warm = counts.begin() + kRepeats / 2;
    const auto middle = warm + kRepeats / 4;
    std::nth_element(warm, middle, counts.end());
    return *middle;
  }

  /// Of what the handler does from a request off the wire to its answer.
  uint64_t CountRequest(proto::Op op, const std::function<std::string()>& metadata,
                        const Tensors& tensors) {
    std::vector<uint64_t> counts;
    for (int i = 0; i < kRepeats; ++i) {
      Request request;
      request.op = op;
      request.metadata = metadata();
      request.payload = tensors.Copy();
      request.deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
      std::atomic<int> answers{0};
      bool error = false;
      std::function<void(Response)> done = [&](const Response& response) {
        error = response.error;
        answers.store(1);
        answers.notify_one();
      };
      const uint64_t before = Allocations();
      service_.handler().Handle(std::move(request), std::move(done));
      answers.wait(0);
      counts.push_back(Allocations() - before);
      EXPECT_FALSE(error);
    }
    return Middle(std::move(counts));
  }

  std::shared_ptr<const LayerState> State(uint32_t layer) {
    const auto session = service_.store().Find(session_.boot_id(), session_.session_id(), "",
                                               std::chrono::steady_clock::now());
    return (*session)->State(layer);
  }

  /// Of RunSearches for the groups of one layer.
  uint64_t CountSearches(const index::KeyIndex* (*index_of)(const LayerState&, size_t),
                         index::SearchOptions options) {
    const std::shared_ptr<const LayerState> state = State(0);
    std::vector<uint64_t> counts;
    for (int i = 0; i < kRepeats; ++i) {
      std::vector<SearchTask> tasks;
      for (size_t h = 0; h < kKvHeads; ++h) {
        tasks.push_back({index_of(*state, h),
                         state->View(h),
                         {queries_.data() + h * kGroup * kDim, kGroup, 0, state->tokens},
                         options});
      }
      // They outlive the job below, which returns before another worker is done with the searches.
      std::mutex mutex;
      std::condition_variable answered;
      bool is_answered = false;
      uint64_t before = 0;
      const auto done = [&](const auto& results, index::Scratch&) {
        const uint64_t made = Allocations() - before;
        EXPECT_TRUE(results.ok());
        const std::lock_guard lock(mutex);
        counts.push_back(made);
        is_answered = true;
        answered.notify_one();
      };
      service_.pool().Submit([&](index::Scratch& scratch) {
        const GiveUp give_up = {std::chrono::steady_clock::now() + std::chrono::minutes(1), nullptr,
                                nullptr};
        before = Allocations();
        RunSearches(service_.pool(), tasks, give_up, std::ref(done), scratch);
      });
      std::unique_lock lock(mutex);
      answered.wait(lock, [&] { return is_answered; });
    }
    return Middle(std::move(counts));
  }

  proto::AttendRequest Attend(proto::IndexKind index) const {
    proto::AttendRequest request;
    proto::QueryItem& item = *request.add_items();
    *item.mutable_session() = session_;
    item.set_tokens(1);
    item.add_range_end(kTokens);
    request.set_query_dtype(proto::DTYPE_FP32);
    request.mutable_options()->set_index(index);
    request.mutable_options()->set_candidates(256);
    return request;
  }

  Service service_;
  proto::SessionRef session_;
  std::vector<float> queries_;
};

const index::KeyIndex* Exact(const LayerState&, size_t) { return &index::ExactIndex(); }
const index::KeyIndex* Ladder(const LayerState&, size_t) { return &index::LadderIndex(); }
const index::KeyIndex* Product(const LayerState& state, size_t head) {
  return state.Built(head, index::BuiltKind::kProduct);
}

// Plans stand in memory that earlier searches left, and so do results.
TEST_F(SteadyStateTest, Searches) {
  const index::SearchOptions attend{.candidates = 256};
  const index::SearchOptions top_k{.k = 64, .candidates = 256};
  EXPECT_EQ(CountSearches(Exact, attend), 0U);
  EXPECT_EQ(CountSearches(Ladder, attend), 0U);
  EXPECT_EQ(CountSearches(Product, attend), 0U);
  EXPECT_EQ(CountSearches(Ladder, top_k), 0U);
  EXPECT_EQ(CountSearches(Product, top_k), 0U);
}

// The call, its job, and what leaves: the answer's message and payload.
TEST_F(SteadyStateTest, Attends) {
  const Tensors tensors = Tensors().Add(queries_);
  for (const proto::IndexKind index : {proto::INDEX_LADDER, proto::INDEX_PRODUCT}) {
    const uint64_t made = CountRequest(
        proto::Op::kAttend, [&] { return Attend(index).SerializeAsString(); }, tensors);
    EXPECT_LE(made, 4U);
  }
}

// The call, and the list and the job of what one worker appends; of each layer its job and its next
// state.
TEST_F(SteadyStateTest, Appends) {
  uint64_t held = kTokens;
  proto::AppendRequest append;
  *append.mutable_session() = session_;
  append.set_layers(kLayers);
  append.set_tokens(1);
  const auto next = [&] {
    append.set_start(held++);
    return append.SerializeAsString();
  };
  const Tensors token = Tensors().Add(std::vector<uint16_t>(size_t{kLayers} * kKvHeads * 2 * kDim));
  EXPECT_LE(CountRequest(proto::Op::kAppend, next, token), 3 + 2 * kLayers);
}

}  // namespace
}  // namespace kvseek::service
