#include "client/decoder/far_attention.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace kvseek::client {
namespace {

constexpr int kLooks = 8;  ///< at the sockets between two at the clock

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

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

FarAttention::FarAttention(const ModelShape& shape, std::vector<DaemonShare> shares,
                           std::chrono::microseconds spin)
    : shape_(shape), shares_(std::move(shares)), spin_(spin), missed_(shares_.size()) {}

void FarAttention::BeginStep() { std::fill(missed_.begin(), missed_.end(), uint8_t{0}); }

void FarAttention::Ask(const FarQuestion& question) {
  replies_.clear();
  packed_.clear();
  held_.clear();
  asked_.clear();
  countdown_ = std::make_shared<Countdown>();
  for (uint32_t daemon = 0; daemon < shares_.size(); ++daemon) {
    AskDaemon(question, daemon, HeadMode::kState);
    AskDaemon(question, daemon, HeadMode::kRows);
  }
}

/// The queries of the heads asked for, (tokens, heads, group, key_dim).
absl::Span<const uint8_t> FarAttention::PackQueries(const FarQuestion& question, uint32_t b,
                                                    const std::vector<uint32_t>& heads) {
  const size_t head_elements = static_cast<size_t>(shape_.Group()) * shape_.key_dim;
  const size_t token_elements = shape_.kv_heads * head_elements;
  const uint16_t* const first = question.queries + b * question.tokens * token_elements;
  const bool whole = heads.size() == shape_.kv_heads;
  if (whole || (question.tokens == 1 && AreInARow(heads))) {
    return AsBytes(absl::MakeConstSpan(first + heads.front() * head_elements,
                                       question.tokens * heads.size() * head_elements));
  }
  std::vector<uint16_t>& packed = packed_.emplace_back();
  packed.reserve(question.tokens * heads.size() * head_elements);
  for (uint32_t t = 0; t < question.tokens; ++t) {
    for (const uint32_t head : heads) {
      const uint16_t* const row = first + t * token_elements + head * head_elements;
      packed.insert(packed.end(), row, row + head_elements);
    }
  }
  return AsBytes(packed);
}

QueryItem FarAttention::MakeItem(const FarQuestion& question, uint32_t b, const FarReply& reply) {
  const FarSequence& sequence = question.batch[b];
  const DaemonShare& share = shares_[reply.daemon];
  QueryItem item;
  item.session = sequence.sessions[reply.daemon];
  item.layer = question.layer;
  item.tokens = question.tokens;
  item.queries = PackQueries(question, b, reply.heads);
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

void FarAttention::AskDaemon(const FarQuestion& question, uint32_t daemon, HeadMode mode) {
  const DaemonShare& share = shares_[daemon];
  FarReply reply;
  reply.daemon = daemon;
  reply.rows = mode == HeadMode::kRows;
  for (uint32_t head = share.first_head; head < share.first_head + share.heads; ++head) {
    if (question.modes[head] == mode) reply.heads.push_back(head);
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
  std::vector<QueryItem> items;
  items.reserve(sent.batch.size());
  for (const uint32_t b : sent.batch) items.push_back(MakeItem(question, b, sent));
  countdown_->left.fetch_add(1, std::memory_order_relaxed);
  const auto done = [&sent, countdown = countdown_](absl::StatusOr<SearchResponse> answer) {
    sent.answer = std::move(answer);
    countdown->left.fetch_sub(1, std::memory_order_acq_rel);
    countdown->left.notify_one();
  };
  if (asked_.empty() || asked_.back() != share.questions) asked_.push_back(share.questions);
  const CallOptions call{.deadline = question.deadline};
  if (sent.rows) {
    TopKRequest request;
    request.items = std::move(items);
    request.options = question.options;
    request.query_dtype = shape_.dtype;
    request.k = question.rows;
    share.questions->TopKAsync(request, call, done);
  } else {
    AttendRequest request;
    request.items = std::move(items);
    request.options = question.options;
    request.query_dtype = shape_.dtype;
    share.questions->AttendAsync(request, call, done);
  }
}

const std::deque<FarReply>& FarAttention::Wait() {
  std::atomic<int>& left = countdown_->left;
  const auto sleep_at = std::chrono::steady_clock::now() + spin_;
  for (int i = 1; left.load(std::memory_order_acquire) != 0; ++i) {
    if (i % kLooks == 0 && std::chrono::steady_clock::now() >= sleep_at) break;
    for (KvClient* const client : asked_) client->Poll();
    Pause();
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
