#include "service/statistics.h"

#include <chrono>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "index/slab_memory.h"
#include "kernels/cpu/simd_level.h"
#include "service/session.h"
#include "service/session_info.h"
#include "service/shared_planners.h"

namespace kvseek::service {

proto::StatsResponse MakeStats(const proto::StatsRequest& message, const StatsSources& sources) {
  const auto& [options, store, pool, builder, counters, audits, facts, started] = sources;
  const TimePoint now = std::chrono::steady_clock::now();
  proto::StatsResponse response;
  response.set_uptime_ms(Milliseconds(now - started));
  response.set_memory_used_bytes(store.budget().used_bytes());
  response.set_memory_limit_bytes(store.budget().limit_bytes());
  response.set_sessions_open(store.size());
  if (facts.connections_open) response.set_connections_open(facts.connections_open());
  response.set_queue_depth(pool.requests());
  response.set_queue_limit(pool.requests_max());
  response.set_workers(static_cast<uint32_t>(pool.workers()));
  response.set_simd_level(kernels::SimdLevel());
  const auto add_counter = [&response](const std::string& name, uint64_t value) {
    proto::Counter* counter = response.add_counters();
    counter->set_name(name);
    counter->set_value(value);
  };
  for (const auto& [name, value] : counters.Values()) add_counter(name, value);
  for (const auto& [name, value] : audits.Values()) add_counter(name, value);
  for (const auto& [name, value] : pool.search_counts().Values()) add_counter(name, value);
  add_counter("sessions_expired", store.expired());
  const SharedPlanners::Counts planners = store.planners().counts();
  add_counter("planners", planners.kept);
  add_counter("planners_evicted", planners.evicted);
  add_counter("planner_heads", planners.heads);
  add_counter("planner_audits", planners.audits);
  add_counter("indexes_built", builder.built());
  add_counter("indexes_refused", builder.refused());
  add_counter("indexes_outdated", builder.outdated());
  add_counter("index_build_core_ms", builder.core_ms());
  add_counter("index_layers_queued", builder.layers());
  for (int node = 0; node < pool.nodes(); ++node) {
    add_counter(absl::StrCat("slab_bytes_node_", pool.topology()[static_cast<size_t>(node)].id),
                index::SlabBytes(node));
  }
  if (facts.counters) {
    for (const auto& [name, value] : facts.counters()) add_counter(name, value);
  }
  if (!message.with_sessions()) return response;

  constexpr size_t kTagAndLength = 8;
  size_t bytes = response.ByteSizeLong();
  for (const auto& session : store.List()) {
    if (message.session_id() != 0 && session->id() != message.session_id()) continue;
    proto::SessionInfo info = DescribeSession(store.boot_id(), *session, message.with_plans(), now);
    bytes += info.ByteSizeLong() + kTagAndLength;
    if (bytes > options.metadata_bytes_max) break;  // as many as an answer can hold
    *response.add_sessions() = std::move(info);
  }
  return response;
}

}  // namespace kvseek::service
