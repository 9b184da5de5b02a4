// Two NUMA nodes, for machines with one.
#ifndef KVSEEK_TESTS_SERVICE_TWO_NODES_H_
#define KVSEEK_TESTS_SERVICE_TWO_NODES_H_

#include <vector>

#include "service/topology.h"

namespace kvseek::service {

/// As if this machine's cpus were two nodes'.
inline Topology TwoNodes() {
  const std::vector<int> cpus = AllowedCpus();
  return {{0, {cpus.front()}}, {1, {cpus.back()}}};
}

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_TWO_NODES_H_
