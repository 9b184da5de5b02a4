// One sequence of a decode step's batch, as the parts of the step see it.
#ifndef KVSEEK_CLIENT_DECODER_STEP_SEQUENCE_H_
#define KVSEEK_CLIENT_DECODER_STEP_SEQUENCE_H_

#include <cstdint>
#include <vector>

#include "client/decoder/far_store.h"
#include "client/decoder/row_cache.h"
#include "client/decoder/steady_zone.h"

namespace kvseek::client {

/// Owns nothing.
struct StepSequence {
  uint32_t place = 0;  ///< of its row cache, below sequences_max
  const SteadyZone* zone = nullptr;
  FarStore* store = nullptr;
  std::vector<RowCache>* caches = nullptr;  ///< (layers, kv_heads); empty without rows
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_STEP_SEQUENCE_H_
