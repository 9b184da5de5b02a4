// The daemon's memory for keys, values and codes: one number that never passes its limit.
//
// Whoever allocates reserves first; the reservation lives in the object that owns the memory (a
// segment, a tail chunk, a session's tables), so what several sessions share counts once and is
// given back when the last of them lets go.
#ifndef KVSEEK_SERVICE_MEMORY_BUDGET_H_
#define KVSEEK_SERVICE_MEMORY_BUDGET_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace kvseek::service {

/// Thread-safe. Must outlive its reservations.
class MemoryBudget {
 public:
  /// A number of reserved bytes, given back on destruction. Movable; not thread-safe.
  class Reservation {
   public:
    Reservation() = default;
    Reservation(Reservation&& other) noexcept
        : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Reservation& operator=(Reservation&& other) noexcept {
      std::swap(budget_, other.budget_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Reservation();

    uint64_t bytes() const { return bytes_; }

   private:
    friend class MemoryBudget;
    friend class MemoryGrant;
    Reservation(MemoryBudget* budget, uint64_t bytes) : budget_(budget), bytes_(bytes) {}

    MemoryBudget* budget_ = nullptr;
    uint64_t bytes_ = 0;
  };

  /// `retry_after` is what a refusal tells.
  MemoryBudget(uint64_t limit_bytes, std::chrono::milliseconds retry_after);
  ~MemoryBudget();
  MemoryBudget(const MemoryBudget&) = delete;
  MemoryBudget& operator=(const MemoryBudget&) = delete;

  /// resource_exhausted, naming `field`, when the limit does not allow it.
  absl::StatusOr<Reservation> Reserve(uint64_t bytes, absl::string_view field);
  /// The refusal that Reserve would give now; reserves nothing.
  absl::Status Check(uint64_t bytes, absl::string_view field) const;

  uint64_t used_bytes() const { return used_.load(std::memory_order_relaxed); }
  uint64_t limit_bytes() const { return limit_bytes_; }

 private:
  absl::Status Refusal(uint64_t bytes, absl::string_view field) const;

  const uint64_t limit_bytes_;
  const std::chrono::milliseconds retry_after_;
  std::atomic<uint64_t> used_{0};
};

/// Memory promised to one operation before it begins, so that it need not fail half-way. What it
/// does not take is given back. Not thread-safe.
class MemoryGrant {
 public:
  /// Refusals name `field`, which must outlive the grant.
  static absl::StatusOr<MemoryGrant> Make(MemoryBudget& budget, uint64_t bytes,
                                          absl::string_view field);

  /// `bytes` out of the grant; what is missing there comes from the budget.
  absl::StatusOr<MemoryBudget::Reservation> Take(uint64_t bytes);
  /// A part of it, at most `bytes`, for use by another thread.
  MemoryGrant Split(uint64_t bytes);

 private:
  MemoryGrant(MemoryBudget& budget, MemoryBudget::Reservation reserved, absl::string_view field)
      : budget_(&budget), reserved_(std::move(reserved)), field_(field) {}

  MemoryBudget* budget_;
  MemoryBudget::Reservation reserved_;
  absl::string_view field_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_MEMORY_BUDGET_H_
