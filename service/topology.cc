#include "service/topology.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace kvseek::service {
namespace {

constexpr int kNodesMax = 1024;  ///< as the kernel's
constexpr int kCpusMax = 1 << 16;

absl::StatusOr<std::vector<int>> ReadList(const std::string& path, int limit) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  if (!file.is_open() || file.bad()) {
    return absl::InvalidArgumentError(absl::StrCat(path, " cannot be read"));
  }
  auto list = ParseCpuList(text, limit);
  if (!list.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", list.status().message()));
  }
  return list;
}

}  // namespace

std::vector<int> AllowedCpus() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return {};
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(static_cast<size_t>(cpu), &allowed)) cpus.push_back(cpu);
  }
  return cpus;
}

Topology OneNode(std::vector<int> cpus) { return {NumaNode{0, std::move(cpus)}}; }

absl::StatusOr<std::vector<int>> ParseCpuList(absl::string_view text, int limit) {
  text = absl::StripAsciiWhitespace(text);
  std::vector<int> list;
  if (text.empty()) return list;
  for (const absl::string_view range : absl::StrSplit(text, ',')) {
    const std::vector<absl::string_view> ends = absl::StrSplit(range, '-');
    int first = 0;
    int last = 0;
    if (ends.size() > 2 || !absl::SimpleAtoi(ends.front(), &first) ||
        !absl::SimpleAtoi(ends.back(), &last) || first < 0 || last < first || last >= limit) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", range, "\" is no range of numbers below ", limit));
    }
    if (!list.empty() && first <= list.back()) {
      return absl::InvalidArgumentError(absl::StrCat(first, " comes after ", list.back()));
    }
    for (int number = first; number <= last; ++number) list.push_back(number);
  }
  return list;
}

absl::StatusOr<Topology> ReadTopology(const std::string& root, const std::vector<int>& allowed) {
  const std::string online = root + "/online";
  if (!std::ifstream(online)) return OneNode(allowed);
  const auto ids = ReadList(online, kNodesMax);
  if (!ids.ok()) return ids.status();
  Topology topology;
  std::vector<int> all;
  for (const int id : *ids) {
    const auto cpus = ReadList(absl::StrCat(root, "/node", id, "/cpulist"), kCpusMax);
    if (!cpus.ok()) return cpus.status();
    NumaNode node{id, {}};
    std::set_intersection(cpus->begin(), cpus->end(), allowed.begin(), allowed.end(),
                          std::back_inserter(node.cpus));
    all.insert(all.end(), node.cpus.begin(), node.cpus.end());
    if (!node.cpus.empty()) topology.push_back(std::move(node));
  }
  std::sort(all.begin(), all.end());
  if (all != allowed) {
    return absl::InvalidArgumentError(
        absl::StrCat("the nodes of ", root, " do not have each cpu of the process once"));
  }
  if (topology.empty()) return OneNode(allowed);
  return topology;
}

}  // namespace kvseek::service
