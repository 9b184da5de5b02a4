// What a daemon tells of itself: the answer to Stats. docs/operations.md says what each counter
// means.
#ifndef KVSEEK_SERVICE_STATISTICS_H_
#define KVSEEK_SERVICE_STATISTICS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "proto/kvseek.pb.h"
#include "service/compute_pool.h"
#include "service/index_builder.h"
#include "service/options.h"
#include "service/request_audits.h"
#include "service/request_counters.h"
#include "service/session_store.h"

namespace kvseek::service {

/// Facts that Stats reports and only the server knows.
struct ServerFacts {
  std::function<uint64_t()> connections_open;
  std::function<std::vector<std::pair<std::string, uint64_t>>()> counters{};  ///< or null
};

/// What there is to be told of.
struct StatsSources {
  const DaemonOptions& options;
  SessionStore& store;
  const ComputePool& pool;
  const IndexBuilder& builder;
  const RequestCounters& counters;
  const RequestAudits& audits;
  const ServerFacts& facts;
  TimePoint started;
};

/// Of the sessions that the message asks for, as many as an answer can hold.
proto::StatsResponse MakeStats(const proto::StatsRequest& message, const StatsSources& sources);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_STATISTICS_H_
