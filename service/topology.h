// The machine's NUMA nodes, as far as this process may use them.
#ifndef KVSEEK_SERVICE_TOPOLOGY_H_
#define KVSEEK_SERVICE_TOPOLOGY_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace kvseek::service {

struct NumaNode {
  int id = 0;             ///< the system's
  std::vector<int> cpus;  ///< those that the process may use, ascending
};

/// By ascending id; at least one, and each with a cpu, unless it is not known which the process may
/// use. Elsewhere "node" is a number of this list: ids may have holes.
using Topology = std::vector<NumaNode>;

/// Cpus that the calling thread may run on (its affinity, within its cpuset), ascending; none: the
/// system does not say.
std::vector<int> AllowedCpus();

/// All of `cpus` as one node.
Topology OneNode(std::vector<int> cpus = AllowedCpus());

/// The nodes that have any of `allowed`, from a folder like /sys/devices/system/node; OneNode where
/// it is missing, as with kernels that know no nodes. invalid_argument: what stands there makes no
/// sense, or does not have each of `allowed` once.
absl::StatusOr<Topology> ReadTopology(const std::string& root, const std::vector<int>& allowed);

/// Of a list like "0-3,8,10-11"; white space around it and an empty list are fine.
/// invalid_argument: it is none, or has a number of `limit` or more.
absl::StatusOr<std::vector<int>> ParseCpuList(absl::string_view text, int limit);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_TOPOLOGY_H_
