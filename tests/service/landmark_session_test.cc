// Sessions that say how landmark is built: what the daemon answers is, bit for bit, what the index
// library does on the same rows and landmarks, whatever is appended, repeated, forked and cut.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "index/landmark_index.h"
#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

using std::chrono::milliseconds;

constexpr size_t kKvHeads = 2;
constexpr size_t kGroup = 3;
constexpr size_t kKeyDim = 16;
constexpr size_t kValueDim = 24;
constexpr size_t kBlockElements = kKvHeads * kKeyDim;
constexpr index::KvShape kShape{kKeyDim, kValueDim, kernels::DType::kBf16, 0.25F, 2};
constexpr auto kKind = index::BuiltKind::kLandmark;

proto::ModelShape OneLayer() {
  proto::ModelShape shape = SmallShape();
  shape.set_layers(1);
  return shape;
}

/// What a session holds, as vectors.
struct Model {
  proto::SessionRef ref;
  index::LandmarkOptions options;
  Rows rows;
  std::map<uint64_t, std::vector<uint16_t>> landmarks;  ///< (kv_heads, key_dim) by position

  size_t tokens() const { return rows.keys.size() / kBlockElements; }
  uint64_t block() const { return static_cast<uint64_t>(options.block); }
  void Truncate(size_t tokens) {
    rows.keys.resize(std::min(rows.keys.size(), tokens * kBlockElements));
    rows.values.resize(std::min(rows.values.size(), tokens * kKvHeads * kValueDim));
    std::erase_if(landmarks, [&](const auto& entry) { return entry.first + block() > tokens; });
  }
};

/// One head of a model, and its landmark index over the first `covered` tokens.
class ModelHead {
 public:
  ModelHead(const Model& model, size_t head, int64_t covered)
      : keys_(HeadRows(model.rows.keys, kKvHeads, kKeyDim, head)),
        values_(HeadRows(model.rows.values, kKvHeads, kValueDim, head)) {
    size_t at = 0;
    const auto sealed =
        static_cast<size_t>(index::SealedTokens(static_cast<int64_t>(model.tokens())));
    for (; at < sealed; at += index::kSegmentTokens) {
      segments_.push_back(
          index::Segment::Build(kShape, &keys_[at * kKeyDim], &values_[at * kValueDim]));
    }
    tail_tokens_ = static_cast<int64_t>(model.tokens() - at);
    for (; at < model.tokens(); at += index::kTailChunkTokens) {
      tail_.push_back({&keys_[at * kKeyDim], &values_[at * kValueDim]});
    }
    std::vector<int64_t> positions;
    std::vector<float> landmarks;
    for (const auto& [position, rows] : model.landmarks) {
      positions.push_back(static_cast<int64_t>(position));
      for (size_t d = 0; d < kKeyDim; ++d) {
        landmarks.push_back(kernels::Bf16ToFloat(rows[head * kKeyDim + d]));
      }
    }
    index::BuildInput input;
    input.view = {
        kShape,
        absl::MakeConstSpan(segments_).first(static_cast<size_t>(covered / index::kSegmentTokens)),
        {}};
    input.group = kGroup;
    input.landmarks = landmarks;
    input.landmark_positions = positions;
    built_ = index::BuildLandmark(input, model.options);
  }

  index::SearchResult Search(const float* queries, const index::SearchOptions& options,
                             index::Scratch& scratch) const {
    const index::KvView view{kShape, segments_, tail_, tail_tokens_};
    return built_->Search(view, {queries, kGroup, 0, view.Tokens()}, options, scratch);
  }

 private:
  std::vector<uint16_t> keys_;
  std::vector<uint16_t> values_;
  std::vector<std::shared_ptr<const index::Segment>> segments_;
  std::vector<index::TailChunkView> tail_;
  int64_t tail_tokens_ = 0;
  std::shared_ptr<const index::BuiltIndex> built_;
};

class LandmarkSessionTest : public testing::TestWithParam<uint32_t> {
 protected:
  static DaemonOptions Options() {
    DaemonOptions options = Service::SmallOptions(2);
    options.build_from_tokens = 1024;
    return options;
  }
  LandmarkSessionTest() : service_(Options()), random_(GetParam()) {}

  size_t Below(size_t count) {
    return std::uniform_int_distribution<size_t>(0, count - 1)(random_);
  }
  bool OneIn(size_t count) { return Below(count) == 0; }
  uint32_t Seed() { return static_cast<uint32_t>(random_()); }

  Model Open(index::LandmarkSummary summary, int block) {
    proto::OpenSessionRequest request;
    *request.mutable_shape() = OneLayer();
    request.add_build(proto::INDEX_LANDMARK);
    request.mutable_landmark()->set_summary(
        static_cast<proto::LandmarkSummary>(static_cast<int>(summary) + 1));
    request.mutable_landmark()->set_block(static_cast<uint32_t>(block));
    const auto answer = service_.Call(request);
    EXPECT_TRUE(answer.ok()) << answer.status;
    return {answer.message.session(), {block, summary}, {}, {}};
  }

  /// Appends `count` tokens after repeating the last `repeated`, with landmarks of a share of the
  /// blocks that end in them.
  void Append(Model& model, size_t repeated, size_t count, double share, size_t samples = 0) {
    const size_t start = model.tokens() - repeated;
    const Rows added = RandomRows(Seed(), OneLayer(), count);
    Rows sent = RandomRows(Seed(), OneLayer(), repeated);  // a retry, with other rows
    sent.keys.insert(sent.keys.end(), added.keys.begin(), added.keys.end());
    sent.values.insert(sent.values.end(), added.values.begin(), added.values.end());
    proto::AppendRequest request;
    *request.mutable_session() = model.ref;
    request.set_start(start);
    request.set_tokens(static_cast<uint32_t>(repeated + count));
    for (size_t i = 0; i < samples; ++i) request.add_query_positions(start + i);
    const std::vector<uint16_t> queries = reference::RandomElements(
        Seed(), samples * kKvHeads * kGroup * kKeyDim, 1.0F, kernels::DType::kBf16);
    std::vector<uint16_t> landmarks;
    const bool given = model.options.summary == index::LandmarkSummary::kGiven;
    for (uint64_t end = (start / model.block() + 1) * model.block();
         given && end <= start + repeated + count; end += model.block()) {
      if (std::uniform_real_distribution(0.0, 1.0)(random_) >= share) continue;
      const uint64_t position = end - model.block();
      std::vector<uint16_t> rows =
          reference::RandomElements(Seed(), kBlockElements, 1.0F, kernels::DType::kBf16);
      request.add_landmark_positions(position);
      landmarks.insert(landmarks.end(), rows.begin(), rows.end());
      model.landmarks.emplace(position, std::move(rows));  // the first stays
    }
    const auto answer = service_.Call(
        request, Tensors().Add(sent.keys).Add(sent.values).Add(queries).Add(landmarks));
    ASSERT_TRUE(answer.ok()) << answer.status;
    model.rows.keys.insert(model.rows.keys.end(), added.keys.begin(), added.keys.end());
    model.rows.values.insert(model.rows.values.end(), added.values.begin(), added.values.end());
    ASSERT_EQ(answer.message.tokens_held(), model.tokens());
  }

  Model Fork(const Model& model, size_t tokens) {
    Model copy = model;
    proto::ForkRequest request;
    *request.mutable_session() = model.ref;
    request.set_tokens(tokens);
    const auto answer = service_.Call(request);
    EXPECT_TRUE(answer.ok()) << answer.status;
    copy.ref = answer.message.session();
    copy.Truncate(tokens);
    return copy;
  }
  void Truncate(Model& model, size_t tokens) {
    proto::TruncateRequest request;
    *request.mutable_session() = model.ref;
    request.set_tokens(tokens);
    const auto answer = service_.Call(request);
    ASSERT_TRUE(answer.ok()) << answer.status;
    model.Truncate(tokens);
  }
  void Close(const Model& model) {
    proto::CloseSessionRequest request;
    *request.mutable_session() = model.ref;
    ASSERT_TRUE(service_.Call(request).ok());
  }

  std::shared_ptr<const LayerState> State(const Model& model) {
    const auto session = service_.store().Find(model.ref.boot_id(), model.ref.session_id(), "",
                                               std::chrono::steady_clock::now());
    EXPECT_TRUE(session.ok()) << session.status();
    return (*session)->State(0);
  }
  /// Waits until no build of the session is due, and returns what each head's index covers.
  std::vector<int64_t> Settle(const Model& model) {
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    const int64_t sealed = index::SealedTokens(static_cast<int64_t>(model.tokens()));
    std::vector<int64_t> covered;
    while (std::chrono::steady_clock::now() < late) {
      const std::shared_ptr<const LayerState> state = State(model);
      covered.clear();
      for (size_t head = 0; head < kKvHeads; ++head) {
        const index::BuiltIndex* const built = state->Built(head, kKind);
        const int64_t held = built == nullptr ? 0 : built->covered();
        const bool grown =
            built == nullptr ? sealed >= 1024 : sealed - held >= std::max<int64_t>(4096, held / 8);
        if (grown || (held > 0 && state->Landmarks(held) != state->indexes->landmarks_built[head]))
          break;
        covered.push_back(held);
      }
      if (covered.size() == kKvHeads) return covered;
      std::this_thread::sleep_for(milliseconds(1));
    }
    ADD_FAILURE() << "builds do not come to an end";
    return std::vector<int64_t>(kKvHeads);
  }

  /// Attend or TopK by landmark, against the library. False where nothing is built.
  bool Search(Model& model) {
    Append(model, 0, 1, 1.0);  // it is appends that start builds, also of what forks and cuts lost
    const std::vector<int64_t> covered = Settle(model);
    if (*std::min_element(covered.begin(), covered.end()) == 0) return false;
    const std::vector<float> queries =
        reference::RandomFloats(Seed(), kKvHeads * kGroup * kKeyDim, 1.0F);
    const bool top_k = OneIn(2);
    index::SearchOptions options{.k = top_k ? 20 : -1, .candidates = 200, .list_read = !top_k};
    std::vector<float> out;
    std::vector<float> lse;
    std::vector<int64_t> positions;
    for (size_t head = 0; head < kKvHeads; ++head) {
      const ModelHead own(model, head, covered[head]);
      const auto result = own.Search(queries.data() + head * kGroup * kKeyDim, options, scratch_);
      out.insert(out.end(), result.out.begin(), result.out.end());
      lse.insert(lse.end(), result.lse.begin(), result.lse.end());
      positions.insert(positions.end(), result.positions.begin(), result.positions.end());
    }
    proto::TopKRequest request;  // its fields are those of Attend and more
    proto::QueryItem& item = *request.add_items();
    *item.mutable_session() = model.ref;
    item.set_tokens(1);
    request.mutable_options()->set_index(proto::INDEX_LANDMARK);
    request.mutable_options()->set_candidates(200);
    request.set_query_dtype(proto::DTYPE_FP32);
    if (top_k) {
      request.set_k(20);
      request.set_with_state(true);
      const auto answer = service_.Call(request, Tensors().Add(queries));
      EXPECT_TRUE(answer.ok()) << answer.status;
      Tensors tensors = answer.tensors;
      EXPECT_EQ(tensors.bytes(), Tensors().Add(positions).Add(out).Add(lse).bytes());
      return true;
    }
    proto::AttendRequest attend;
    *attend.mutable_items() = request.items();
    *attend.mutable_options() = request.options();
    attend.mutable_options()->set_list_read(true);
    attend.set_query_dtype(proto::DTYPE_FP32);
    const auto answer = service_.Call(attend, Tensors().Add(queries));
    EXPECT_TRUE(answer.ok()) << answer.status;
    Tensors tensors = answer.tensors;
    EXPECT_EQ(tensors.bytes(), Tensors().Add(out).Add(lse).Add(positions).bytes());
    for (const proto::Report& report : answer.message.reports()) {
      EXPECT_EQ(report.index(), proto::INDEX_LANDMARK);
    }
    return true;
  }

  proto::SessionInfo Info(const Model& model) {
    proto::StatsRequest request;
    request.set_with_sessions(true);
    request.set_session_id(model.ref.session_id());
    const auto answer = service_.Call(request);
    EXPECT_EQ(answer.message.sessions_size(), 1);
    return answer.message.sessions(0);
  }

  Service service_;
  std::mt19937_64 random_;
  index::Scratch scratch_;
};

TEST_P(LandmarkSessionTest, AgreesWithTheLibrary) {
  std::vector<Model> sessions;
  int searched = 0;
  for (int i = 0; i < 300; ++i) {
    SCOPED_TRACE(testing::Message() << "operation " << i);
    const size_t dice = Below(100);
    if (sessions.empty() || (dice < 6 && sessions.size() < 4)) {
      const auto summary =
          OneIn(4) ? index::LandmarkSummary::kBounds : index::LandmarkSummary::kGiven;
      sessions.push_back(Open(summary, 16 << Below(5)));
      Append(sessions.back(), 0, 1000 + Below(3000), 0.7);
    }
    Model& model = sessions[Below(sessions.size())];
    if (dice < 45) {
      const size_t count = OneIn(6) ? Below(3000) : OneIn(2) ? 1 + Below(20) : Below(400);
      if (model.tokens() + count > 10000) continue;
      const size_t repeated = OneIn(3) ? Below(std::min<size_t>(model.tokens(), 2000) + 1) : 0;
      Append(model, repeated, count, OneIn(3) ? 1.0 : 0.5);
    } else if (dice < 55) {
      if (sessions.size() < 5) sessions.push_back(Fork(model, Below(model.tokens() + 1)));
    } else if (dice < 65) {
      const size_t back = OneIn(3) ? Below(3000) : Below(100);
      Truncate(model, model.tokens() - std::min(model.tokens(), back));
    } else if (dice < 69) {
      Close(model);
      sessions.erase(sessions.begin() + (&model - sessions.data()));
    } else {
      searched += Search(model) ? 1 : 0;
      if (model.options.summary == index::LandmarkSummary::kGiven) {
        EXPECT_EQ(Info(model).landmarks_given(), model.landmarks.size());
      }
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(searched, 40);
  for (const Model& model : sessions) Close(model);
  for (int i = 0; i < 1000 && service_.budget().used_bytes() > 0; ++i) {
    std::this_thread::sleep_for(milliseconds(1));  // workers let go of their last jobs
  }
  EXPECT_EQ(service_.budget().used_bytes(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Seeds, LandmarkSessionTest, testing::Values(1, 2, 3));

using LandmarkBuildTest = LandmarkSessionTest;
INSTANTIATE_TEST_SUITE_P(OneSeed, LandmarkBuildTest, testing::Values(7));

TEST_P(LandmarkBuildTest, ALandmarkThatComesLateIsBuiltIn) {
  Model model = Open(index::LandmarkSummary::kGiven, 64);
  Append(model, 0, 5000, 0.0);
  EXPECT_TRUE(Search(model));  // all by means
  const uint64_t built = service_.builder().built();
  EXPECT_EQ(State(model)->indexes->landmarks_built[0], 0);
  Append(model, 4990, 0, 1.0);
  EXPECT_TRUE(Search(model));
  EXPECT_EQ(State(model)->indexes->landmarks_built[0], 4096 / 64);
  EXPECT_GE(service_.builder().built(), built + kKvHeads);
  const uint64_t now = service_.builder().built();
  Append(model, 4990, 0, 1.0);  // a repeat changes nothing
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_EQ(service_.builder().built(), now);
  EXPECT_TRUE(Search(model));
}

TEST_P(LandmarkBuildTest, StatsTellHowItIsBuilt) {
  Model model = Open(index::LandmarkSummary::kMean, 128);
  EXPECT_EQ(Info(model).landmark().summary(), proto::LANDMARK_MEAN);
  EXPECT_EQ(Info(model).landmark().block(), 128U);
  const Model fork = Fork(model, 0);
  EXPECT_EQ(Info(fork).landmark().block(), 128U);
  proto::OpenSessionRequest plain;
  *plain.mutable_shape() = OneLayer();
  model.ref = service_.Call(plain).message.session();
  EXPECT_FALSE(Info(model).has_landmark());
  plain.add_build(proto::INDEX_LANDMARK);
  model.ref = service_.Call(plain).message.session();
  EXPECT_EQ(Info(model).landmark().summary(), proto::LANDMARK_BOUNDS);
  EXPECT_EQ(Info(model).landmark().block(), 16U);
}

TEST_P(LandmarkBuildTest, MeansAreBuiltAnewOnceThereAreQueries) {
  Model model = Open(index::LandmarkSummary::kMean, 32);
  Append(model, 0, 3000, 0.0);
  EXPECT_TRUE(Search(model));
  const uint64_t built = service_.builder().built();
  Append(model, 0, 100, 0.0, /*samples=*/70);
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (service_.builder().built() < built + kKvHeads && std::chrono::steady_clock::now() < late) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_EQ(service_.builder().built(), built + kKvHeads);
  EXPECT_TRUE(State(model)->Learned(0, kKind));
}

TEST_P(LandmarkBuildTest, MemoryOfLandmarksCounts) {
  Model with = Open(index::LandmarkSummary::kGiven, 16);
  Append(with, 0, 1000, 0.0);
  const uint64_t bytes = Info(with).bytes();
  const uint64_t used = service_.budget().used_bytes();
  Append(with, 1000, 0, 1.0);
  const uint64_t landmarks = LandmarkKeys::Bytes(1000, 16, kBlockElements);
  EXPECT_EQ(Info(with).bytes(), bytes + landmarks);
  EXPECT_EQ(service_.budget().used_bytes(), used + landmarks);
  const Model fork = Fork(with, with.tokens());
  EXPECT_LT(service_.budget().used_bytes(), used + landmarks + (16U << 10));
  SessionSettings settings;
  settings.layers = 3;
  settings.kv_heads = kKvHeads;
  settings.kv = kShape;
  const uint64_t without = Session::KvBytes(settings, 5000);
  settings.build = 1U << static_cast<uint32_t>(kKind);
  settings.landmark.summary = index::LandmarkSummary::kGiven;
  EXPECT_EQ(Session::KvBytes(settings, 5000),
            without + 3 * LandmarkKeys::Bytes(5000, 16, kBlockElements));
}

TEST_P(LandmarkBuildTest, AnswersStayRightWhileLandmarksComeLate) {
  Model model = Open(index::LandmarkSummary::kGiven, 32);
  Append(model, 0, 6000, 0.0);
  Settle(model);
  std::atomic<bool> stop{false};
  std::vector<std::thread> askers;
  for (uint32_t i = 0; i < 2; ++i) {
    askers.emplace_back([&, i] {
      proto::AttendRequest request;
      proto::QueryItem& item = *request.add_items();
      *item.mutable_session() = model.ref;
      item.set_tokens(1);
      item.add_range_end(6000);
      request.set_query_dtype(proto::DTYPE_FP32);
      request.mutable_options()->set_candidates(1 << 20);
      const std::vector<float> queries =
          reference::RandomFloats(i, kKvHeads * kGroup * kKeyDim, 1.0F);
      const auto ask = [&](proto::IndexKind index) {
        request.mutable_options()->set_index(index);
        auto answer = service_.Call(request, Tensors().Add(queries));
        EXPECT_TRUE(answer.ok()) << answer.status;
        EXPECT_EQ(answer.message.reports(0).index(), index);
        return answer.tensors.Take<float>(kKvHeads * kGroup * kValueDim);
      };
      const std::vector<float> exact = ask(proto::INDEX_EXACT);
      while (!stop.load()) {
        const std::vector<float> answer = ask(proto::INDEX_LANDMARK);
        ASSERT_EQ(answer.size(), exact.size());
        for (size_t e = 0; e < exact.size(); ++e) ASSERT_NEAR(answer[e], exact[e], 1e-4F);
      }
    });
  }
  for (int round = 0; round < 20; ++round) {
    Append(model, 6000, 0, 0.1);
    Settle(model);
  }
  stop.store(true);
  for (std::thread& asker : askers) asker.join();
  EXPECT_TRUE(Search(model));
}

}  // namespace
}  // namespace kvseek::service
