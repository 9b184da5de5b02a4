#include "tests/service/right_calls.h"

#include <google/protobuf/message.h>

#include <utility>

#include "kernels/dtype.h"
#include "tests/service/search_fixture.h"

namespace kvseek::service {
namespace {

using google::protobuf::Message;
using proto::Op;

std::vector<uint16_t> RandomBf16(size_t count, proto::MessageMutator& random) {
  std::vector<uint16_t> elements(count);
  for (uint16_t& element : elements) {
    element = kernels::FloatToBf16(static_cast<float>(random.Below(2001)) / 500.0F - 2.0F);
  }
  return elements;
}

template <typename M>
TestCall RightQuery(Op op, M message, const std::vector<proto::SessionRef>& sessions,
                    proto::IndexKind index, uint64_t seed) {
  proto::MessageMutator random(seed);
  Tensors parts;
  uint32_t tokens = 0;
  for (const proto::SessionRef& session : sessions) {
    proto::QueryItem* item = message.add_items();
    *item->mutable_session() = session;
    item->set_layer(1);
    item->set_tokens(++tokens);
    item->set_range_begin(3);
    size_t heads = kQueryHeads;
    if (tokens > 1) {  // the second item: a range's end, and one KV head only
      item->add_range_end(1000);
      item->add_kv_heads(1);
      heads /= kKvHeads;
    }
    parts.Add(RandomBf16(tokens * heads * kKeyDim, random));
    if (op != Op::kTopK) continue;
    const size_t lists = tokens * heads * kKvHeads / kQueryHeads;
    std::vector<uint32_t> held;
    for (size_t list = 0; list < lists; ++list) {
      item->add_held_counts(2);
      held.insert(held.end(), {500U, 600U});
    }
    parts.Add(held);
  }
  message.set_query_dtype(proto::DTYPE_BF16);
  message.mutable_options()->set_index(index);
  message.mutable_options()->set_candidates(128);
  message.mutable_options()->set_exact_rows(8);
  message.mutable_options()->set_audit_samples(16);
  message.mutable_options()->set_threshold(-8.0F);
  return {.op = op, .metadata = message.SerializeAsString(), .payload = parts.Text()};
}

TestCall RightTopK(const std::vector<proto::SessionRef>& sessions, proto::IndexKind index,
                   uint64_t seed) {
  proto::TopKRequest message;
  message.set_k(20);
  message.set_with_rows(true);
  message.set_with_state(true);
  return RightQuery(Op::kTopK, message, sessions, index, seed);
}

}  // namespace

TestCall RightAppend(const proto::SessionRef& session, uint32_t layer, uint64_t start,
                     uint32_t tokens, proto::MessageMutator& random) {
  proto::AppendRequest message;
  *message.mutable_session() = session;
  message.set_layer(layer);
  message.set_start(start);
  message.set_tokens(tokens);
  if (tokens > 0) message.add_query_positions(start + tokens / 2);
  for (uint64_t end = (start / kLandmarkBlock + 1) * kLandmarkBlock; end <= start + tokens;
       end += kLandmarkBlock) {
    message.add_landmark_positions(end - kLandmarkBlock);
  }
  const size_t rows = size_t{tokens} * kKvHeads;
  const auto landmarks = static_cast<size_t>(message.landmark_positions_size()) * kKvHeads;
  const size_t queries = tokens > 0 ? kQueryHeads : 0;
  return {.op = Op::kAppend,
          .metadata = message.SerializeAsString(),
          .payload = Tensors()
                         .Add(RandomBf16(rows * kKeyDim, random))
                         .Add(RandomBf16(rows * kValueDim, random))
                         .Add(RandomBf16(queries * kKeyDim, random))
                         .Add(RandomBf16(landmarks * kKeyDim, random))
                         .Text()};
}

/// Both layers' next tokens.
TestCall RightAppendOfLayers(const proto::SessionRef& session, uint64_t start, uint32_t tokens,
                             proto::MessageMutator& random) {
  proto::AppendRequest message;
  *message.mutable_session() = session;
  message.set_start(start);
  message.set_tokens(tokens);
  message.set_layers(2);
  const size_t rows = size_t{tokens} * kKvHeads;
  Tensors parts;
  for (int layer = 0; layer < 2; ++layer) {
    parts.Add(RandomBf16(rows * kKeyDim, random)).Add(RandomBf16(rows * kValueDim, random));
  }
  return {.op = Op::kAppend, .metadata = message.SerializeAsString(), .payload = parts.Text()};
}

TestCall RightAttend(const std::vector<proto::SessionRef>& sessions, proto::IndexKind index,
                     uint64_t seed) {
  proto::AttendRequest message;
  message.mutable_options()->set_list_read(true);
  return RightQuery(Op::kAttend, message, sessions, index, seed);
}

std::vector<TestCall> RightCalls(const proto::SessionRef& victim) {
  std::vector<TestCall> calls;
  const auto add = [&calls](Op op, const Message& message, std::string payload = {}) {
    calls.push_back(
        {.op = op, .metadata = message.SerializeAsString(), .payload = std::move(payload)});
  };
  proto::MessageMutator random(7);
  for (const proto::IndexKind index :
       {proto::INDEX_EXACT, proto::INDEX_LADDER, proto::INDEX_LANDMARK, proto::INDEX_CLUSTER,
        proto::INDEX_GRAPH, proto::INDEX_PRODUCT}) {
    calls.push_back(RightAttend({victim}, index, 1));
    calls.push_back(RightAttend({victim, victim}, index, 2));
    calls.push_back(RightTopK({victim, victim}, index, 3));
  }
  calls.push_back(RightAppend(victim, 0, kVictimTokens, 2, random));
  calls.push_back(RightAppend(victim, 1, kVictimTokens - 5, 3, random));
  calls.push_back(RightAppendOfLayers(victim, kVictimTokens, 2, random));
  calls.push_back(RightAppend(victim, 0, kVictimTokens - 40, 70, random));

  proto::FetchRowsRequest fetch;
  *fetch.mutable_session() = victim;
  fetch.set_count(3);
  const int64_t positions[] = {0, 1029, 500};
  add(Op::kFetchRows, fetch, {reinterpret_cast<const char*>(positions), sizeof(positions)});

  proto::OpenSessionRequest open;
  open.mutable_shape()->set_layers(1);
  open.mutable_shape()->set_kv_heads(1);
  open.mutable_shape()->set_query_heads(2);
  open.mutable_shape()->set_key_dim(8);
  open.mutable_shape()->set_value_dim(8);
  open.mutable_shape()->set_dtype(proto::DTYPE_FP16);
  open.set_tokens_expected(100);
  open.set_error_target(0.1F);
  open.set_model("m");
  open.mutable_plan()->set_version(1);
  proto::PlannedHead& head = *open.mutable_plan()->add_heads();
  head.set_mode("auto");
  head.set_index("cluster");
  head.set_candidates(200);
  add(Op::kOpenSession, open);
  open.clear_plan();
  open.add_build(proto::INDEX_LANDMARK);
  open.mutable_landmark()->set_summary(proto::LANDMARK_MEAN);
  open.mutable_landmark()->set_block(64);
  add(Op::kOpenSession, open);
  proto::ForkRequest fork;
  *fork.mutable_session() = victim;
  fork.set_tokens(1000);
  add(Op::kFork, fork);
  proto::TruncateRequest truncate;
  *truncate.mutable_session() = victim;
  truncate.set_tokens(kVictimTokens);
  add(Op::kTruncate, truncate);
  proto::CloseSessionRequest close;
  *close.mutable_session() = victim;
  add(Op::kCloseSession, close);
  proto::StatsRequest stats;
  stats.set_with_sessions(true);
  add(Op::kStats, stats);
  add(Op::kHealth, proto::HealthRequest());
  return calls;
}

}  // namespace kvseek::service
