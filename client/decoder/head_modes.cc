#include "client/decoder/head_modes.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace kvseek::client {

ModeChooser::ModeChooser(uint32_t layers, uint32_t kv_heads, std::vector<HeadMode> modes, bool rows)
    : kv_heads_(kv_heads),
      modes_(std::move(modes)),
      rows_(rows),
      layers_(layers),
      resolved_(kv_heads) {
  if (modes_.empty()) modes_.assign(static_cast<size_t>(layers) * kv_heads, HeadMode::kAuto);
}

const std::vector<HeadMode>& ModeChooser::Next(uint32_t layer) {
  Layer& state = layers_[layer];
  if (!rows_ || state.state.measured < kTrials) {
    state.current = HeadMode::kState;
  } else if (state.rows.measured < kTrials) {
    state.current = HeadMode::kRows;
  } else {
    const bool rows_win = state.rows.average < state.state.average;
    const bool trial = ++state.steps % kTrialEvery == 0;
    state.current = rows_win != trial ? HeadMode::kRows : HeadMode::kState;
  }
  for (uint32_t head = 0; head < kv_heads_; ++head) {
    const HeadMode mode = modes_[static_cast<size_t>(layer) * kv_heads_ + head];
    resolved_[head] = mode == HeadMode::kAuto ? state.current : mode;
  }
  return resolved_;
}

bool ModeChooser::Chooses(uint32_t layer) const {
  const auto first = modes_.begin() + static_cast<ptrdiff_t>(size_t{layer} * kv_heads_);
  return rows_ && std::find(first, first + kv_heads_, HeadMode::kAuto) != first + kv_heads_;
}

void ModeChooser::Record(uint32_t layer, double microseconds) {
  Layer& state = layers_[layer];
  Cost& cost = state.current == HeadMode::kRows ? state.rows : state.state;
  // The first time includes what is set up once.
  cost.average =
      cost.measured < 2 ? microseconds : kKeep * cost.average + (1.0 - kKeep) * microseconds;
  ++cost.measured;
}

}  // namespace kvseek::client
