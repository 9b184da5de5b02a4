#include "index/scratch.h"

#include <mutex>

#include "absl/base/thread_annotations.h"

namespace kvseek::index {
namespace {

struct Spares {
  std::mutex mutex;
  std::vector<std::unique_ptr<Scratch>> scratches ABSL_GUARDED_BY(mutex);
};

/// Never destroyed: searches may end after main does.
Spares& TheSpares() {
  static auto* const spares = [] {
    auto* const made = new Spares;
    const std::lock_guard lock(made->mutex);
    made->scratches.reserve(SearchMemory::kSpareSearches);  // giving one back must not throw
    return made;
  }();
  return *spares;
}

}  // namespace

SearchMemory::SearchMemory() {
  Spares& spares = TheSpares();
  {
    const std::lock_guard lock(spares.mutex);
    if (!spares.scratches.empty()) {
      scratch_ = std::move(spares.scratches.back());
      spares.scratches.pop_back();
    }
  }
  if (scratch_ == nullptr) scratch_ = std::make_unique<Scratch>();
}

SearchMemory::~SearchMemory() {
  if (scratch_->Bytes() > kSpareBytes) return;
  scratch_->Reset();
  Spares& spares = TheSpares();
  const std::lock_guard lock(spares.mutex);
  if (spares.scratches.size() == kSpareSearches) return;
  spares.scratches.push_back(std::move(scratch_));
}

}  // namespace kvseek::index
