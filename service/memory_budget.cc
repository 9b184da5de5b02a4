#include "service/memory_budget.h"

#include <algorithm>
#include <cassert>

#include "absl/strings/str_cat.h"
#include "proto/status_code.h"

namespace kvseek::service {

MemoryBudget::Reservation::~Reservation() {
  if (bytes_ != 0) budget_->used_.fetch_sub(bytes_, std::memory_order_relaxed);
}

MemoryBudget::MemoryBudget(uint64_t limit_bytes, std::chrono::milliseconds retry_after)
    : limit_bytes_(limit_bytes), retry_after_(retry_after) {}

MemoryBudget::~MemoryBudget() { assert(used_bytes() == 0 && "a reservation outlives its budget"); }

absl::StatusOr<MemoryBudget::Reservation> MemoryBudget::Reserve(uint64_t bytes,
                                                                absl::string_view field) {
  if (bytes == 0) return Reservation(this, 0);
  uint64_t used = used_.load(std::memory_order_relaxed);
  do {
    if (used > limit_bytes_ || bytes > limit_bytes_ - used) return Refusal(bytes, field);
  } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed));
  return Reservation(this, bytes);
}

absl::Status MemoryBudget::Check(uint64_t bytes, absl::string_view field) const {
  const uint64_t used = used_bytes();
  if (used > limit_bytes_ || bytes > limit_bytes_ - used) return Refusal(bytes, field);
  return absl::OkStatus();
}

absl::Status MemoryBudget::Refusal(uint64_t bytes, absl::string_view field) const {
  return proto::Exhausted(field,
                          absl::StrCat("needs ", bytes, " bytes of memory; ", used_bytes(), " of ",
                                       limit_bytes_, " are in use"),
                          static_cast<uint64_t>(retry_after_.count()));
}

absl::StatusOr<MemoryGrant> MemoryGrant::Make(MemoryBudget& budget, uint64_t bytes,
                                              absl::string_view field) {
  absl::StatusOr<MemoryBudget::Reservation> reserved = budget.Reserve(bytes, field);
  if (!reserved.ok()) return reserved.status();
  return MemoryGrant(budget, *std::move(reserved), field);
}

absl::StatusOr<MemoryBudget::Reservation> MemoryGrant::Take(uint64_t bytes) {
  MemoryBudget::Reservation taken = Split(bytes).reserved_;
  if (taken.bytes() < bytes) {
    absl::StatusOr<MemoryBudget::Reservation> more =
        budget_->Reserve(bytes - taken.bytes(), field_);
    if (!more.ok()) return more.status();
    more->bytes_ += std::exchange(taken.bytes_, 0);
    return more;
  }
  return taken;
}

MemoryGrant MemoryGrant::Split(uint64_t bytes) {
  const uint64_t taken = std::min(bytes, reserved_.bytes_);
  reserved_.bytes_ -= taken;
  return {*budget_, MemoryBudget::Reservation(budget_, taken), field_};
}

}  // namespace kvseek::service
