// Served = computed: what comes through a socket is, bit for bit, what the index library answers on
// the same rows, whatever the transport and the number of workers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <future>
#include <random>
#include <thread>

#include "client/kv_client.h"
#include "index/key_index.h"
#include "service/daemon.h"
#include "tests/client/raw_socket.h"

namespace kvseek {
namespace {

using std::chrono::milliseconds;

constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 6, .key_dim = 64, .value_dim = 64};
constexpr uint32_t kTokens = 2 * index::kSegmentTokens + 200;

/// Bits, so that -0 and NaN count too.
std::vector<uint8_t> Bits(absl::Span<const float> values) {
  const absl::Span<const uint8_t> bytes = AsBytes(values);
  return {bytes.begin(), bytes.end()};
}

/// The rows of one layer, as the client sends them and as the index library reads them.
class Layer {
 public:
  explicit Layer(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<uint16_t>& rows, uint32_t dim) {
      rows.resize(size_t{kTokens} * kShape.kv_heads * dim);
      for (uint16_t& element : rows) element = kernels::FloatToBf16(normal(random));
    };
    fill(keys_, kShape.key_dim);
    fill(values_, kShape.value_dim);
    for (uint32_t head = 0; head < kShape.kv_heads; ++head) heads_.emplace_back(*this, head);
  }

  absl::Span<const uint16_t> Keys(uint32_t begin, uint32_t end) const {
    return Rows(keys_, kShape.key_dim, begin, end);
  }
  absl::Span<const uint16_t> Values(uint32_t begin, uint32_t end) const {
    return Rows(values_, kShape.value_dim, begin, end);
  }
  index::KvView View(uint32_t head) const {
    const Head& stored = heads_[head];
    return {kKvShape, stored.segments, stored.tail, stored.tail_tokens};
  }
  absl::Span<const uint16_t> KeyRow(uint32_t head, int64_t position) const {
    const auto row = static_cast<size_t>(position) * kShape.key_dim;
    return absl::MakeConstSpan(heads_[head].keys).subspan(row, kShape.key_dim);
  }
  absl::Span<const uint16_t> ValueRow(uint32_t head, int64_t position) const {
    const auto row = static_cast<size_t>(position) * kShape.value_dim;
    return absl::MakeConstSpan(heads_[head].values).subspan(row, kShape.value_dim);
  }

 private:
  static constexpr index::KvShape kKvShape{
      .key_dim = kShape.key_dim, .value_dim = kShape.value_dim, .softmax_scale = 0.125F};

  struct Head {
    Head(const Layer& layer, uint32_t head) {
      const auto gather = [head](const std::vector<uint16_t>& from, uint32_t dim) {
        std::vector<uint16_t> to;
        for (size_t t = 0; t < kTokens; ++t) {
          const auto row = from.begin() + static_cast<int64_t>((t * kShape.kv_heads + head) * dim);
          to.insert(to.end(), row, row + dim);
        }
        return to;
      };
      keys = gather(layer.keys_, kShape.key_dim);
      values = gather(layer.values_, kShape.value_dim);
      size_t done = 0;
      for (; done < index::SealedTokens(kTokens); done += index::kSegmentTokens) {
        segments.push_back(index::Segment::Build(kKvShape, keys.data() + done * kShape.key_dim,
                                                 values.data() + done * kShape.value_dim));
      }
      tail_tokens = kTokens - done;
      for (; done < kTokens; done += index::kTailChunkTokens) {
        tail.push_back(
            {keys.data() + done * kShape.key_dim, values.data() + done * kShape.value_dim});
      }
    }
    std::vector<uint16_t> keys;
    std::vector<uint16_t> values;
    std::vector<std::shared_ptr<const index::Segment>> segments;
    std::vector<index::TailChunkView> tail;
    int64_t tail_tokens = 0;
  };

  static absl::Span<const uint16_t> Rows(const std::vector<uint16_t>& all, uint32_t dim,
                                         uint32_t begin, uint32_t end) {
    const size_t row = size_t{kShape.kv_heads} * dim;
    return absl::MakeConstSpan(all).subspan(begin * row, (end - begin) * row);
  }

  std::vector<uint16_t> keys_;
  std::vector<uint16_t> values_;
  std::vector<Head> heads_;
};

const Layer& TestLayer(uint32_t layer) {
  static const Layer layers[] = {Layer(1), Layer(2)};
  return layers[layer];
}

struct Setting {
  std::string transport;
  int workers;
  IndexKind index;
  std::chrono::microseconds spin{0};  ///< of every thread that can
};

class ServedTest : public testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    service::DaemonOptions options;
    options.listen = {GetParam().transport == "tcp" ? "tcp://127.0.0.1:0"
                                                    : "unix:" + dir_.path() + "/s"};
    options.shared_ring_bytes = 64 << 10;  // so that frames are larger
    options.workers = GetParam().workers;
    options.io_spin = options.worker_spin = GetParam().spin;
    auto daemon = service::Daemon::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = KvClient::Connect({.address = address(),
                                     .default_deadline = std::chrono::seconds(30),
                                     .spin = GetParam().spin});
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    auto session = client_->Open(kShape, {.name = "served"});
    ASSERT_TRUE(session.ok()) << session.status();
    session_ = *session;
    for (uint32_t layer = 0; layer < kShape.layers; ++layer) {
      for (uint32_t start = 0; start < kTokens; start += 700) {
        const uint32_t end = std::min(kTokens, start + 700);
        const auto held =
            client_->Append(session_, layer, start, end - start, TestLayer(layer).Keys(start, end),
                            TestLayer(layer).Values(start, end));
        ASSERT_TRUE(held.ok()) << held.status();
        ASSERT_EQ(*held, end);
      }
    }
    std::mt19937_64 random(3);
    std::normal_distribution<float> normal;
    queries_.resize(size_t{kQueryTokens} * kShape.query_heads * kShape.key_dim);
    for (float& element : queries_) element = 1.5F * normal(random);
  }

  static constexpr uint32_t kQueryTokens = 3;
  static constexpr uint64_t kBegin = 16;

  std::vector<QueryItem> Items() const {
    const auto queries = absl::MakeConstSpan(queries_);
    QueryItem all{
        .session = session_,
        .layer = 0,
        .queries = AsBytes(queries.subspan(0, size_t{kShape.query_heads} * kShape.key_dim))};
    QueryItem some{.session = session_,
                   .layer = 1,
                   .tokens = kQueryTokens,
                   .queries = AsBytes(queries),
                   .range_begin = kBegin,
                   .range_end = {kTokens - 100, kTokens - 99, kTokens}};
    return {all, some};
  }
  SearchOptions Options() const {
    return {.index = GetParam().index, .candidates = 256, .exact_rows = 16};
  }

  /// What the library answers for one query token and KV head of an item.
  index::SearchResult Compute(const QueryItem& item, uint32_t token, uint32_t head,
                              index::SearchOptions options) const {
    options.candidates = 256;
    options.exact_rows = 16;
    const index::KeyIndex& index =
        GetParam().index == IndexKind::kExact ? index::ExactIndex() : index::LadderIndex();
    const auto* queries = reinterpret_cast<const float*>(item.queries.data());
    const size_t first = (size_t{token} * kShape.query_heads + head * kShape.Group());
    index::Scratch scratch;
    const uint64_t end = item.range_end.empty() ? kTokens : item.range_end[token];
    return index.Search(TestLayer(item.layer).View(head),
                        {queries + first * kShape.key_dim, static_cast<int>(kShape.Group()),
                         static_cast<int64_t>(item.range_begin), static_cast<int64_t>(end)},
                        options, scratch);
  }

  void ExpectState(const ItemResult& served, uint32_t token, uint32_t head,
                   const index::SearchResult& computed) const {
    const size_t first = size_t{token} * kShape.query_heads + head * kShape.Group();
    const auto out = served.out.begin() + static_cast<int64_t>(first * kShape.value_dim);
    const std::vector<float> served_out(out, out + static_cast<int64_t>(computed.out.size()));
    EXPECT_EQ(Bits(served_out), Bits(computed.out));
    const auto lse = served.lse.begin() + static_cast<int64_t>(first);
    const std::vector<float> served_lse(lse, lse + kShape.Group());
    EXPECT_EQ(Bits(served_lse), Bits(computed.lse));
    const Report& report = served.reports[token * kShape.kv_heads + head];
    EXPECT_EQ(Bits(report.missed_mass), Bits(computed.report.missed_mass));
    EXPECT_EQ(report.keys_exact, static_cast<uint64_t>(computed.report.keys_exact));
    EXPECT_EQ(report.keys_fine, static_cast<uint64_t>(computed.report.keys_fine));
    EXPECT_EQ(report.keys_scanned, static_cast<uint64_t>(computed.report.keys_scanned));
    EXPECT_EQ(report.index, GetParam().index);
  }

  std::string address() const {
    if (GetParam().transport == "shm") return "shm:" + dir_.path() + "/s";
    return daemon_->addresses()[0];
  }

  test::TempDir dir_;
  std::unique_ptr<service::Daemon> daemon_;
  std::unique_ptr<KvClient> client_;
  Session session_;
  std::vector<float> queries_;
};

INSTANTIATE_TEST_SUITE_P(
    Transports, ServedTest,
    testing::Values(Setting{"unix", 1, IndexKind::kLadder}, Setting{"unix", 4, IndexKind::kLadder},
                    Setting{"tcp", 1, IndexKind::kLadder}, Setting{"tcp", 4, IndexKind::kExact},
                    Setting{"unix", 4, IndexKind::kExact},
                    Setting{"unix", 2, IndexKind::kLadder, std::chrono::microseconds(500)},
                    Setting{"shm", 1, IndexKind::kLadder}, Setting{"shm", 4, IndexKind::kExact},
                    Setting{"shm", 2, IndexKind::kLadder, std::chrono::microseconds(500)}),
    [](const auto& at) {
      return at.param.transport + std::to_string(at.param.workers) +
             (at.param.index == IndexKind::kExact ? "Exact" : "Ladder") +
             (at.param.spin.count() > 0 ? "Spinning" : "");
    });

TEST_P(ServedTest, Attend) {
  AttendRequest request{.items = Items(), .options = Options()};
  request.options.list_read = true;
  const auto served = client_->Attend(request);
  ASSERT_TRUE(served.ok()) << served.status();
  ASSERT_EQ(served->items.size(), 2U);
  EXPECT_GT(served->bytes_sent, queries_.size() * sizeof(float));
  EXPECT_GE(served->daemon_us, 1U);
  EXPECT_GT(served->bytes_received, served->items[1].out.size() * sizeof(float));
  for (size_t i = 0; i < request.items.size(); ++i) {
    for (uint32_t token = 0; token < request.items[i].tokens; ++token) {
      for (uint32_t head = 0; head < kShape.kv_heads; ++head) {
        const auto computed = Compute(request.items[i], token, head, {.list_read = true});
        ExpectState(served->items[i], token, head, computed);
        EXPECT_EQ(served->items[i].selections[token * kShape.kv_heads + head].positions,
                  computed.positions);
      }
    }
  }
}

TEST_P(ServedTest, TopKWithRowsAndState) {
  const TopKRequest request{.items = Items(), .options = Options(), .k = 100};
  const auto served = client_->TopK(request);
  ASSERT_TRUE(served.ok()) << served.status();
  ASSERT_EQ(served->items.size(), 2U);
  for (size_t i = 0; i < request.items.size(); ++i) {
    const QueryItem& item = request.items[i];
    for (uint32_t token = 0; token < item.tokens; ++token) {
      for (uint32_t head = 0; head < kShape.kv_heads; ++head) {
        const auto computed = Compute(item, token, head, {.k = 100});
        ExpectState(served->items[i], token, head, computed);
        const Selection& selection = served->items[i].selections[token * kShape.kv_heads + head];
        ASSERT_EQ(selection.positions, computed.positions);
        ASSERT_EQ(selection.positions.size(), 100U);
        for (size_t p = 0; p < selection.positions.size(); ++p) {
          const auto key = TestLayer(item.layer).KeyRow(head, selection.positions[p]);
          const auto value = TestLayer(item.layer).ValueRow(head, selection.positions[p]);
          ASSERT_EQ(absl::MakeConstSpan(selection.keys).subspan(p * kShape.key_dim, key.size()),
                    key);
          ASSERT_EQ(
              absl::MakeConstSpan(selection.values).subspan(p * kShape.value_dim, value.size()),
              value);
        }
      }
    }
  }
}

TEST_P(ServedTest, PreparedAheadOfItsQueries) {
  std::vector<float> late(queries_.size());
  TopKRequest request{.items = Items(), .options = Options(), .k = 5};
  const auto expected = client_->TopK(request);
  ASSERT_TRUE(expected.ok()) << expected.status();
  for (QueryItem& item : request.items) {
    const auto offset = item.queries.data() - AsBytes(queries_).data();
    item.queries = AsBytes(late).subspan(static_cast<size_t>(offset), item.queries.size());
  }
  PreparedSearch first(request);
  PreparedSearch search = std::move(first);
  request = {};
  late = queries_;
  std::promise<absl::StatusOr<SearchResponse>> answer;
  client_->SendAsync(std::move(search), {},
                     [&](auto response) { answer.set_value(std::move(response)); });
  const auto served = answer.get_future().get();
  ASSERT_TRUE(served.ok()) << served.status();
  for (size_t i = 0; i < expected->items.size(); ++i) {
    EXPECT_EQ(served->items[i].selections[0].positions, expected->items[i].selections[0].positions);
    EXPECT_EQ(Bits(served->items[i].lse), Bits(expected->items[i].lse));
  }
  // What is wrong with a request is said when it is sent.
  std::promise<absl::Status> refused;
  client_->SendAsync(PreparedSearch(AttendRequest()), {},
                     [&](const auto& response) { refused.set_value(response.status()); });
  EXPECT_EQ(ErrorField(refused.get_future().get()), "items");
}

TEST_P(ServedTest, TopKOfPositionsOnly) {
  const TopKRequest request{
      .items = Items(), .options = Options(), .k = 5, .with_rows = false, .with_state = false};
  const auto served = client_->TopK(request);
  ASSERT_TRUE(served.ok()) << served.status();
  const Selection& selection = served->items[1].selections[3];
  EXPECT_EQ(selection.positions, Compute(request.items[1], 1, 1, {.k = 5}).positions);
  EXPECT_TRUE(selection.keys.empty());
  EXPECT_TRUE(served->items[0].out.empty());
}

TEST_P(ServedTest, QueriesInBf16) {
  std::vector<uint16_t> narrow(queries_.size());
  for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = kernels::FloatToBf16(queries_[i]);
  std::vector<float> wide(narrow.size());
  for (size_t i = 0; i < narrow.size(); ++i) wide[i] = kernels::Bf16ToFloat(narrow[i]);
  AttendRequest request{.items = {Items()[1]}, .options = Options(), .query_dtype = DType::kBf16};
  request.items[0].queries = AsBytes(absl::MakeConstSpan(narrow));
  const auto served = client_->Attend(request);
  ASSERT_TRUE(served.ok()) << served.status();
  QueryItem same = request.items[0];
  same.queries = AsBytes(absl::MakeConstSpan(wide));
  ExpectState(served->items[0], 2, 1, Compute(same, 2, 1, {}));
}

TEST_P(ServedTest, StatesInHalfPrecisionAreTheRoundedOnes) {
  AttendRequest attend{.items = Items(), .options = Options()};
  TopKRequest top_k{.items = Items(), .options = Options(), .k = 40};
  const auto compare = [](const absl::StatusOr<SearchResponse>& whole,
                          const absl::StatusOr<SearchResponse>& half) {
    ASSERT_TRUE(whole.ok()) << whole.status();
    ASSERT_TRUE(half.ok()) << half.status();
    ASSERT_EQ(whole->items.size(), half->items.size());
    EXPECT_LT(half->bytes_received, whole->bytes_received);
    for (size_t i = 0; i < whole->items.size(); ++i) {
      const ItemResult& item = half->items[i];
      EXPECT_EQ(whole->items[i].lse, item.lse);
      ASSERT_EQ(whole->items[i].out.size(), item.out.size());
      for (size_t e = 0; e < item.out.size(); ++e) {
        ASSERT_EQ(item.out[e], kernels::Fp16ToFloat(kernels::FloatToFp16(whole->items[i].out[e])));
      }
    }
  };
  const auto whole = client_->Attend(attend);
  attend.state_dtype = DType::kFp16;
  compare(whole, client_->Attend(attend));
  const auto whole_rest = client_->TopK(top_k);
  top_k.state_dtype = DType::kFp16;
  compare(whole_rest, client_->TopK(top_k));
  attend.state_dtype = DType::kBf16;
  EXPECT_EQ(ErrorField(client_->Attend(attend).status()), "state_dtype");
}

TEST_P(ServedTest, RowsForksAndCuts) {
  const std::vector<int64_t> positions = {5, 0, kTokens - 1, 1023, 1024, 5};
  const auto rows = client_->FetchRows(session_, 1, 1, positions);
  ASSERT_TRUE(rows.ok()) << rows.status();
  for (size_t i = 0; i < positions.size(); ++i) {
    EXPECT_EQ(absl::MakeConstSpan(rows->keys).subspan(i * kShape.key_dim, kShape.key_dim),
              TestLayer(1).KeyRow(1, positions[i]));
    EXPECT_EQ(absl::MakeConstSpan(rows->values).subspan(i * kShape.value_dim, kShape.value_dim),
              TestLayer(1).ValueRow(1, positions[i]));
  }
  const auto fork = client_->Fork(session_, 1500, {.name = "fork"});
  ASSERT_TRUE(fork.ok()) << fork.status();
  ASSERT_TRUE(client_->Truncate(*fork, 1400).ok());
  AttendRequest cut{.items = {Items()[0]}, .options = {.index = IndexKind::kExact}};
  cut.items[0].range_end = {1400};
  const auto whole = client_->Attend(cut);
  cut.items[0].session = *fork;
  cut.items[0].range_end = {};
  const auto forked = client_->Attend(cut);
  ASSERT_TRUE(whole.ok()) << whole.status();
  ASSERT_TRUE(forked.ok()) << forked.status();
  ASSERT_EQ(forked->items[0].out.size(), whole->items[0].out.size());
  for (size_t i = 0; i < whole->items[0].out.size(); ++i) {
    EXPECT_NEAR(forked->items[0].out[i], whole->items[0].out[i], 1e-4F);
  }
  const auto stats = client_->Stats(true);
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats->sessions_open, 2U);
  EXPECT_EQ(stats->connections_open, 1U);
  EXPECT_EQ(stats->workers, static_cast<uint32_t>(GetParam().workers));
  ASSERT_EQ(stats->sessions.size(), 2U);
  EXPECT_EQ(stats->sessions[0].name, "served");
  EXPECT_THAT(stats->sessions[0].tokens, testing::ElementsAre(kTokens, kTokens));
  EXPECT_THAT(stats->sessions[1].tokens, testing::ElementsAre(1400, 1400));
  EXPECT_TRUE(client_->Close(*fork).ok());
  EXPECT_EQ(client_->Close(*fork).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->Attend(cut).status().code(), absl::StatusCode::kNotFound);
}

TEST_P(ServedTest, ManyClientsAtOnceGetTheSameBits) {
  const AttendRequest request{.items = Items(), .options = Options()};
  const auto expected = client_->Attend(request);
  ASSERT_TRUE(expected.ok()) << expected.status();
  std::vector<std::thread> threads;
  threads.reserve(6);
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] {
      const auto client =
          KvClient::Connect({.address = address(), .default_deadline = std::chrono::seconds(30)});
      ASSERT_TRUE(client.ok()) << client.status();
      for (int call = 0; call < 5; ++call) {
        const auto served = (*client)->Attend(request);
        ASSERT_TRUE(served.ok()) << served.status();
        for (size_t item = 0; item < expected->items.size(); ++item) {
          EXPECT_EQ(Bits(served->items[item].out), Bits(expected->items[item].out));
          EXPECT_EQ(Bits(served->items[item].lse), Bits(expected->items[item].lse));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(ServedTest, AppendsInFlightKeepTheirOrder) {
  const auto session = client_->Open(kShape, {});
  ASSERT_TRUE(session.ok()) << session.status();
  constexpr uint32_t kChunk = 100;
  const auto left = std::make_shared<std::atomic<uint32_t>>(kTokens / kChunk);
  std::vector<absl::StatusOr<uint64_t>> held(kTokens / kChunk);
  for (uint32_t i = 0; i < held.size(); ++i) {
    const uint32_t start = i * kChunk;
    client_->AppendAsync(*session, 0, start, kChunk, TestLayer(0).Keys(start, start + kChunk),
                         TestLayer(0).Values(start, start + kChunk), {},
                         [&held, left, i](const absl::StatusOr<uint64_t>& answer) {
                           held[i] = answer;
                           left->fetch_sub(1);
                           left->notify_one();
                         });
  }
  for (uint32_t now = left->load(); now != 0; now = left->load()) left->wait(now);
  for (uint32_t i = 0; i < held.size(); ++i) {
    ASSERT_TRUE(held[i].ok()) << held[i].status();
    EXPECT_EQ(*held[i], (i + 1) * kChunk);
  }
}

TEST_P(ServedTest, AppendsMayBeRepeatedAndGapsAreRefused) {
  const auto again = client_->Append(session_, 0, 700, 700, TestLayer(0).Keys(700, 1400),
                                     TestLayer(0).Values(700, 1400));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(*again, kTokens);
  const auto gap = client_->Append(session_, 0, kTokens + 1, 1, TestLayer(0).Keys(0, 1),
                                   TestLayer(0).Values(0, 1));
  EXPECT_EQ(gap.status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace kvseek
