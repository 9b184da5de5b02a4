#include "service/search_validation.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/convert.h"
#include "proto/frame.h"
#include "proto/status_code.h"
#include "service/field_checks.h"

namespace kvseek::service {
namespace {

using kernels::DType;

constexpr uint32_t kReuseStepsMax = 1U << 20;

/// A protocol data type that queries may have; 0 bytes if it is none.
DType QueryDType(proto::DType dtype) {
  switch (dtype) {
    case proto::DTYPE_BF16:
      return DType::kBf16;
    case proto::DTYPE_FP16:
      return DType::kFp16;
    case proto::DTYPE_FP32:
      return DType::kFp32;
    default:
      return DType{};
  }
}

/// Fills item.kv_heads.
absl::Status CheckHeads(const proto::QueryItem& message, CheckedItem& item) {
  const uint32_t all = item.settings().kv_heads;
  if (message.kv_heads().empty()) {
    item.kv_heads.resize(all);
    std::iota(item.kv_heads.begin(), item.kv_heads.end(), 0U);
    return absl::OkStatus();
  }
  uint32_t lowest = 0;
  for (const uint32_t head : message.kv_heads()) {
    if (head < lowest || head >= all) {
      return Invalid(absl::StrCat("kv_heads[", item.kv_heads.size(), "]"),
                     absl::StrCat("must be more than the one before and one of the ", all,
                                  " KV heads, not ", head));
    }
    item.kv_heads.push_back(head);
    lowest = head + 1;
  }
  return absl::OkStatus();
}

/// Fills item.begin and item.ends.
absl::Status CheckRange(const proto::QueryItem& message, CheckedItem& item) {
  const auto held = static_cast<uint64_t>(item.layer->tokens);
  absl::Status status = CheckBetween("range_begin", message.range_begin(), 0, held);
  if (!status.ok()) return status;
  item.begin = static_cast<int64_t>(message.range_begin());
  const int ends = message.range_end_size();
  if (ends > 1 && static_cast<uint32_t>(ends) != message.tokens()) {
    return Invalid("range_end", absl::StrCat("must have one end for each of the ", message.tokens(),
                                             " tokens, one for all or none, not ", ends));
  }
  for (int i = 0; i < ends; ++i) {
    const uint64_t end = message.range_end(i);
    if (end < message.range_begin() || end > held) {
      return CheckBetween(absl::StrCat("range_end[", i, "]"), end, message.range_begin(), held);
    }
    item.ends.push_back(static_cast<int64_t>(end));
  }
  if (ends <= 1) item.ends.resize(item.tokens, ends == 0 ? item.layer->tokens : item.ends[0]);
  return absl::OkStatus();
}

/// Gives item.held lists of the lengths that the message says.
absl::Status CheckHeldCounts(const proto::QueryItem& message, bool topk, CheckedItem& item) {
  const auto counts = static_cast<size_t>(message.held_counts_size());
  if (counts != 0 && !topk) return Invalid("held_counts", "is for top_k only");
  if (counts != 0 && counts != item.Results()) {
    return Invalid("held_counts", absl::StrCat("must have none or one for each of the ",
                                               item.Results(), " (token, KV head), not ", counts));
  }
  item.held.reserve(counts);
  for (const uint32_t count : message.held_counts()) {
    if (count > index::kMaxK) {
      return CheckBetween(absl::StrCat("held_counts[", item.held.size(), "]"), count, 0,
                          index::kMaxK);
    }
    item.held.emplace_back(static_cast<const uint32_t*>(nullptr), count);
  }
  return absl::OkStatus();
}

/// Points item.held, whose lengths are known, into `positions` and checks what stands there.
absl::Status CheckHeld(const uint32_t* positions, CheckedItem& item) {
  size_t begin = 0;
  for (absl::Span<const uint32_t>& list : item.held) {
    list = {positions + begin, list.size()};
    int64_t lowest = 0;
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i] >= lowest && list[i] < item.layer->tokens) {
        lowest = int64_t{list[i]} + 1;
        continue;
      }
      return Invalid(absl::StrCat("held[", begin + i, "]"),
                     absl::StrCat("must be more than the one before of its list and one of the ",
                                  item.layer->tokens, " tokens held, not ", list[i]));
    }
    begin += list.size();
  }
  return absl::OkStatus();
}

/// Which element of an item's queries stands at `index`.
std::string Describe(const CheckedItem& item, int64_t index) {
  const auto dim = static_cast<size_t>(item.settings().kv.key_dim);
  const auto group = static_cast<size_t>(item.settings().Group());
  const size_t row = static_cast<size_t>(index) / dim;
  const size_t head = row % item.QueryHeads();
  return absl::StrCat("token ", row / item.QueryHeads(), ", query head ",
                      item.kv_heads[head / group] * group + head % group, ", element ",
                      static_cast<size_t>(index) % dim);
}

}  // namespace

absl::Status SearchValidator::CheckOptions(const proto::SearchOptions& message,
                                           CheckedSearch& search) const {
  const uint32_t candidates = message.has_candidates() ? message.candidates() : 1;
  const uint32_t exact_rows = message.has_exact_rows() ? message.exact_rows() : options_.exact_rows;
  absl::Status status;
  if (message.index() < proto::INDEX_AUTO || !proto::IndexKind_IsValid(message.index())) {
    status = Invalid("options.index", absl::StrCat("there is no index ", message.index()));
  }
  status.Update(CheckBetween("options.candidates", candidates, 1, index::kMaxCandidates));
  status.Update(CheckBetween("options.exact_rows", exact_rows, 0, index::kMaxExactRows));
  status.Update(
      CheckBetween("options.audit_samples", message.audit_samples(), 0, index::kMaxAuditSamples));
  status.Update(CheckBetween("options.exact_top", message.exact_top(), 0, index::kMaxK));
  if (!(message.beta() >= 0.0F)) status.Update(Invalid("options.beta", "must not be negative"));
  if (!(message.threshold() >= index::kMinThreshold && message.threshold() <= 0.0F)) {
    status.Update(Invalid("options.threshold",
                          absl::StrCat("must be between ", index::kMinThreshold, " and 0")));
  }
  if (!(message.mass() >= 0.0F && message.mass() <= 1.0F)) {
    status.Update(Invalid("options.mass", "must be between 0 and 1"));
  }
  if (!proto::Vote_IsValid(message.vote())) {
    status.Update(Invalid("options.vote", absl::StrCat("there is no vote ", message.vote())));
  }
  status.Update(CheckBetween("options.reuse_steps", message.reuse_steps(), 0, kReuseStepsMax));
  status.Update(CheckBetween("options.reuse_keep", message.reuse_keep(), 0, index::kMaxKeep));
  if (!status.ok()) return status;
  search.asked = {message.index(), message.candidates(), message.threshold()};
  search.asks_threshold = message.has_threshold();
  search.options.exact_rows = static_cast<int>(exact_rows);
  search.options.audit_samples = static_cast<int>(message.audit_samples());
  search.options.seed = message.seed();
  search.options.list_read = message.list_read();
  search.options.estimate_rest = !message.leave_rest_out();
  search.options.exact_top = static_cast<int>(message.exact_top());
  search.options.beta = message.beta();
  search.options.mass = message.mass();
  if (message.vote() == proto::VOTE_MAX) search.options.vote = index::Vote::kMax;
  search.reuse.every = static_cast<int>(message.reuse_steps());
  search.reuse.keep = static_cast<int>(message.reuse_keep());
  if (message.search_time_us() > 0) {
    search.options.stop_at =
        std::chrono::steady_clock::now() + std::chrono::microseconds(message.search_time_us());
  }
  return absl::OkStatus();
}

HeadSetting SearchValidator::Resolve(const CheckedSearch& search, const CheckedItem& item,
                                     uint32_t kv_head) const {
  const HeadSetting asked = search.asked;
  HeadSetting planned =
      item.session->plan()->Get(item.layer_number, kv_head, item.ends.back() - item.begin);
  const auto kind = BuiltKindOf(planned.index);
  const bool ready = !kind.has_value() || item.layer->Built(kv_head, *kind) != nullptr;
  // A budget is worth what it is worth with its own index.
  if (!ready || (asked.index != proto::INDEX_AUTO && asked.index != planned.index)) {
    planned = {asked.index, 0, 0.0F};
  }
  // It was planned for Attend; whoever asks for k keys gets so many.
  if (planned.candidates > 0 && search.topk()) {
    planned.candidates = std::max(planned.candidates, static_cast<uint32_t>(search.options.k));
  }
  if (asked.candidates > 0) planned.candidates = asked.candidates;
  if (planned.candidates == 0) planned.candidates = options_.candidates;
  if (search.asks_threshold) planned.threshold = asked.threshold;
  return planned;
}

absl::Status SearchValidator::CheckItem(const proto::QueryItem& message, TimePoint now,
                                        const CheckedSearch& search, CheckedItem& item) const {
  auto session = FindSession(store_, message, now);
  if (!session.ok()) return session.status();
  absl::Status status =
      CheckBetween("layer", message.layer(), 0, (*session)->settings().layers - 1);
  status.Update(CheckBetween("tokens", message.tokens(), 1, options_.query_tokens_max));
  if (!status.ok()) return status;

  item.layer_number = message.layer();
  item.layer = (*session)->State(message.layer());
  item.session = *std::move(session);
  item.tokens = message.tokens();
  status = CheckHeads(message, item);
  status.Update(CheckRange(message, item));
  if (status.ok()) status = CheckHeldCounts(message, search.topk(), item);
  if (!status.ok()) return status;
  item.settings_of_heads.reserve(item.kv_heads.size());
  for (const uint32_t head : item.kv_heads) {
    item.settings_of_heads.push_back(Resolve(search, item, head));
  }
  return absl::OkStatus();
}

absl::Status SearchValidator::CheckStateDType(proto::DType dtype, CheckedSearch& search) {
  if (dtype == proto::DTYPE_BF16 || !proto::DType_IsValid(dtype)) {
    return Invalid("state_dtype", "must be fp32 or fp16");
  }
  search.state_dtype = dtype == proto::DTYPE_FP16 ? DType::kFp16 : DType::kFp32;
  return absl::OkStatus();
}

template <typename Message>
absl::Status SearchValidator::CheckItems(const Message& message, absl::Span<const uint8_t> payload,
                                         TimePoint now, CheckedSearch& search) const {
  const DType dtype = QueryDType(message.query_dtype());
  const size_t element_bytes = kernels::DTypeBytes(dtype);
  if (element_bytes == 0) return Invalid("query_dtype", "must be bf16, fp16 or fp32");
  absl::Status status = CheckBetween("items", static_cast<uint64_t>(message.items_size()), 1,
                                     options_.batch_items_max);
  if (!status.ok()) return status;

  const auto of_item = [](size_t i, const absl::Status& error) {
    return proto::PrefixField(absl::StrCat("items[", i, "]."), error);
  };
  const auto count = static_cast<size_t>(message.items_size());
  proto::PayloadLayout layout;
  struct Part {
    size_t elements;  // of the item's queries
    size_t queries;   // where they stand
    size_t held;      // where the positions stand that it holds
  };
  auto* const parts = search.memory->Take<Part>(count);
  size_t elements = 0;
  search.items.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    CheckedItem& item = search.items.emplace_back(*search.memory);
    status = CheckItem(message.items(static_cast<int>(i)), now, search, item);
    if (!status.ok()) return of_item(i, status);
    if (const auto kind = BuiltKindOf(search.asked.index);
        kind.has_value() && !item.settings().Builds(*kind)) {
      return proto::FieldError(
          absl::StatusCode::kFailedPrecondition, "options.index",
          absl::StrCat("the session of items[", i, "] was not opened with it"));
    }
    Part& part = parts[i];
    part.elements =
        item.tokens * item.QueryHeads() * static_cast<size_t>(item.settings().kv.key_dim);
    part.queries = layout.Add(part.elements * element_bytes);
    size_t held = 0;
    for (const auto& list : item.held) held += list.size();
    part.held = layout.Add(held * sizeof(uint32_t));
    elements += part.elements;
  }
  status = CheckPayloadBytes(payload.size(), layout.bytes());
  if (!status.ok()) return status;

  float* converted = dtype == DType::kFp32 ? nullptr : search.memory->Take<float>(elements);
  for (size_t i = 0; i < count; ++i) {
    CheckedItem& item = search.items[i];
    const Part& part = parts[i];
    status = CheckHeld(reinterpret_cast<const uint32_t*>(payload.data() + part.held), item);
    if (!status.ok()) return of_item(i, status);
    const uint8_t* queries = payload.data() + part.queries;
    const int64_t bad =
        kernels::FindBadElement(queries, dtype, static_cast<int64_t>(part.elements));
    if (bad >= 0) {
      return Invalid("payload", absl::StrCat("query of items[", i, "], ", Describe(item, bad),
                                             " is not finite or its magnitude exceeds 65504"));
    }
    if (dtype == DType::kFp32) {
      item.queries = reinterpret_cast<const float*>(queries);
      continue;
    }
    item.queries = converted;
    kernels::ConvertToFloat(queries, dtype, part.elements, converted);
    converted += part.elements;
  }
  return absl::OkStatus();
}

absl::StatusOr<CheckedSearch> SearchValidator::Check(const proto::AttendRequest& message,
                                                     absl::Span<const uint8_t> payload,
                                                     TimePoint now) const {
  CheckedSearch search;
  absl::Status status = CheckOptions(message.options(), search);
  status.Update(CheckStateDType(message.state_dtype(), search));
  if (status.ok()) status = CheckItems(message, payload, now, search);
  if (!status.ok()) return status;
  return search;
}

absl::StatusOr<CheckedSearch> SearchValidator::Check(const proto::TopKRequest& message,
                                                     absl::Span<const uint8_t> payload,
                                                     TimePoint now) const {
  CheckedSearch search;
  absl::Status status = CheckOptions(message.options(), search);
  status.Update(CheckBetween("k", message.k(), 0, index::kMaxK));
  status.Update(CheckStateDType(message.state_dtype(), search));
  if (!status.ok()) return status;
  search.options.k = static_cast<int>(message.k());
  search.options.list_read = false;
  status = CheckItems(message, payload, now, search);
  if (!status.ok()) return status;
  search.with_rows = message.with_rows();
  search.with_state = message.with_state();
  return search;
}

}  // namespace kvseek::service
