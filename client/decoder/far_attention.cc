#include "client/decoder/far_attention.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "transport/pause.h"

namespace kvseek::client {
namespace {

constexpr int kLooks = 8;  ///< at the sockets between two at the clock

/// Which item of a request an error blames, by its field ("items[3].session.boot_id"), if its
/// session is what is gone; the others' sessions are as they were.
std::optional<size_t> LostItem(const absl::Status& status) {
  if (!IsLost(status)) return std::nullopt;
  const std::string field = ErrorField(status);
  absl::string_view rest = field;
  size_t item = 0;
  if (!absl::ConsumePrefix(&rest, "items[")) return std::nullopt;
  const size_t end = rest.find("].session");
  if (end == absl::string_view::npos || !absl::SimpleAtoi(rest.substr(0, end), &item)) {
    return std::nullopt;
  }
  return item;
}

bool AreInARow(const std::vector<uint32_t>& heads) {
  return heads.back() - heads.front() + 1 == heads.size();
}

}  // namespace

bool IsLost(const absl::Status& status) {
  return status.code() == absl::StatusCode::kFailedPrecondition ||
         status.code() == absl::StatusCode::kNotFound;
}

ModelShape ShapeOfShare(const ModelShape& shape, const DaemonShare& share) {
  ModelShape part = shape;
  part.kv_heads = share.heads;
  part.query_heads = share.heads * shape.Group();
  return part;
}

std::optional<HeadPlan> PlanOfShare(const HeadPlan& plan, const DaemonShare& share) {
  HeadPlan part{.scan_bits = plan.scan_bits, .error_target = plan.error_target};
  bool says = plan.scan_bits != 0;
  for (PlannedHead head : plan.heads) {
    if (head.kv_head < share.first_head || head.kv_head >= share.first_head + share.heads) continue;
    head.kv_head -= share.first_head;
    says = says || head.index != "auto" || head.candidates != 0;
    part.heads.push_back(std::move(head));
  }
  if (!says) return std::nullopt;
  return part;
}

std::string ModelOfShare(const std::string& model, const ModelShape& shape,
                         const DaemonShare& share) {
  if (model.empty() || share.heads == shape.kv_heads) return model;
  return absl::StrCat(model, " kv_heads ", share.first_head, "..",
                      share.first_head + share.heads - 1);
}

FarAttention::FarAttention(const ModelShape& shape, std::vector<DaemonShare> shares,
                           std::chrono::microseconds spin)
    : shape_(shape), shares_(std::move(shares)), spin_(spin), missed_(shares_.size()) {}

void FarAttention::BeginStep() { std::fill(missed_.begin(), missed_.end(), uint8_t{0}); }

void FarAttention::Prepare(const FarQuestion& question) {
  replies_.clear();
  requests_.clear();
  packings_.clear();
  held_.clear();
  asked_.clear();
  countdown_ = std::make_shared<Countdown>();
  deadline_ = question.deadline;
  for (uint32_t daemon = 0; daemon < shares_.size(); ++daemon) {
    PrepareDaemon(question, daemon, HeadMode::kState, 0);
    const DaemonShare& share = shares_[daemon];
    ks_.clear();
    for (uint32_t head = share.first_head; head < share.first_head + share.heads; ++head) {
      if (question.modes[head] == HeadMode::kRows) ks_.push_back(question.rows[head]);
    }
    std::sort(ks_.begin(), ks_.end());
    ks_.erase(std::unique(ks_.begin(), ks_.end()), ks_.end());
    for (const uint32_t k : ks_) PrepareDaemon(question, daemon, HeadMode::kRows, k);
  }
}

void FarAttention::Send() {
  for (Packing& packing : packings_) Pack(packing);
  for (Request& request : requests_) {
    FarReply& reply = *request.reply;
    KvClient* const client = shares_[reply.daemon].questions;
    if (asked_.empty() || asked_.back() != client) asked_.push_back(client);
    countdown_->left.fetch_add(1, std::memory_order_relaxed);
    client->SendAsync(std::move(request.search), {.deadline = deadline_},
                      [&reply, countdown = countdown_](absl::StatusOr<SearchResponse> answer) {
                        reply.answer = std::move(answer);
                        countdown->left.fetch_sub(1, std::memory_order_acq_rel);
                        countdown->left.notify_one();
                      });
  }
  requests_.clear();
}

/// Where Send will find the queries of the heads asked for, (tokens, heads, group, key_dim).
absl::Span<const uint8_t> FarAttention::PlaceOfQueries(const FarQuestion& question, uint32_t b,
                                                       const std::vector<uint32_t>& heads) {
  const size_t head_elements = static_cast<size_t>(shape_.Group()) * shape_.key_dim;
  const size_t token_elements = shape_.kv_heads * head_elements;
  const uint16_t* const first = question.queries + b * question.tokens * token_elements;
  const bool whole = heads.size() == shape_.kv_heads;
  if (whole || (question.tokens == 1 && AreInARow(heads))) {
    return AsBytes(absl::MakeConstSpan(first + heads.front() * head_elements,
                                       question.tokens * heads.size() * head_elements));
  }
  std::vector<uint16_t> packed(question.tokens * heads.size() * head_elements);
  packings_.push_back({first, &heads, std::move(packed)});
  return AsBytes(packings_.back().packed);
}

void FarAttention::Pack(Packing& packing) const {
  const size_t head_elements = static_cast<size_t>(shape_.Group()) * shape_.key_dim;
  const uint16_t* token = packing.first;
  for (auto to = packing.packed.begin(); to != packing.packed.end();) {
    for (const uint32_t head : *packing.heads) {
      to = std::copy_n(token + head * head_elements, head_elements, to);
    }
    token += shape_.kv_heads * head_elements;
  }
}

QueryItem FarAttention::MakeItem(const FarQuestion& question, uint32_t b, const FarReply& reply) {
  const FarSequence& sequence = question.batch[b];
  const DaemonShare& share = shares_[reply.daemon];
  QueryItem item;
  item.session = sequence.sessions[reply.daemon];
  item.layer = question.layer;
  item.tokens = question.tokens;
  item.queries = PlaceOfQueries(question, b, reply.heads);
  item.range_begin = sequence.begin;
  item.range_end = {sequence.end};
  if (reply.heads.size() < share.heads) {
    for (const uint32_t head : reply.heads) item.kv_heads.push_back(head - share.first_head);
  }
  if (reply.rows) {
    std::vector<uint32_t>& held = held_.emplace_back();
    for (uint32_t t = 0; t < question.tokens; ++t) {
      for (const uint32_t head : reply.heads) {
        const RowCache& cache = sequence.caches[head];
        item.held_counts.push_back(cache.AppendHeld(sequence.begin, sequence.end, held));
      }
    }
    item.held = held;
  }
  return item;
}

void FarAttention::PrepareDaemon(const FarQuestion& question, uint32_t daemon, HeadMode mode,
                                 uint32_t k) {
  const DaemonShare& share = shares_[daemon];
  FarReply reply;
  reply.daemon = daemon;
  reply.rows = mode == HeadMode::kRows;
  reply.k = k;
  for (uint32_t head = share.first_head; head < share.first_head + share.heads; ++head) {
    if (question.modes[head] != mode || (reply.rows && question.rows[head] != k)) continue;
    reply.heads.push_back(head);
  }
  if (reply.heads.empty()) return;
  std::vector<uint32_t> lost;
  for (uint32_t b = 0; b < question.batch.size(); ++b) {
    const FarSequence& sequence = question.batch[b];
    if (sequence.begin >= sequence.end) continue;
    if (sequence.lost[daemon] != 0) {
      lost.push_back(b);
    } else {
      reply.batch.push_back(b);
    }
  }
  if (!lost.empty()) {
    FarReply& unasked = replies_.emplace_back();
    unasked.daemon = daemon;
    unasked.lost = std::move(lost);
    unasked.answer = absl::FailedPreconditionError("the daemon no longer has the session");
  }
  if (reply.batch.empty()) return;
  FarReply& sent = replies_.emplace_back(std::move(reply));
  if (missed_[daemon] != 0) {
    sent.answer = absl::UnavailableError("the daemon missed earlier in this step");
    return;
  }
  requests_.push_back({&sent, PrepareSearch(question, sent)});
}

PreparedSearch FarAttention::PrepareSearch(const FarQuestion& question, const FarReply& reply) {
  const auto fill = [&](auto& request) {
    request.items.clear();
    for (const uint32_t b : reply.batch) request.items.push_back(MakeItem(question, b, reply));
    request.options = question.options;
    request.query_dtype = shape_.dtype;
    request.state_dtype = DType::kFp16;  // rounds less than what the model computes in
  };
  if (!reply.rows) {
    fill(attend_);
    return PreparedSearch(attend_);
  }
  fill(top_k_);
  top_k_.k = reply.k;
  return PreparedSearch(top_k_);
}

const std::deque<FarReply>& FarAttention::Wait() {
  std::atomic<int>& left = countdown_->left;
  const auto sleep_at = std::chrono::steady_clock::now() + spin_;
  for (int i = 1; left.load(std::memory_order_acquire) != 0; ++i) {
    if (i % kLooks == 0 && std::chrono::steady_clock::now() >= sleep_at) break;
    for (KvClient* const client : asked_) client->Poll();
    transport::Pause();
  }
  for (int now = left.load(std::memory_order_acquire); now != 0;
       now = left.load(std::memory_order_acquire)) {
    left.wait(now, std::memory_order_acquire);
  }
  for (FarReply& reply : replies_) {
    const std::optional<size_t> item = LostItem(reply.answer.status());
    if (item.has_value() && *item < reply.batch.size()) reply.lost = {reply.batch[*item]};
    const absl::StatusCode code = reply.answer.status().code();
    if (code == absl::StatusCode::kDeadlineExceeded || code == absl::StatusCode::kUnavailable) {
      missed_[reply.daemon] = 1;
    }
  }
  return replies_;
}

}  // namespace kvseek::client
