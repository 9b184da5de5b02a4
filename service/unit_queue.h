// Which unit of a run's searches is next: what SearchRun (search_executor.cc) hands out to workers.
//
// A search is a plan to be made, and then one step after the other, each of some pieces. Each
// search belongs to a NUMA node, and a worker takes units of its own node's as long as there are
// any, then others. Of a node, plans go before pieces until there are kPlansOfWorker searches begun
// and not finished for each of its workers; pieces go in the order in which their steps were
// opened.
//
// Where many searches are left, a worker takes up to kTogetherMax pieces of a step together, an
// eighth of what its share of all searches' steps would be: the fewer are left, the fewer at a
// time.
//
// Plans and pieces are claimed by atomic operations: units are as short as 5 us, and fourteen
// workers that took turns at a mutex for each of them spent half of the short steps waiting for it
// (docs/adr/0020). The list of open steps has a mutex, which is taken where a step opens; who finds
// steps without pieces drops them only if nobody else has it.
#ifndef KVSEEK_SERVICE_UNIT_QUEUE_H_
#define KVSEEK_SERVICE_UNIT_QUEUE_H_

#include <atomic>
#include <cstddef>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"

namespace kvseek::service {

struct SearchUnit {
  static constexpr int kPlan = -1;
  size_t search;
  int piece;   ///< the first; or kPlan
  int pieces;  ///< so many from there on; 1 where it is a plan
  int node;    ///< the search's
};

/// Thread-safe, but for Add.
class UnitQueue {
 public:
  static constexpr int kPlansOfWorker = 2;
  static constexpr int kTogetherMax = 4;  ///< pieces

  /// `memory`: of what it holds of each search and node.
  UnitQueue(size_t searches_max, absl::Span<const int> workers_of_nodes,
            std::pmr::memory_resource* memory = std::pmr::get_default_resource());
  /// Adds the next search; they are numbered from 0.
  void Add(int node);

  /// The next unit for a worker of this node, if there is one now.
  std::optional<SearchUnit> Take(int node) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether there may be one. A few loads a node, for workers that look.
  bool MayHaveUnits() const;
  /// Lets the pieces of a search's step be taken. All of the step before have been run. Returns how
  /// many units may be taken with them, counted up to `enough`.
  /// REQUIRES: pieces > 0.
  int Open(size_t search, int pieces, int enough) ABSL_LOCKS_EXCLUDED(mutex_);
  /// A search has come to its end. Returns how many have not.
  size_t Finish(size_t search);

 private:
  /// A search and its step; a cache line of its own.
  struct alignas(64) Step {
    std::atomic<int> left{0};  ///< pieces not taken; workers that come too late make it negative
    int pieces = 0;            ///< set before `left`
    /// Pieces taken at a time. A late worker may take as many of the next step.
    std::atomic<int> together{1};
    int node = 0;
    bool listed = false;               ///< among its node's open ones; with the lock
    std::atomic<Step*> next{nullptr};  ///< in that list; changes with the lock
    Step* next_plan = nullptr;         ///< the search to be planned after it; set by Add
  };
  struct alignas(64) Node {
    std::atomic<Step*> plan{nullptr};  ///< the next search to be planned
    std::atomic<int> begun{0};         ///< searches planned and not finished
    int begun_max = 0;
    Step* last_plan = nullptr;          ///< Add's
    std::atomic<Step*> front{nullptr};  ///< of the open steps; changes with the lock
    Step* back = nullptr;               ///< with the lock
  };

  size_t Number(const Step& step) const { return static_cast<size_t>(&step - steps_.data()); }
  std::optional<SearchUnit> TakeOf(Node& node) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether a plan goes before pieces.
  static bool PlansFirst(const Node& node) {
    return node.plan.load() != nullptr &&
           (node.begun.load() < node.begun_max || node.front.load() == nullptr);
  }
  std::optional<SearchUnit> TakePlan(Node& node);
  std::optional<SearchUnit> TakePiece(Step& step);
  /// Drops steps at the front of which nothing is left; false: another worker has the lock.
  bool DropTaken(Node& node) ABSL_LOCKS_EXCLUDED(mutex_);
  static void Unlist(Node& node, Step& step);
  /// How many of a step's pieces are taken at a time, if it opens now.
  int Together(int pieces) const;

  int workers_ = 0;               ///< of all nodes
  std::pmr::vector<Step> steps_;  ///< of each search
  size_t searches_ = 0;
  std::pmr::vector<Node> nodes_;

  alignas(64) std::atomic<size_t> planned_{0};
  std::atomic<size_t> finished_{0};
  alignas(64) std::mutex mutex_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_UNIT_QUEUE_H_
