// Which unit of a run's searches is next: what SearchRun (search_executor.cc) hands out to workers.
//
// A search is a plan to be made, and then one step after the other, each of some pieces. Each
// search belongs to a NUMA node, and a worker takes units of its own node's as long as there are
// any, then others. Of a node, plans go before pieces until there are kPlansOfWorker searches begun
// and not finished for each of its workers; pieces go in the order in which their steps were
// opened.
//
// A piece is claimed by one atomic operation on its step's count: units are as short as 5 us, and
// fourteen workers that took turns at a mutex for each of them spent half of the short steps
// waiting for it (docs/adr/0020). Plans and the lists of open steps have a mutex, which is
// taken a few times a step.
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
  int piece;  ///< or kPlan
  int node;   ///< the search's
};

/// Thread-safe, but for Add.
class UnitQueue {
 public:
  static constexpr int kPlansOfWorker = 2;

  /// `memory`: of what it holds of each search and node.
  UnitQueue(size_t searches_max, absl::Span<const int> workers_of_nodes,
            std::pmr::memory_resource* memory = std::pmr::get_default_resource());
  /// Adds the next search; they are numbered from 0.
  void Add(int node);

  /// The next unit for a worker of this node, if there is one now.
  std::optional<SearchUnit> Take(int node) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether there may be one. Two loads a node, for workers that look.
  bool MayHaveUnits() const;
  /// Lets the pieces of a search's step be taken. All of the step before have been run. Returns how
  /// many units may be taken now, counted up to `enough`.
  /// REQUIRES: pieces > 0.
  int Open(size_t search, int pieces, int enough) ABSL_LOCKS_EXCLUDED(mutex_);
  /// A search has come to its end. Returns how many have not.
  size_t Finish(size_t search) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  /// A search's step; a cache line of its own.
  struct alignas(64) Step {
    std::atomic<int> left{0};  ///< pieces not taken; workers that come too late make it negative
    int pieces = 0;            ///< set before `left`
    int node = 0;
    bool listed = false;   ///< among its node's open ones; with the lock
    Step* next = nullptr;  ///< in its list; with the lock
  };
  /// In the order in which they came.
  struct List {
    void PushBack(Step& step);
    Step* back = nullptr;
    std::atomic<Step*> front{nullptr};
  };
  struct alignas(64) Node {
    List open;                             ///< changes with the lock
    std::atomic<bool> plans_ready{false};  ///< a plan goes before pieces; changes with the lock
    List waiting;                          ///< searches to be planned; with the lock
    int begun = 0;                         ///< and not finished; with the lock
    int begun_max = 0;
  };

  size_t Number(const Step& step) const { return static_cast<size_t>(&step - steps_.data()); }
  std::optional<SearchUnit> TakeOf(Node& node) ABSL_LOCKS_EXCLUDED(mutex_);
  std::optional<SearchUnit> TakePlan(Node& node) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Drops steps at the front of which nothing is left.
  void DropTaken(Node& node) ABSL_LOCKS_EXCLUDED(mutex_);
  static void UpdatePlansReady(Node& node);
  static void Unlist(List& list, Step& step);

  std::pmr::vector<Step> steps_;  ///< of each search
  size_t searches_ = 0;
  std::pmr::vector<Node> nodes_;

  alignas(64) std::mutex mutex_;
  size_t planned_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_UNIT_QUEUE_H_
