// Indexes in the background: when they are built, what is published, and that answers stay right.
#include "service/index_builder.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>
#include <vector>

#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

using std::chrono::milliseconds;

constexpr uint32_t kTokens = 5000;
constexpr uint32_t kCovered = 4096;
constexpr size_t kQueryHeads = 6;

DaemonOptions BuildingOptions(int build_threads) {
  DaemonOptions options = Service::SmallOptions(2);
  options.build_threads = build_threads;
  options.build_from_tokens = 2048;
  return options;
}

proto::SessionRef OpenBuilding(Service& service, const std::vector<proto::IndexKind>& kinds) {
  proto::OpenSessionRequest request;
  *request.mutable_shape() = SmallShape();
  for (const proto::IndexKind kind : kinds) request.add_build(kind);
  const auto answer = service.Call(request);
  EXPECT_TRUE(answer.ok()) << answer.status;
  return answer.message.session();
}

void Append(Service& service, const proto::SessionRef& session, uint64_t start, uint32_t tokens,
            bool with_queries = true) {
  const proto::ModelShape shape = SmallShape();
  for (uint32_t layer = 0; layer < shape.layers(); ++layer) {
    const Rows rows = RandomRows(17 + layer + static_cast<uint32_t>(start), shape, tokens);
    proto::AppendRequest request;
    *request.mutable_session() = session;
    request.set_layer(layer);
    request.set_start(start);
    request.set_tokens(tokens);
    for (uint32_t t = 0; with_queries && t < tokens; t += 32)
      request.add_query_positions(start + t);
    const auto queries = reference::RandomElements(
        5, static_cast<size_t>(request.query_positions_size()) * kQueryHeads * shape.key_dim(),
        1.0F, kernels::DType::kBf16);
    const auto answer =
        service.Call(request, Tensors().Add(rows.keys).Add(rows.values).Add(queries));
    ASSERT_TRUE(answer.ok()) << answer.status;
  }
}

void WaitUntilBuilt(Service& service, uint64_t count) {
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  while (service.builder().built() < count) {
    ASSERT_LT(std::chrono::steady_clock::now(), late) << service.builder().built() << " built";
    std::this_thread::sleep_for(milliseconds(2));
  }
}

Answer<proto::AttendResponse> Attend(Service& service, const proto::SessionRef& session,
                                     proto::IndexKind index, uint32_t candidates = 1 << 20) {
  const proto::ModelShape shape = SmallShape();
  proto::AttendRequest request;
  proto::QueryItem& item = *request.add_items();
  *item.mutable_session() = session;
  item.set_layer(1);
  item.set_tokens(1);
  item.set_range_begin(7);
  request.set_query_dtype(proto::DTYPE_FP32);
  request.mutable_options()->set_index(index);
  request.mutable_options()->set_candidates(candidates);
  const std::vector<float> queries =
      reference::RandomFloats(3, kQueryHeads * shape.key_dim(), 1.0F);
  return service.Call(request, Tensors().Add(queries));
}

// Largest difference of the outputs of two answers.
double Difference(Answer<proto::AttendResponse> a, Answer<proto::AttendResponse> b) {
  const size_t count = kQueryHeads * SmallShape().value_dim();
  const auto x = a.tensors.Take<float>(count);
  const auto y = b.tensors.Take<float>(count);
  EXPECT_EQ(x.size(), count);
  EXPECT_EQ(y.size(), count);
  double worst = 0.0;
  for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
    worst = std::max(worst, static_cast<double>(std::abs(x[i] - y[i])));
  }
  return worst;
}

proto::IndexKind Answered(const Answer<proto::AttendResponse>& answer) {
  EXPECT_TRUE(answer.ok()) << answer.status;
  return answer.ok() ? answer.message.reports(0).index() : proto::INDEX_AUTO;
}

TEST(IndexBuilderTest, BuildsWhatTheSessionWasOpenedWithAndItAnswers) {
  Service service(BuildingOptions(1));
  const auto session =
      OpenBuilding(service, {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER, proto::INDEX_GRAPH});
  Append(service, session, 0, kTokens);
  WaitUntilBuilt(service, 3 * 4);
  const auto exact = Attend(service, session, proto::INDEX_EXACT);
  for (const auto kind : {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER}) {
    const auto all = Attend(service, session, kind);
    EXPECT_EQ(Answered(all), kind);
    // With a budget for every key, nothing is left to estimate.
    EXPECT_LT(Difference(exact, all), 1e-4) << kind;
    EXPECT_GT(all.message.reports(0).missed_mass_size(), 0);
    EXPECT_EQ(all.message.reports(0).missed_mass(0), 0.0F);
    const auto some = Attend(service, session, kind, 256);
    EXPECT_LT(some.message.reports(0).keys_exact(), kTokens / 2);
    EXPECT_GT(some.message.reports(0).missed_mass(0), 0.0F);
  }
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_GRAPH, 256)), proto::INDEX_GRAPH);

  proto::StatsRequest stats;
  stats.set_with_sessions(true);
  const auto described = service.Call(stats).message;
  ASSERT_EQ(described.sessions(0).built_size(), 3);
  for (const auto& built : described.sessions(0).built()) {
    EXPECT_EQ(built.tokens_covered(), kCovered) << built.index();
    EXPECT_GT(built.bytes(), 0U);
  }
}

TEST(IndexBuilderTest, TheLadderAnswersUntilThereIsOne) {
  Service service(BuildingOptions(0));
  const auto session = OpenBuilding(service, {proto::INDEX_CLUSTER});
  Append(service, session, 0, kTokens);
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_CLUSTER)), proto::INDEX_EXACT);
  EXPECT_EQ(service.builder().built(), 0U);
}

TEST(IndexBuilderTest, RefusesWhatTheSessionWasNotOpenedWith) {
  Service service(BuildingOptions(1));
  const auto session = OpenBuilding(service, {proto::INDEX_CLUSTER});
  Append(service, session, 0, 100);
  EXPECT_EQ(Describe(Attend(service, session, proto::INDEX_GRAPH).status),
            "FAILED_PRECONDITION options.index");
  proto::OpenSessionRequest request;
  *request.mutable_shape() = SmallShape();
  request.add_build(proto::INDEX_CLUSTER);
  request.add_build(proto::INDEX_LADDER);
  EXPECT_EQ(Describe(service.Call(request).status), "INVALID_ARGUMENT build[1]");
}

TEST(IndexBuilderTest, AGraphWaitsForQueries) {
  Service service(BuildingOptions(1));
  const auto session = OpenBuilding(service, {proto::INDEX_GRAPH});
  Append(service, session, 0, kTokens, /*with_queries=*/false);
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(service.builder().built(), 0U);
  Append(service, session, kTokens, 64);
  WaitUntilBuilt(service, 4);
}

// Decode steps that see more and more of both layers, asked for heads [0, 1] at once or one by one.
void Decode(Service& service, const proto::SessionRef& session, uint64_t first_end, uint64_t steps,
            bool head_by_head = false) {
  const size_t row = kQueryHeads / 2 * SmallShape().key_dim();
  for (uint64_t step = 0; step < steps; ++step) {
    for (uint32_t part = 0; part < (head_by_head ? 2 : 1); ++part) {
      proto::TopKRequest request;
      for (uint32_t layer = 0; layer < 2; ++layer) {
        proto::QueryItem& item = *request.add_items();
        *item.mutable_session() = session;
        item.set_layer(layer);
        item.set_tokens(2);
        item.add_range_end(first_end + step - 1);
        item.add_range_end(first_end + step);
        if (head_by_head) item.add_kv_heads(part);
      }
      request.set_query_dtype(proto::DTYPE_FP32);
      request.set_k(1);
      const std::vector<float> queries = reference::RandomFloats(
          static_cast<uint32_t>(step), 2 * row * (head_by_head ? 1 : 2), 1.0F);
      const auto answer = service.Call(request, Tensors().Add(queries).Add(queries));
      ASSERT_TRUE(answer.ok()) << answer.status;
    }
  }
}

uint64_t SampledTokens(Service& service) {
  const auto stats = service.Call(proto::StatsRequest());
  for (const proto::Counter& counter : stats.message.counters()) {
    if (counter.name() == "queries_sampled") return counter.value();
  }
  return 0;
}

TEST(IndexBuilderTest, AGraphLearnsFromTraffic) {
  for (const bool head_by_head : {false, true}) {
    Service service(BuildingOptions(1));
    const auto session = OpenBuilding(service, {proto::INDEX_GRAPH});
    Append(service, session, 0, kTokens, /*with_queries=*/false);
    Decode(service, session, 1001, 63 * 8, head_by_head);
    std::this_thread::sleep_for(milliseconds(50));
    EXPECT_EQ(service.builder().built(), 0U) << "too few queries";
    EXPECT_EQ(SampledTokens(service), 2U * 48) << "the others wait for a batch";
    Decode(service, session, 1001 + 63 * 8, 8, head_by_head);
    WaitUntilBuilt(service, 4);
    EXPECT_EQ(SampledTokens(service), 2U * 64);
    EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_GRAPH, 256)), proto::INDEX_GRAPH);
    const std::shared_ptr<const LayerState> state =
        (*service.store().Find(session.boot_id(), session.session_id(), "",
                               std::chrono::steady_clock::now()))
            ->State(1);
    ASSERT_EQ(state->queries->positions().size(), 64U);
    for (int64_t i = 0; i < 64; ++i) {
      EXPECT_EQ(state->queries->positions()[static_cast<size_t>(i)], 1000 + 8 * i);
    }
  }
}

TEST(IndexBuilderTest, TrafficOfOneHeadOrOfAClientThatSendsQueriesIsNotSampled) {
  Service service(BuildingOptions(1));
  const auto sends = OpenBuilding(service, {proto::INDEX_GRAPH});
  Append(service, sends, 0, kTokens);
  Decode(service, sends, 1000, 300);
  const auto learns_nothing = OpenBuilding(service, {proto::INDEX_LANDMARK});
  Append(service, learns_nothing, 0, kTokens, /*with_queries=*/false);
  Decode(service, learns_nothing, 1000, 300);
  WaitUntilBuilt(service, 8);
  EXPECT_EQ(SampledTokens(service), 0U);
}

TEST(IndexBuilderTest, ClustersAreBuiltAnewOnceThereAreQueries) {
  Service service(BuildingOptions(1));
  const auto session = OpenBuilding(service, {proto::INDEX_CLUSTER});
  Append(service, session, 0, kTokens, /*with_queries=*/false);
  WaitUntilBuilt(service, 4);
  Decode(service, session, 1000, 65 * 8);
  WaitUntilBuilt(service, 8);
  Decode(service, session, 2000, 65 * 8);
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(service.builder().built(), 8U) << "once is enough";
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_CLUSTER, 256)), proto::INDEX_CLUSTER);
}

TEST(IndexBuilderTest, QueriesOfTokensThatWereCutAreForgotten) {
  Service service(BuildingOptions(0));
  const auto session = OpenBuilding(service, {proto::INDEX_GRAPH});
  Append(service, session, 0, kTokens, /*with_queries=*/false);
  Decode(service, session, 4001, 15 * 8);  // 15 of a batch's 16 wait
  proto::TruncateRequest cut;
  *cut.mutable_session() = session;
  cut.set_tokens(4050);
  ASSERT_TRUE(service.Call(cut).ok());
  Decode(service, session, 3001, 8);
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (SampledTokens(service) < 32 && std::chrono::steady_clock::now() < late) {
    std::this_thread::sleep_for(milliseconds(2));
  }
  const std::shared_ptr<const LayerState> state =
      (*service.store().Find(session.boot_id(), session.session_id(), "",
                             std::chrono::steady_clock::now()))
          ->State(0);
  ASSERT_NE(state->queries, nullptr);
  EXPECT_EQ(state->queries->positions().front(), 3000);
  EXPECT_EQ(state->queries->positions().back(), 4048);
  EXPECT_EQ(state->queries->positions().size(), 8U);
}

TEST(IndexBuilderTest, ProductCodesWaitForQueriesAndThenAnswerAuto) {
  Service service(BuildingOptions(1));
  const auto session = OpenBuilding(service, {proto::INDEX_PRODUCT});
  const uint64_t heads = 4;  // two layers of two KV heads
  Append(service, session, 0, kTokens, /*with_queries=*/false);
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(service.builder().built(), 0U);
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_PRODUCT)), proto::INDEX_EXACT);
  Append(service, session, kTokens, kTokens);
  WaitUntilBuilt(service, heads);
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_PRODUCT, 256)), proto::INDEX_PRODUCT);
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_AUTO, 256)), proto::INDEX_PRODUCT);
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_LADDER, 256)), proto::INDEX_LADDER);
  EXPECT_LT(Difference(Attend(service, session, proto::INDEX_EXACT),
                       Attend(service, session, proto::INDEX_PRODUCT)),
            0.05);
  // Each further segment is encoded as it is sealed.
  const uint64_t built = service.builder().built();
  Append(service, session, 2 * kTokens, 1024);
  WaitUntilBuilt(service, built + heads);
}

TEST(IndexBuilderTest, FollowsASequenceThatGrowsForksAndIsCut) {
  Service service(BuildingOptions(1));
  const auto session = OpenBuilding(service, {proto::INDEX_LANDMARK});
  Append(service, session, 0, kTokens);
  WaitUntilBuilt(service, 4);
  Append(service, session, kTokens, 300);  // read exactly
  EXPECT_LT(Difference(Attend(service, session, proto::INDEX_EXACT),
                       Attend(service, session, proto::INDEX_LANDMARK)),
            1e-4);

  proto::ForkRequest fork;
  *fork.mutable_session() = session;
  constexpr uint32_t kLeast = kCovered + index::kSealDelay;  // that has these keys sealed
  fork.set_tokens(kLeast);
  const auto child = service.Call(fork).message.session();
  EXPECT_EQ(Answered(Attend(service, child, proto::INDEX_LANDMARK)), proto::INDEX_LANDMARK);

  proto::TruncateRequest cut;
  *cut.mutable_session() = child;
  cut.set_tokens(kLeast - 1);
  ASSERT_TRUE(service.Call(cut).ok());
  EXPECT_EQ(Answered(Attend(service, child, proto::INDEX_LANDMARK)), proto::INDEX_EXACT);
  // The cut sequence goes on with other tokens, and gets an index of its own.
  Append(service, child, kLeast - 1, 1500);
  WaitUntilBuilt(service, 8);
  EXPECT_EQ(Answered(Attend(service, child, proto::INDEX_LANDMARK)), proto::INDEX_LANDMARK);
  EXPECT_LT(Difference(Attend(service, child, proto::INDEX_EXACT),
                       Attend(service, child, proto::INDEX_LANDMARK)),
            1e-4);
  EXPECT_EQ(Answered(Attend(service, session, proto::INDEX_LANDMARK)), proto::INDEX_LANDMARK);
  Append(service, session, kTokens + 300, kCovered + 1000);
  WaitUntilBuilt(service, 12);
}

// An index that covers so many keys.
class FakeIndex final : public index::BuiltIndex {
 public:
  explicit FakeIndex(int64_t covered) : covered_(covered) {}
  int64_t covered() const override { return covered_; }
  size_t Bytes() const override { return 1; }
  double build_core_seconds() const override { return 0.0; }
  absl::string_view name() const override { return "fake"; }
  index::PlanPtr Plan(const index::KvView& view, const index::SearchQuery& query,
                      const index::SearchOptions& options, index::Scratch& scratch) const override {
    return index::ExactIndex().Plan(view, query, options, scratch);
  }

 private:
  int64_t covered_;
};

TEST(IndexBuilderTest, AnIndexOfKeysThatAreGoneIsNotPublished) {
  Service service(BuildingOptions(0));
  const auto ref = OpenBuilding(service, {proto::INDEX_LANDMARK});
  Append(service, ref, 0, kTokens);
  const auto session = *service.store().Find(ref.boot_id(), ref.session_id(), "session",
                                             std::chrono::steady_clock::now());
  const auto source = session->State(0);
  const auto kind = index::BuiltKind::kLandmark;
  EXPECT_TRUE(session->Publish(0, 1, kind, std::make_shared<FakeIndex>(2048), *source));
  ASSERT_TRUE(session->Truncate(3000, service.budget()).ok());
  EXPECT_NE(session->State(0)->Built(1, kind), nullptr);
  // Segment 2 is no longer that of the source, even when as many tokens are there again.
  Append(service, ref, 3000, kTokens - 3000);
  EXPECT_FALSE(session->Publish(0, 1, kind, std::make_shared<FakeIndex>(kCovered), *source));
  EXPECT_EQ(session->State(0)->Built(1, kind)->covered(), 2048);
  EXPECT_TRUE(session->Publish(0, 1, kind, std::make_shared<FakeIndex>(2048), *source));
}

TEST(IndexBuilderTest, ClosingGivesAllMemoryBack) {
  Service service(BuildingOptions(1));
  for (int round = 0; round < 3; ++round) {
    const auto session =
        OpenBuilding(service, {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER, proto::INDEX_GRAPH});
    Append(service, session, 0, kTokens);
    if (round == 1) std::this_thread::sleep_for(milliseconds(5));
    if (round == 2) WaitUntilBuilt(service, service.builder().built() + 1);
    proto::CloseSessionRequest close;
    *close.mutable_session() = session;
    ASSERT_TRUE(service.Call(close).ok());
  }
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (service.budget().used_bytes() > 0 && std::chrono::steady_clock::now() < late) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_EQ(service.budget().used_bytes(), 0U);
}

TEST(IndexBuilderTest, AnswersStayRightWhileBuildsPublish) {
  Service service(BuildingOptions(2));
  const auto session = OpenBuilding(service, {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER});
  Append(service, session, 0, kTokens);
  std::atomic<bool> stop{false};
  std::atomic<int> by_index{0};
  std::vector<std::thread> askers;
  for (const auto kind : {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER}) {
    askers.emplace_back([&, kind] {
      const auto exact = Attend(service, session, proto::INDEX_EXACT);
      while (!stop.load()) {
        const auto answer = Attend(service, session, kind);
        if (Answered(answer) == kind) by_index.fetch_add(1);
        ASSERT_LT(Difference(exact, answer), 1e-4);
      }
    });
  }
  WaitUntilBuilt(service, 8);
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (by_index.load() < 20 && std::chrono::steady_clock::now() < late) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  stop.store(true);
  for (std::thread& asker : askers) asker.join();
  EXPECT_GE(by_index.load(), 20);
}

}  // namespace
}  // namespace kvseek::service
