// What the daemon counts since its start. Stats reports it by name; docs/operations.md says what
// each name means.
#ifndef KVSEEK_SERVICE_REQUEST_COUNTERS_H_
#define KVSEEK_SERVICE_REQUEST_COUNTERS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "proto/frame.h"

namespace kvseek::service {

/// Thread-safe.
class RequestCounters {
 public:
  void CountRequest(proto::Op op, uint64_t payload_bytes);
  void CountAnswer(uint64_t payload_bytes) { Add(bytes_out_, payload_bytes); }
  void CountError(absl::StatusCode code);
  void CountAppended(uint64_t tokens) { Add(tokens_appended_, tokens); }
  void CountSampled(uint64_t tokens) { Add(queries_sampled_, tokens); }
  void CountSearches(absl::Span<const index::SearchResult> results);

  /// All counters that are not zero, by name.
  std::map<std::string, uint64_t> Values() const;

 private:
  using Counter = std::atomic<uint64_t>;
  static void Add(Counter& counter, uint64_t value) {
    counter.fetch_add(value, std::memory_order_relaxed);
  }

  std::array<Counter, 16> requests_{};  ///< by op; 0: unknown ones
  std::array<Counter, 17> errors_{};    ///< by status code
  Counter bytes_in_{0};
  Counter bytes_out_{0};
  Counter tokens_appended_{0};
  Counter queries_sampled_{0};
  Counter searches_{0};
  Counter searches_reused_{0};
  Counter searches_distrusted_{0};
  Counter keys_scanned_{0};
  Counter keys_fine_{0};
  Counter keys_exact_{0};
  Counter bytes_touched_{0};
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_REQUEST_COUNTERS_H_
