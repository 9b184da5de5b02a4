// Questions to several daemons, put together, against one daemon that holds all heads.
#include "client/decoder/far_attention.h"

#include <gtest/gtest.h>

#include <random>

#include "service/daemon.h"
#include "tests/client/raw_socket.h"

namespace kvseek::client {
namespace {

constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 4, .query_heads = 12, .key_dim = 64, .value_dim = 32};
constexpr uint32_t kTokens = 300;
constexpr std::chrono::seconds kDeadline{20};

class FarAttentionTest : public testing::Test {
 protected:
  FarAttentionTest() {
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<uint16_t>& rows, size_t count) {
      rows.resize(count);
      for (uint16_t& element : rows) element = kernels::FloatToBf16(normal(random_));
    };
    fill(keys_, size_t{kTokens} * kShape.kv_heads * kShape.key_dim);
    fill(values_, size_t{kTokens} * kShape.kv_heads * kShape.value_dim);
    fill(queries_, size_t{2} * 2 * kShape.query_heads * kShape.key_dim);
  }

  /// Starts `count` daemons and gives each its heads, twice: for two sequences.
  void Start(uint32_t count) {
    for (uint32_t d = 0; d < count; ++d) {
      service::DaemonOptions options;
      options.listen = {"unix:" + directory_.path() + "/" + std::to_string(d)};
      options.workers = 1;
      auto daemon = service::Daemon::Start(options);
      ASSERT_TRUE(daemon.ok()) << daemon.status();
      auto client = KvClient::Connect({.address = (*daemon)->addresses()[0]});
      ASSERT_TRUE(client.ok()) << client.status();
      const uint32_t heads = kShape.kv_heads / count;
      shares_.push_back({client->get(), client->get(), d * heads, heads});
      daemons_.push_back(*std::move(daemon));
      clients_.push_back(*std::move(client));
    }
    for (std::vector<Session>& sessions : sessions_) {
      for (const DaemonShare& share : shares_) sessions.push_back(Fill(share));
    }
  }

  Session Fill(const DaemonShare& share) {
    auto session =
        share.tokens->Open(ShapeOfShare(kShape, share), {.plan = PlanOfShare(plan_, share)});
    EXPECT_TRUE(session.ok()) << session.status();
    const auto part = [&](const std::vector<uint16_t>& rows, uint32_t dim) {
      std::vector<uint16_t> out;
      for (uint32_t t = 0; t < kTokens; ++t) {
        const auto row = rows.begin() + (t * kShape.kv_heads + share.first_head) * dim;
        out.insert(out.end(), row, row + share.heads * dim);
      }
      return out;
    };
    const auto held = share.tokens->Append(*session, 0, 0, kTokens, part(keys_, kShape.key_dim),
                                           part(values_, kShape.value_dim));
    EXPECT_TRUE(held.ok()) << held.status();
    return *session;
  }

  FarQuestion Question(uint32_t tokens, absl::Span<const HeadMode> modes) {
    batch_.clear();
    for (size_t b = 0; b < 2; ++b) {
      FarSequence& sequence = batch_.emplace_back();
      sequence.sessions = sessions_[b];
      sequence.lost = lost_[b];
      sequence.begin = 16;
      sequence.end = 200 + 50 * b;
      sequence.caches = caches_[b].data();
    }
    FarQuestion question;
    question.tokens = tokens;
    question.batch = batch_;
    question.queries = queries_.data();
    question.modes = modes;
    question.rows = rows_;
    question.options.index = IndexKind::kExact;
    question.deadline = kDeadline;
    return question;
  }

  static void Ask(FarAttention& far, const FarQuestion& question) {
    far.Prepare(question);
    far.Send();
  }

  /// What one session with all heads answers.
  SearchResponse Whole(const FarQuestion& question, size_t b) {
    KvClient& client = *clients_[0];
    if (whole_.session_id == 0) whole_ = Fill({&client, &client, 0, kShape.kv_heads});
    AttendRequest request;
    QueryItem& item = request.items.emplace_back();
    item.session = whole_;
    item.tokens = question.tokens;
    const size_t elements = size_t{question.tokens} * kShape.query_heads * kShape.key_dim;
    item.queries = AsBytes(absl::MakeConstSpan(queries_).subspan(b * elements, elements));
    item.range_begin = question.batch[b].begin;
    item.range_end = {question.batch[b].end};
    request.options = question.options;
    request.query_dtype = DType::kBf16;
    request.state_dtype = DType::kFp16;
    auto answer = client.Attend(request, {.deadline = kDeadline});
    EXPECT_TRUE(answer.ok()) << answer.status();
    return answer.ok() ? *std::move(answer) : SearchResponse{.items = {{}}};
  }

  /// The lse of token t and KV head `head` in an answer for `heads` KV heads is that of the whole.
  static void ExpectSameState(const ItemResult& item, size_t t, size_t h, size_t heads,
                              const ItemResult& whole, size_t head) {
    const size_t group = kShape.Group();
    for (size_t g = 0; g < group; ++g) {
      const size_t from = (t * heads + h) * group + g;
      const size_t to = (t * kShape.kv_heads + head) * group + g;
      EXPECT_EQ(item.lse[from], whole.lse[to]);
      for (size_t d = 0; d < kShape.value_dim; ++d) {
        EXPECT_EQ(item.out[from * kShape.value_dim + d], whole.out[to * kShape.value_dim + d]);
      }
    }
  }

  const uint64_t seed_ = std::random_device()();
  std::mt19937_64 random_{seed_};
  testing::ScopedTrace trace_{__FILE__, __LINE__, seed_};
  test::TempDir directory_;
  std::vector<std::unique_ptr<service::Daemon>> daemons_;
  std::vector<std::unique_ptr<KvClient>> clients_;
  std::vector<DaemonShare> shares_;
  std::vector<Session> sessions_[2];
  std::vector<uint8_t> lost_[2] = {std::vector<uint8_t>(4), std::vector<uint8_t>(4)};
  std::vector<RowCache> caches_[2] = {{4, RowCache(64)}, {4, RowCache(64)}};
  std::vector<FarSequence> batch_;
  HeadPlan plan_;
  std::vector<uint32_t> rows_ = std::vector<uint32_t>(kShape.kv_heads, 20);
  Session whole_;
  std::vector<uint16_t> keys_, values_, queries_;
};

TEST_F(FarAttentionTest, StatesOfSeveralDaemonsAreTheWhole) {
  for (const uint32_t daemons : {1, 2, 4}) {
    shares_.clear();
    for (auto& sessions : sessions_) sessions.clear();
    clients_.clear();
    daemons_.clear();
    whole_ = {};
    Start(daemons);
    FarAttention far(kShape, shares_, std::chrono::microseconds(50));
    const std::vector<HeadMode> modes(kShape.kv_heads, HeadMode::kState);
    for (const uint32_t tokens : {1, 2}) {
      const FarQuestion question = Question(tokens, modes);
      far.BeginStep();
      Ask(far, question);
      size_t seen = 0;
      for (const FarReply& reply : far.Wait()) {
        ASSERT_TRUE(reply.answer.ok()) << reply.answer.status();
        EXPECT_FALSE(reply.rows);
        ASSERT_EQ(reply.batch, (std::vector<uint32_t>{0, 1}));
        for (size_t b = 0; b < 2; ++b) {
          const SearchResponse whole = Whole(question, b);
          for (size_t h = 0; h < reply.heads.size(); ++h) {
            ++seen;
            for (size_t t = 0; t < tokens; ++t) {
              ExpectSameState(reply.answer->items[b], t, h, reply.heads.size(), whole.items[0],
                              reply.heads[h]);
            }
          }
        }
      }
      EXPECT_EQ(seen, 2 * kShape.kv_heads);
    }
  }
}

TEST_F(FarAttentionTest, HeadsGoTheirOwnWays) {
  Start(2);
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  const std::vector<HeadMode> modes{HeadMode::kState, HeadMode::kRows, HeadMode::kLocal,
                                    HeadMode::kRows};
  for (int repeat = 0; repeat < 2; ++repeat) {
    far.BeginStep();
    Ask(far, Question(2, modes));
    std::vector<uint32_t> state, rows;
    for (const FarReply& reply : far.Wait()) {
      ASSERT_TRUE(reply.answer.ok()) << reply.answer.status();
      auto& heads = reply.rows ? rows : state;
      heads.insert(heads.end(), reply.heads.begin(), reply.heads.end());
      if (!reply.rows) continue;
      for (size_t i = 0; i < reply.batch.size(); ++i) {
        const std::vector<Selection>& selections = reply.answer->items[i].selections;
        ASSERT_EQ(selections.size(), 2 * reply.heads.size());
        for (size_t h = 0; h < reply.heads.size(); ++h) {
          std::vector<absl::Span<const int64_t>> positions;
          for (size_t t = 0; t < 2; ++t) {
            const Selection& selection = selections[t * reply.heads.size() + h];
            EXPECT_EQ(selection.positions.size(), 20U);
            // The second time all of them are held.
            EXPECT_EQ(selection.keys.size(), repeat == 0 ? 20U * kShape.key_dim : 0U);
            positions.emplace_back(selection.positions);
          }
          std::vector<int32_t> slots(40);
          caches_[reply.batch[i]][reply.heads[h]].Admit(positions, slots.data());
        }
      }
    }
    EXPECT_EQ(state, (std::vector<uint32_t>{0}));
    EXPECT_EQ(rows, (std::vector<uint32_t>{1, 3}));
  }
}

TEST_F(FarAttentionTest, HeadsHaveTheirOwnNumbersOfRows) {
  Start(2);
  rows_ = {20, 33, 7, 7};
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  const std::vector<HeadMode> modes(kShape.kv_heads, HeadMode::kRows);
  Ask(far, Question(2, modes));
  std::vector<std::vector<uint32_t>> heads;
  for (const FarReply& reply : far.Wait()) {
    ASSERT_TRUE(reply.answer.ok()) << reply.answer.status();
    heads.push_back(reply.heads);
    for (const ItemResult& item : reply.answer->items) {
      ASSERT_EQ(item.selections.size(), 2 * reply.heads.size());
      for (const Selection& selection : item.selections) {
        EXPECT_EQ(selection.positions.size(), rows_[reply.heads[0]]);
      }
    }
  }
  EXPECT_EQ(heads, (std::vector<std::vector<uint32_t>>{{0}, {1}, {2, 3}}));
}

TEST_F(FarAttentionTest, HeadsAreAnsweredAsTheirSessionsPlan) {
  HeadPlan plan;
  for (uint32_t head = 0; head < kShape.kv_heads; ++head) {
    plan.heads.push_back({.kv_head = head, .index = head % 2 == 0 ? "exact" : "ladder"});
    plan.heads.back().candidates = 64 + head;
  }
  plan_ = plan;
  Start(2);
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  const std::vector<HeadMode> modes{HeadMode::kState, HeadMode::kRows, HeadMode::kRows,
                                    HeadMode::kState};
  FarQuestion question = Question(1, modes);
  question.options.index = IndexKind::kAuto;
  Ask(far, question);
  size_t seen = 0;
  for (const FarReply& reply : far.Wait()) {
    ASSERT_TRUE(reply.answer.ok()) << reply.answer.status();
    for (const ItemResult& item : reply.answer->items) {
      for (size_t h = 0; h < reply.heads.size(); ++h) {
        const IndexKind expected = reply.heads[h] % 2 == 0 ? IndexKind::kExact : IndexKind::kLadder;
        EXPECT_EQ(item.reports[h].index, expected) << reply.heads[h];
        ++seen;
      }
    }
  }
  EXPECT_EQ(seen, 2 * kShape.kv_heads);
}

TEST(ModelOfShareTest, ASharesHeadsAreAModelOfTheirOwn) {
  const ModelShape shape{.layers = 1, .kv_heads = 8, .query_heads = 16};
  const auto share = [](uint32_t first, uint32_t heads) {
    return DaemonShare{.first_head = first, .heads = heads};
  };
  EXPECT_EQ(ModelOfShare("", shape, share(0, 4)), "");
  EXPECT_EQ(ModelOfShare("m", shape, share(0, 8)), "m");
  EXPECT_EQ(ModelOfShare("m", shape, share(0, 4)), "m kv_heads 0..3");
  EXPECT_EQ(ModelOfShare("m", shape, share(4, 4)), "m kv_heads 4..7");
}

TEST(PlanOfShareTest, HasTheSharesHeadsUnderTheirNumbersThere) {
  HeadPlan plan = PlanOfModes(4, std::vector<HeadMode>(8, HeadMode::kRows));
  const DaemonShare share{.first_head = 2, .heads = 2};
  EXPECT_FALSE(PlanOfShare(plan, share).has_value());  // modes are no daemon's matter
  plan.heads[1].candidates = 5;
  EXPECT_FALSE(PlanOfShare(plan, share).has_value());  // of another share's head
  plan.heads[7].index = "cluster";
  const std::optional<HeadPlan> part = PlanOfShare(plan, share);
  ASSERT_TRUE(part.has_value());
  ASSERT_EQ(part->heads.size(), 4U);
  EXPECT_EQ(part->heads[0], (PlannedHead{0, 0, HeadMode::kRows}));
  EXPECT_EQ(part->heads[3], (PlannedHead{1, 1, HeadMode::kRows, "cluster"}));
  EXPECT_TRUE(PlanOfShare({.scan_bits = 1}, share).has_value());
}

TEST_F(FarAttentionTest, QueriesMayComeAfterAllElse) {
  Start(2);
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  const std::vector<HeadMode> modes{HeadMode::kRows, HeadMode::kState, HeadMode::kState,
                                    HeadMode::kRows};
  const std::vector<uint16_t> queries = queries_;
  for (const uint32_t tokens : {1, 2}) {
    const auto ask = [&](bool late) {
      FarQuestion question = Question(tokens, modes);
      if (late) std::fill(queries_.begin(), queries_.end(), uint16_t{0});
      far.Prepare(question);
      queries_ = queries;
      far.Send();
      std::vector<std::vector<float>> lse;
      for (const FarReply& reply : far.Wait()) {
        EXPECT_TRUE(reply.answer.ok()) << reply.answer.status();
        if (!reply.answer.ok()) continue;
        for (const ItemResult& item : reply.answer->items) {
          lse.emplace_back(item.lse.begin(), item.lse.end());
        }
      }
      return lse;
    };
    const auto early = ask(false);
    EXPECT_EQ(early.size(), 8U);
    EXPECT_EQ(ask(true), early);
  }
}

TEST_F(FarAttentionTest, NothingIsSentBeforeItIsTold) {
  Start(1);
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  const std::vector<HeadMode> modes(kShape.kv_heads, HeadMode::kState);
  far.Prepare(Question(1, modes));
  EXPECT_EQ(far.Wait()[0].answer.status().code(), absl::StatusCode::kUnknown);
  Ask(far, Question(1, modes));
  EXPECT_TRUE(far.Wait()[0].answer.ok());
}

TEST_F(FarAttentionTest, AsksNobodyForNothing) {
  Start(1);
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  Ask(far, Question(1, std::vector<HeadMode>(kShape.kv_heads, HeadMode::kLocal)));
  EXPECT_TRUE(far.Wait().empty());
  const std::vector<HeadMode> modes(kShape.kv_heads, HeadMode::kState);
  FarQuestion question = Question(1, modes);
  for (FarSequence& sequence : batch_) sequence.end = sequence.begin;
  Ask(far, question);
  EXPECT_TRUE(far.Wait().empty());
}

TEST_F(FarAttentionTest, MissesOneDaemonAlone) {
  Start(2);
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  daemons_[1]->Stop();
  const std::vector<HeadMode> modes(kShape.kv_heads, HeadMode::kState);
  const auto ask = [&] {
    FarQuestion question = Question(1, modes);
    question.deadline = std::chrono::milliseconds(300);
    Ask(far, question);
    const auto& replies = far.Wait();
    EXPECT_EQ(replies.size(), 2U);
    EXPECT_TRUE(replies[0].answer.ok());
    return replies[1].answer.status();
  };
  const absl::Status missed = ask();
  EXPECT_TRUE(missed.code() == absl::StatusCode::kUnavailable ||
              missed.code() == absl::StatusCode::kDeadlineExceeded)
      << missed;
  const auto begun = std::chrono::steady_clock::now();
  EXPECT_EQ(ask().message(), "the daemon missed earlier in this step");
  EXPECT_LT(std::chrono::steady_clock::now() - begun, std::chrono::milliseconds(200));
  far.BeginStep();
  EXPECT_NE(ask().message(), "the daemon missed earlier in this step");
}

TEST_F(FarAttentionTest, OneLostSessionIsNotTheOthersLoss) {
  Start(1);
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  const std::vector<HeadMode> modes(kShape.kv_heads, HeadMode::kState);
  const Session whole = sessions_[1][0];
  Session of_another_boot = whole;
  ++of_another_boot.boot_id;
  Session closed = Fill(shares_[0]);
  ASSERT_TRUE(clients_[0]->Close(closed).ok());
  for (const Session& gone : {of_another_boot, closed}) {
    sessions_[1][0] = gone;
    Ask(far, Question(1, modes));
    const auto& replies = far.Wait();
    ASSERT_EQ(replies.size(), 1U);
    EXPECT_TRUE(IsLost(replies[0].answer.status())) << replies[0].answer.status();
    EXPECT_EQ(replies[0].batch, (std::vector<uint32_t>{0, 1}));
    EXPECT_EQ(replies[0].lost, (std::vector<uint32_t>{1}));
  }
  sessions_[1][0] = whole;
  Ask(far, Question(1, modes));
  EXPECT_TRUE(far.Wait()[0].answer.ok());
  EXPECT_TRUE(far.Wait()[0].lost.empty());
}

TEST_F(FarAttentionTest, LostSessionsAreNotAskedFor) {
  Start(1);
  lost_[1][0] = 1;
  FarAttention far(kShape, shares_, std::chrono::microseconds(50));
  const std::vector<HeadMode> modes(kShape.kv_heads, HeadMode::kState);
  Ask(far, Question(1, modes));
  const auto& replies = far.Wait();
  ASSERT_EQ(replies.size(), 2U);
  EXPECT_EQ(replies[0].answer.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(replies[0].batch.empty());
  EXPECT_EQ(replies[0].lost, (std::vector<uint32_t>{1}));
  EXPECT_TRUE(replies[1].answer.ok());
  EXPECT_EQ(replies[1].batch, (std::vector<uint32_t>{0}));
}

}  // namespace
}  // namespace kvseek::client
