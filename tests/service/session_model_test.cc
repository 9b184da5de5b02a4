// Random operations on several sessions against a model made of plain vectors. Seeds are fixed;
// KVSEEK_MODEL_OPERATIONS sets the number of operations of a run.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <random>

#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

using kernels::DType;

constexpr size_t kLayers = 2;
constexpr size_t kKvHeads = 2;
constexpr size_t kGroup = 2;
constexpr size_t kQueryHeads = kKvHeads * kGroup;
constexpr size_t kKeyDim = 16;
constexpr size_t kValueDim = 8;
constexpr size_t kTokensMax = 5000;
constexpr size_t kSessionsMax = 5;
constexpr index::KvShape kShape{kKeyDim, kValueDim, DType::kBf16, 0.25F, 2};

int Operations() {
  const char* set = std::getenv("KVSEEK_MODEL_OPERATIONS");
  return set != nullptr ? std::atoi(set) : 2500;
}

struct ModelLayer {
  Rows rows;
  size_t tokens() const { return rows.keys.size() / (kKvHeads * kKeyDim); }
  void Truncate(size_t tokens) {
    rows.keys.resize(std::min(rows.keys.size(), tokens * kKvHeads * kKeyDim));
    rows.values.resize(std::min(rows.values.size(), tokens * kKvHeads * kValueDim));
  }
};

struct ModelSession {
  proto::SessionRef ref;
  std::array<ModelLayer, kLayers> layers;
};

/// One head of a model's layer, cut into segments and chunks as an index wants it.
class ModelView {
 public:
  ModelView(const ModelLayer& layer, size_t head)
      : keys_(HeadRows(layer.rows.keys, kKvHeads, kKeyDim, head)),
        values_(HeadRows(layer.rows.values, kKvHeads, kValueDim, head)) {
    size_t at = 0;
    const auto sealed =
        static_cast<size_t>(index::SealedTokens(static_cast<int64_t>(layer.tokens())));
    for (; at < sealed; at += index::kSegmentTokens) {
      segments_.push_back(
          index::Segment::Build(kShape, &keys_[at * kKeyDim], &values_[at * kValueDim]));
    }
    tail_tokens_ = static_cast<int64_t>(layer.tokens() - at);
    for (; at < layer.tokens(); at += index::kTailChunkTokens) {
      tail_.push_back({&keys_[at * kKeyDim], &values_[at * kValueDim]});
    }
  }
  index::KvView view() const { return {kShape, segments_, tail_, tail_tokens_}; }
  reference::Attention Reference(const float* queries, size_t begin, size_t end) const {
    const auto count = static_cast<int>(end - begin);
    std::vector<double> scores = reference::Scores(queries, kGroup, keys_.data() + begin * kKeyDim,
                                                   kShape.dtype, count, kKeyDim);
    for (double& score : scores) score *= kShape.softmax_scale;
    return reference::Attend(scores, kGroup, values_.data() + begin * kValueDim, kShape.dtype,
                             count, kValueDim);
  }

 private:
  std::vector<uint16_t> keys_;
  std::vector<uint16_t> values_;
  std::vector<std::shared_ptr<const index::Segment>> segments_;
  std::vector<index::TailChunkView> tail_;
  int64_t tail_tokens_ = 0;
};

class SessionModelTest : public testing::TestWithParam<uint32_t> {
 protected:
  SessionModelTest() : service_(Service::SmallOptions(2)), random_(GetParam()) {}

  size_t Below(size_t count) {
    return std::uniform_int_distribution<size_t>(0, count - 1)(random_);
  }
  bool OneIn(size_t count) { return Below(count) == 0; }
  ModelSession& Any() { return sessions_[Below(sessions_.size())]; }
  static proto::ModelShape Shape() {
    proto::ModelShape shape;
    shape.set_layers(kLayers);
    shape.set_kv_heads(kKvHeads);
    shape.set_query_heads(kQueryHeads);
    shape.set_key_dim(kKeyDim);
    shape.set_value_dim(kValueDim);
    shape.set_dtype(proto::DTYPE_BF16);
    return shape;
  }

  void Open() {
    sessions_.push_back({OpenSession(service_, Shape()), {}});
    ASSERT_NE(sessions_.back().ref.session_id(), 0U);
  }

  void Append() {
    ModelSession& session = Any();
    const size_t l = Below(kLayers);
    ModelLayer& layer = session.layers[l];
    const size_t count = OneIn(8) ? Below(2500) : OneIn(2) ? 1 + Below(3) : Below(200);
    if (layer.tokens() + count > kTokensMax) return;
    const Rows added = RandomRows(static_cast<uint32_t>(random_()), Shape(), count);
    if (OneIn(10)) {  // a gap
      const auto answer = AppendRows(service_, session.ref, static_cast<uint32_t>(l),
                                     layer.tokens() + 1 + Below(5), count, added);
      ASSERT_EQ(Describe(answer.status), "FAILED_PRECONDITION start");
      return;
    }
    const size_t repeated = OneIn(4) ? Below(layer.tokens() + 1) : 0;  // a retry, with other rows
    Rows sent = RandomRows(static_cast<uint32_t>(random_()), Shape(), repeated);
    sent.keys.insert(sent.keys.end(), added.keys.begin(), added.keys.end());
    sent.values.insert(sent.values.end(), added.values.begin(), added.values.end());
    const auto answer = AppendRows(service_, session.ref, static_cast<uint32_t>(l),
                                   layer.tokens() - repeated, repeated + count, sent);
    ASSERT_TRUE(answer.ok()) << answer.status;
    layer.rows.keys.insert(layer.rows.keys.end(), added.keys.begin(), added.keys.end());
    layer.rows.values.insert(layer.rows.values.end(), added.values.begin(), added.values.end());
    ASSERT_EQ(answer.message.tokens_held(), layer.tokens());
  }

  size_t Longest(const ModelSession& session) {
    return std::max(session.layers[0].tokens(), session.layers[1].tokens());
  }

  void Fork() {
    ModelSession copy = Any();
    proto::ForkRequest request;
    *request.mutable_session() = copy.ref;
    if (OneIn(2)) {
      const size_t tokens = Below(Longest(copy) + 1);
      request.set_tokens(tokens);
      for (ModelLayer& layer : copy.layers) layer.Truncate(tokens);
    }
    const auto answer = service_.Call(request);
    ASSERT_TRUE(answer.ok()) << answer.status;
    copy.ref = answer.message.session();
    sessions_.push_back(std::move(copy));
  }

  void Truncate() {
    ModelSession& session = Any();
    const size_t longest = Longest(session);
    const size_t back = std::min(longest, OneIn(3) ? Below(1500) : Below(70));
    proto::TruncateRequest request;
    *request.mutable_session() = session.ref;
    request.set_tokens(longest - back);
    const auto answer = service_.Call(request);
    ASSERT_TRUE(answer.ok()) << answer.status;
    for (ModelLayer& layer : session.layers) layer.Truncate(longest - back);
  }

  void Close() {
    const size_t i = Below(sessions_.size());
    proto::CloseSessionRequest request;
    *request.mutable_session() = sessions_[i].ref;
    ASSERT_TRUE(service_.Call(request).ok());
    ASSERT_EQ(Describe(service_.Call(request).status), "NOT_FOUND session");
    sessions_.erase(sessions_.begin() + static_cast<ptrdiff_t>(i));
  }

  void Fetch() {
    ModelSession& session = Any();
    const size_t l = Below(kLayers);
    const ModelLayer& layer = session.layers[l];
    if (layer.tokens() == 0) return;
    const size_t head = Below(kKvHeads);
    std::vector<int64_t> positions(Below(100));
    for (int64_t& position : positions) position = static_cast<int64_t>(Below(layer.tokens()));
    proto::FetchRowsRequest request;
    *request.mutable_session() = session.ref;
    request.set_layer(static_cast<uint32_t>(l));
    request.set_kv_head(static_cast<uint32_t>(head));
    request.set_count(static_cast<uint32_t>(positions.size()));
    auto answer = service_.Call(request, Tensors().Add(positions));
    ASSERT_TRUE(answer.ok()) << answer.status;
    const auto keys = answer.tensors.Take<uint16_t>(positions.size() * kKeyDim);
    const auto values = answer.tensors.Take<uint16_t>(positions.size() * kValueDim);
    for (size_t i = 0; i < positions.size(); ++i) {
      const size_t row = static_cast<size_t>(positions[i]) * kKvHeads + head;
      ASSERT_TRUE(std::equal(&keys[i * kKeyDim], &keys[i * kKeyDim] + kKeyDim,
                             &layer.rows.keys[row * kKeyDim]));
      ASSERT_TRUE(std::equal(&values[i * kValueDim], &values[i * kValueDim] + kValueDim,
                             &layer.rows.values[row * kValueDim]));
    }
  }

  /// Attend (no k) or TopK on a batch of two items, against a search in the model's rows.
  void Search(const index::KeyIndex& index, std::optional<uint32_t> k) {
    struct Part {
      const ModelLayer* layer;
      size_t begin;
      size_t end;
      std::vector<float> queries;
    };
    std::vector<Part> parts;
    proto::TopKRequest request;  // its fields are those of Attend and more
    Tensors payload;
    for (int i = 0; i < 2; ++i) {
      const ModelSession& session = Any();
      const size_t l = Below(kLayers);
      Part part{&session.layers[l], 0, session.layers[l].tokens(), {}};
      if (OneIn(2)) part.begin = Below(part.end + 1);
      if (OneIn(2)) part.end = part.begin + Below(part.end - part.begin + 1);
      part.queries =
          reference::RandomFloats(static_cast<uint32_t>(random_()), kQueryHeads * kKeyDim, 1.0F);
      payload.Add(part.queries);
      proto::QueryItem& item = *request.add_items();
      *item.mutable_session() = session.ref;
      item.set_layer(static_cast<uint32_t>(l));
      item.set_tokens(1);
      item.set_range_begin(part.begin);
      item.add_range_end(part.end);
      parts.push_back(std::move(part));
    }
    index::SearchOptions options;
    options.k = k.has_value() ? static_cast<int>(*k) : -1;
    options.candidates = 128;
    options.exact_rows = 16;
    options.seed = random_();
    proto::SearchOptions& sent = *request.mutable_options();
    sent.set_index(&index == &index::ExactIndex() ? proto::INDEX_EXACT : proto::INDEX_LADDER);
    sent.set_candidates(128);
    sent.set_exact_rows(16);
    sent.set_seed(options.seed);
    if (OneIn(3)) {
      options.threshold = -1.0F - static_cast<float>(Below(9));
      sent.set_threshold(options.threshold);
    }
    request.set_query_dtype(proto::DTYPE_FP32);
    Tensors answered;
    if (k.has_value()) {
      request.set_k(*k);
      request.set_with_state(true);
      auto answer = service_.Call(request, payload);
      ASSERT_TRUE(answer.ok()) << answer.status;
      answered = std::move(answer.tensors);
    } else {
      proto::AttendRequest attend;
      *attend.mutable_items() = request.items();
      *attend.mutable_options() = request.options();
      attend.set_query_dtype(request.query_dtype());
      auto answer = service_.Call(attend, payload);
      ASSERT_TRUE(answer.ok()) << answer.status;
      answered = std::move(answer.tensors);
    }

    Tensors expected;
    std::vector<int64_t> positions;
    std::vector<std::vector<float>> states;
    for (const Part& part : parts) {
      std::vector<float> out;
      std::vector<float> lse;
      for (size_t head = 0; head < kKvHeads; ++head) {
        const ModelView model(*part.layer, head);
        const float* queries = part.queries.data() + head * kGroup * kKeyDim;
        const index::SearchQuery query{queries, kGroup, static_cast<int64_t>(part.begin),
                                       static_cast<int64_t>(part.end)};
        const index::SearchResult result = index.Search(model.view(), query, options, scratch_);
        scratch_.Reset();
        out.insert(out.end(), result.out.begin(), result.out.end());
        lse.insert(lse.end(), result.lse.begin(), result.lse.end());
        positions.insert(positions.end(), result.positions.begin(), result.positions.end());
        if (&index == &index::ExactIndex() && !k.has_value()) {
          const auto error = reference::Compare(model.Reference(queries, part.begin, part.end),
                                                result.out.data(), result.lse.data());
          ASSERT_LT(error.out, 1e-4);
          ASSERT_LT(error.lse, 1e-4);
        }
      }
      states.push_back(std::move(out));
      states.push_back(std::move(lse));
    }
    if (k.has_value()) expected.Add(positions);
    for (const std::vector<float>& state : states) expected.Add(state);
    ASSERT_EQ(answered.bytes(), expected.bytes());
  }

  Service service_;
  std::mt19937_64 random_;
  std::vector<ModelSession> sessions_;
  index::Scratch scratch_;
};

TEST_P(SessionModelTest, AgreesWithVectors) {
  for (int i = 0; i < Operations(); ++i) {
    SCOPED_TRACE(testing::Message() << "operation " << i);
    const size_t dice = Below(100);
    if (sessions_.empty() || (dice < 3 && sessions_.size() < kSessionsMax)) {
      Open();
    } else if (dice < 45) {
      Append();
    } else if (dice < 51) {
      if (sessions_.size() < kSessionsMax) Fork();
    } else if (dice < 57) {
      Truncate();
    } else if (dice < 60) {
      Close();
    } else if (dice < 70) {
      Fetch();
    } else {
      const index::KeyIndex& index = OneIn(2) ? index::ExactIndex() : index::LadderIndex();
      Search(index,
             OneIn(2) ? std::nullopt : std::optional<uint32_t>(static_cast<uint32_t>(Below(200))));
    }
    if (HasFatalFailure()) return;
  }
  while (!sessions_.empty()) Close();
  for (int i = 0; i < 1000 && service_.budget().used_bytes() > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // workers let go of their last jobs
  }
  EXPECT_EQ(service_.budget().used_bytes(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Seeds, SessionModelTest, testing::Values(1, 2, 3));

}  // namespace
}  // namespace kvseek::service
