#include "service/doorbell.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/frame.h"
#include "proto/status_code.h"
#include "service/field_checks.h"
#include "service/payload.h"
#include "service/search_executor.h"

namespace kvseek::service {
namespace {

using transport::DoorbellAnswer;
using transport::DoorbellItem;
using transport::DoorbellQuestion;

constexpr size_t kFittingMax = 4096;  ///< sessions remembered; then they are looked up again

}  // namespace

Doorbell::Doorbell(DoorbellSettings settings, transport::SealedMemory memory, SessionStore& store,
                   std::shared_ptr<DoorbellCounts> counts, std::function<void()> freed)
    : settings_(std::move(settings)),
      layout_(settings_.shape),
      memory_(std::move(memory)),
      store_(store),
      counts_(std::move(counts)),
      freed_(std::move(freed)),
      slots_(settings_.shape.slots) {
  for (Slot& slot : slots_) {
    slot.items.resize(settings_.shape.items_max);
    *slot.message.mutable_options() = settings_.request.options();
    slot.message.set_query_dtype(settings_.request.query_dtype());
    slot.message.set_state_dtype(proto::DTYPE_FP16);
  }
  counts_->open.fetch_add(1, std::memory_order_relaxed);
}

Doorbell::~Doorbell() {
  counts_->open.fetch_sub(1, std::memory_order_relaxed);
  { const transport::SealedMemory unmapped = std::move(memory_); }
  if (freed_) freed_();
}

void Doorbell::Close() {
  closed_.store(true, std::memory_order_relaxed);
  for (Slot& slot : slots_) slot.cancelled->store(true, std::memory_order_relaxed);
}

std::atomic_ref<uint64_t> Doorbell::Asked(uint32_t s) const {
  return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(memory_.data() + layout_.asked(s)));
}

bool Doorbell::Look(const AskHandler& ask) {
  bool found = false;
  for (uint32_t s = 0; s < slots_.size() && !closed(); ++s) {
    Slot& slot = slots_[s];
    const uint64_t number = Asked(s).load(std::memory_order_acquire);
    if (number == slot.seen) continue;
    found = true;
    if (!slot.busy.load(std::memory_order_acquire)) {
      Take(s, number, ask);
    } else if (!slot.cancelled->exchange(true, std::memory_order_relaxed)) {
      counts_->overtaken.fetch_add(1, std::memory_order_relaxed);
    }
  }
  return found;
}

void Doorbell::Take(uint32_t s, uint64_t number, const AskHandler& ask) {
  Slot& slot = slots_[s];
  absl::Status status;
  Request request;
  slot.arrived = Clock::now();
  try {
    status = CopyQuestion(s, slot);
    if (status.ok()) request.payload = CopyQueries(s, slot);
    // What the client was still writing is of no use, and it is about to say that it has.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (Asked(s).load(std::memory_order_relaxed) != number) return;
    slot.arrived = Clock::now();
    if (status.ok()) status = CheckSessions(slot);
    if (status.ok()) FillMessage(slot);
  } catch (...) {
    status = StatusOfException();
  }
  counts_->questions.fetch_add(1, std::memory_order_relaxed);
  slot.seen = number;
  slot.cancelled->store(closed(), std::memory_order_relaxed);
  slot.busy.store(true, std::memory_order_relaxed);
  if (!status.ok() || slot.message.items().empty()) {
    return Answer(s, number, status, nullptr);
  }
  request.op = proto::Op::kAttend;
  request.attend = {shared_from_this(), &slot.message};
  request.deadline = slot.arrived + settings_.deadline;
  request.cancelled = slot.cancelled;
  ask(std::move(request), [self = shared_from_this(), s, number](const Response& response) {
    self->Answer(s, number, absl::OkStatus(), &response);
  });
}

absl::Status Doorbell::CopyQuestion(uint32_t s, Slot& slot) {
  const transport::DoorbellShape& shape = layout_.shape();
  const uint8_t* const from = memory_.data() + layout_.question(s);
  std::memcpy(&slot.question, from, sizeof(DoorbellQuestion));
  absl::Status status = CheckBetween("items", slot.question.items, 1, shape.items_max);
  status.Update(CheckBetween("tokens", slot.question.tokens, 1, shape.tokens_max));
  if (!status.ok()) return status;
  std::memcpy(slot.items.data(), from + sizeof(DoorbellQuestion),
              slot.question.items * sizeof(DoorbellItem));
  return absl::OkStatus();
}

/// The queries of items without a session stay behind; the others' stand as in a request.
Payload Doorbell::CopyQueries(uint32_t s, const Slot& slot) const {
  const transport::DoorbellShape& shape = layout_.shape();
  const uint64_t each = TokenHeads(slot) * shape.key_dim * shape.query_element_bytes;
  const uint8_t* const queries = memory_.data() + layout_.queries(s);
  proto::PayloadLayout places;
  for (uint32_t i = 0; i < slot.question.items; ++i) {
    if (slot.items[i].session_id != 0) places.Add(each);
  }
  Payload payload = MakePayload(places.bytes());
  places = {};
  for (uint32_t i = 0; i < slot.question.items; ++i) {
    if (slot.items[i].session_id == 0) continue;
    std::memcpy(payload.data.get() + places.Add(each), queries + i * each, each);
  }
  return payload;
}

/// Where a session is of another shape, its states would not fit. Sessions that are not there are
/// the request's own business.
absl::Status Doorbell::CheckSessions(const Slot& slot) {
  const proto::ModelShape& shape = settings_.request.shape();
  for (uint32_t i = 0; i < slot.question.items; ++i) {
    const uint64_t id = slot.items[i].session_id;
    if (id == 0 || fitting_.contains(id)) continue;
    const std::string field = absl::StrCat("items[", i, "].session");
    const auto session = store_.Find(store_.boot_id(), id, field, Clock::now());
    if (!session.ok()) return session.status();
    const SessionSettings& settings = (*session)->settings();
    if (settings.layers != shape.layers() || settings.kv_heads != shape.kv_heads() ||
        settings.query_heads != shape.query_heads() ||
        static_cast<uint32_t>(settings.kv.key_dim) != shape.key_dim() ||
        static_cast<uint32_t>(settings.kv.value_dim) != shape.value_dim()) {
      return Invalid(field, "is not of the doorbell's shape");
    }
    if (fitting_.size() >= kFittingMax) fitting_.clear();
    fitting_.insert(id);
  }
  return absl::OkStatus();
}

void Doorbell::FillMessage(Slot& slot) const {
  slot.message.clear_items();
  for (uint32_t i = 0; i < slot.question.items; ++i) {
    const DoorbellItem& from = slot.items[i];
    if (from.session_id == 0) continue;
    proto::QueryItem& item = *slot.message.add_items();
    item.mutable_session()->set_boot_id(store_.boot_id());
    item.mutable_session()->set_session_id(from.session_id);
    item.set_layer(static_cast<uint32_t>(&slot - slots_.data()));
    item.set_tokens(slot.question.tokens);
    item.set_range_begin(from.begin);
    item.add_range_end(from.end);
    *item.mutable_kv_heads() = settings_.request.kv_heads();
  }
}

/// States of all items; items without a session get empty ones.
absl::Status Doorbell::WriteStates(uint32_t s, const Slot& slot, const Response* response) const {
  const uint64_t heads = TokenHeads(slot);
  const uint64_t out_bytes = heads * layout_.shape().value_dim * sizeof(uint16_t);
  proto::PayloadLayout places;
  for (int i = 0; i < slot.message.items_size(); ++i) {
    places.Add(out_bytes);
    places.Add(heads * sizeof(float));
  }
  if (response != nullptr && response->payload.bytes != places.bytes()) {
    return absl::InternalError("the answer has not the doorbell's shape");
  }
  uint8_t* const outs = memory_.data() + layout_.outs(s);
  uint8_t* const lses = memory_.data() + layout_.lses(s);
  places = {};
  for (uint32_t i = 0; i < slot.question.items; ++i) {
    auto* const lse = reinterpret_cast<float*>(lses) + i * heads;
    if (slot.items[i].session_id == 0 || response == nullptr) {
      std::fill_n(lse, heads, -std::numeric_limits<float>::infinity());
      continue;
    }
    const uint8_t* const payload = response->payload.data.get();
    std::memcpy(outs + i * out_bytes, payload + places.Add(out_bytes), out_bytes);
    std::memcpy(lse, payload + places.Add(heads * sizeof(float)), heads * sizeof(float));
  }
  return absl::OkStatus();
}

void Doorbell::Answer(uint32_t s, uint64_t number, const absl::Status& asked,
                      const Response* response) {
  Slot& slot = slots_[s];
  absl::Status status = asked;
  if (status.ok() && response != nullptr && response->error) {
    proto::Error error;
    error.ParseFromString(response->metadata);
    status = proto::FromError(error);
  }
  if (status.ok()) status = WriteStates(s, slot, response);
  if (!status.ok()) counts_->errors.fetch_add(1, std::memory_order_relaxed);
  auto* const answer = reinterpret_cast<DoorbellAnswer*>(memory_.data() + layout_.answer(s));
  answer->status = static_cast<uint32_t>(status.code());
  answer->daemon_ns = static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - slot.arrived).count());
  std::atomic_ref<uint64_t>(answer->number).store(number, std::memory_order_release);
  slot.busy.store(false, std::memory_order_release);
}

}  // namespace kvseek::service
