#include "index/scratch.h"

#include "index/spares.h"

namespace kvseek::index {
namespace {

Spares<Scratch>& TheSpares() {
  static auto* const spares = new Spares<Scratch>(kSpareScratches);  // outlives what is in use
  return *spares;
}

}  // namespace

SearchMemory TakeSearchMemory() { return SearchMemory(TheSpares().Take().release()); }

void KeepScratch::operator()(Scratch* scratch) const noexcept {
  std::unique_ptr<Scratch> given(scratch);
  if (given->Bytes() > kSpareBytes) return;
  given->Reset();
  TheSpares().Give(std::move(given));
}

}  // namespace kvseek::index
