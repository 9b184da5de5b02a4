#include "service/search_executor.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "proto/status_code.h"
#include "service/short_lock.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

using index::Scratch;

// How long a worker looks for the next step of a run before it looks for other work.
constexpr std::chrono::microseconds kLookMax{200};

/// The searches of one request under way. Runners (jobs on the pool) take units from it until there
/// are none.
class SearchRun {
 public:
  SearchRun(ComputePool& pool, std::vector<SearchTask> tasks, GiveUp give_up, SearchDone done)
      : pool_(pool),
        tasks_(std::move(tasks)),
        give_up_(std::move(give_up)),
        done_(std::move(done)),
        searches_(tasks_.size()),
        results_(tasks_.size()),
        nodes_(static_cast<size_t>(pool.nodes())),
        units_(static_cast<int64_t>(tasks_.size())) {
    for (size_t task = 0; task < tasks_.size(); ++task) Push(NodeOf(task).waiting, task);
  }

  /// Makes the caller one of the run's runners, and submits as many as there is work for.
  static void Start(const std::shared_ptr<SearchRun>& run, Scratch& scratch);

 private:
  struct Search {
    std::unique_ptr<index::SearchPlan> plan;
    int pieces = 0;      ///< of the step
    int next_piece = 0;  ///< to be given out
    std::atomic<int> pieces_left{0};
    bool distrusted = false;  ///< answered from an earlier search, but not to be trusted ...
    int64_t wasted = 0;       ///< ... after so many bytes
    size_t next = 0;          ///< in its queue
  };

  /// Searches in the order in which they came, linked by Search::next.
  struct Queue {
    size_t size = 0;
    size_t first = 0;
    size_t last = 0;
  };

  /// The searches of one NUMA node.
  struct Node {
    Queue waiting;  ///< to be planned
    Queue open;     ///< planned, with pieces left to give out
    int plans = 0;  ///< begun and not finished
  };

  struct Unit {
    bool none = true;
    size_t task = 0;
    int piece = -1;  ///< -1: plan
  };

  Node& NodeOf(size_t task) {
    return nodes_[static_cast<size_t>(tasks_[task].view.shape.node) % nodes_.size()];
  }
  void Push(Queue& queue, size_t task) {
    (queue.size++ == 0 ? queue.first : searches_[queue.last].next) = task;
    queue.last = task;
  }
  void Pop(Queue& queue) {
    --queue.size;
    queue.first = searches_[queue.first].next;
  }
  /// Works as a runner.
  static void Work(const std::shared_ptr<SearchRun>& run, Scratch& scratch);
  /// Takes the next unit for a runner, of its own node if there is one; without any, the runner is
  /// gone.
  Unit Next() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Takes the next unit of one node, if there is one.
  Unit NextOf(size_t node) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  /// For a runner that has gone: looks for units that another runner's unit makes ready, as long as
  /// idle workers look for jobs, but not long. True: there are some, and it is back.
  bool ComeBack() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether there are units to be given out.
  bool HasUnits() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return failure_.ok() && units_ > 0;
  }
  /// What came of a unit.
  struct Outcome {
    absl::Status status;
    int opened = 0;         ///< pieces of its search that can be run now
    bool finished = false;  ///< its search is
  };
  Outcome Run(const Unit& unit, Scratch& scratch);
  std::unique_ptr<index::SearchPlan> Plan(const SearchTask& task, bool distrusted,
                                          Scratch& scratch) const;
  /// Plans a search. Returns the pieces of its first step; 0: it is finished.
  int Begin(size_t task, Scratch& scratch);
  /// Makes the pieces of the plan's step ready to be given out; returns how many there are.
  static int OpenStep(Search& search);
  /// Goes on with a search of which no piece is left to be run. Returns the next step's pieces; 0:
  /// the search is finished.
  int GoOn(size_t task, Scratch& scratch);
  /// Takes the result of a plan that is complete; false if it is not to be trusted.
  bool Finish(size_t task, Scratch& scratch);
  /// What is to be done after a unit.
  struct Booked {
    int more = 0;       ///< runners there is work for
    bool last = false;  ///< no unit is under way: FinishIfComplete
  };
  Booked Book(const Unit& unit, Outcome outcome) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Calls `done` if no unit is under way and none is left to do; true: that has been done. Runners
  /// that still wait for a worker are not waited for; they will find nothing.
  bool FinishIfComplete(Scratch& scratch) ABSL_LOCKS_EXCLUDED(mutex_);

  ComputePool& pool_;
  const std::vector<SearchTask> tasks_;
  const GiveUp give_up_;
  SearchDone done_;
  std::vector<Search> searches_;  ///< a slot belongs to the unit that works on it
  std::vector<index::SearchResult> results_;

  std::mutex mutex_;
  std::vector<Node> nodes_ ABSL_GUARDED_BY(mutex_);
  int64_t units_ ABSL_GUARDED_BY(mutex_);                ///< to be given out, of all nodes
  uint64_t units_own_node_ ABSL_GUARDED_BY(mutex_) = 0;  ///< given out to workers of their node ...
  uint64_t units_other_node_ ABSL_GUARDED_BY(mutex_) = 0;  ///< ... and to others
  int runners_ ABSL_GUARDED_BY(mutex_) = 0;                ///< jobs queued or running
  int lookers_ ABSL_GUARDED_BY(mutex_) = 0;                ///< runners gone that may come back
  int under_way_ ABSL_GUARDED_BY(mutex_) = 0;              ///< units taken and not booked
  bool done_called_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> changed_{false};  ///< since a looker has last looked; set with the lock
};

SearchRun::Unit SearchRun::Next() {
  absl::Status give_up = give_up_.Check();
  const auto lock = LockShortly(mutex_);
  if (failure_.ok()) failure_ = std::move(give_up);
  if (HasUnits()) {
    const auto own = static_cast<size_t>(ComputePool::CallersNode());
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Unit unit = NextOf((own + i) % nodes_.size());
      if (unit.none) continue;
      --units_;
      ++under_way_;
      ++(i == 0 ? units_own_node_ : units_other_node_);
      return unit;
    }
  }
  --runners_;
  return {};
}

SearchRun::Unit SearchRun::NextOf(size_t number) {
  Node& node = nodes_[number];
  const int plans_wanted = 2 * pool_.workers(static_cast<int>(number));
  if (node.waiting.size > 0 && (node.open.size == 0 || node.plans < plans_wanted)) {
    const size_t task = node.waiting.first;
    Pop(node.waiting);
    ++node.plans;
    return {false, task, -1};
  }
  if (node.open.size == 0) return {};
  const size_t task = node.open.first;
  Search& search = searches_[task];
  const int piece = search.next_piece++;
  if (search.next_piece == search.pieces) Pop(node.open);
  return {false, task, piece};
}

bool SearchRun::ComeBack() {
  const auto end = std::chrono::steady_clock::now() + std::min(pool_.spin(), kLookMax);
  const auto may_look = [&] { return !pool_.Crowded() && std::chrono::steady_clock::now() < end; };
  if (!may_look()) return false;
  bool counted = false;
  for (;;) {
    {
      const auto lock = LockShortly(mutex_);
      if (std::exchange(counted, true)) --lookers_;
      if (HasUnits()) {
        ++runners_;
        return true;
      }
      if (done_called_ || !failure_.ok() || !may_look()) return false;
      changed_.store(false);
      ++lookers_;
    }
    while (!changed_.load(std::memory_order_relaxed) && may_look()) transport::Pause();
  }
}

std::unique_ptr<index::SearchPlan> SearchRun::Plan(const SearchTask& task, bool distrusted,
                                                   Scratch& scratch) const {
  if (task.last != nullptr && !distrusted) {
    index::SearchOptions options = task.options;
    options.keep = 0;
    auto plan = index::PlanReuse(task.last, task.reuse, task.view, task.query, options, scratch);
    if (plan != nullptr) return plan;
    scratch.Reset();
  }
  return task.index->Plan(task.view, task.query, task.options, scratch);
}

SearchRun::Outcome SearchRun::Run(const Unit& unit, Scratch& scratch) {
  Search& search = searches_[unit.task];
  scratch.Reset();
  try {
    int opened = 0;
    if (unit.piece < 0) {
      opened = Begin(unit.task, scratch);
    } else {
      search.plan->Run(unit.piece, scratch);
      if (search.pieces_left.fetch_sub(1) > 1) return {};
      opened = GoOn(unit.task, scratch);
    }
    return {absl::OkStatus(), opened, opened == 0};
  } catch (...) {
    return {StatusOfException()};
  }
}

int SearchRun::Begin(size_t task, Scratch& scratch) {
  Search& search = searches_[task];
  search.plan = Plan(tasks_[task], search.distrusted, scratch);
  const int pieces = OpenStep(search);
  return pieces > 0 ? pieces : GoOn(task, scratch);
}

int SearchRun::OpenStep(Search& search) {
  search.pieces = search.plan->pieces();
  search.next_piece = 0;
  search.pieces_left.store(search.pieces);
  return search.pieces;
}

int SearchRun::GoOn(size_t task, Scratch& scratch) {
  Search& search = searches_[task];
  scratch.Reset();
  while (search.plan->NextStep(scratch)) {
    const int pieces = OpenStep(search);
    if (pieces > 0) return pieces;
  }
  scratch.Reset();
  if (Finish(task, scratch)) return 0;
  scratch.Reset();
  return Begin(task, scratch);
}

bool SearchRun::Finish(size_t task, Scratch& scratch) {
  Search& search = searches_[task];
  index::SearchResult result = search.plan->Finish(scratch);
  search.plan.reset();
  if (!result.report.trusted) {
    search.distrusted = true;
    search.wasted = result.report.bytes_touched;
    return false;
  }
  result.report.trusted = !search.distrusted;
  result.report.bytes_touched += search.wasted;
  if (tasks_[task].remember && !result.report.reused) {
    tasks_[task].remember(std::move(result.last));
  }
  result.last = nullptr;
  results_[task] = std::move(result);
  return true;
}

SearchRun::Booked SearchRun::Book(const Unit& unit, Outcome outcome) {
  const auto lock = LockShortly(mutex_);
  --under_way_;
  const bool last = under_way_ == 0;
  if (failure_.ok()) failure_ = std::move(outcome.status);
  if (!failure_.ok()) return {0, last};
  if (outcome.finished) --NodeOf(unit.task).plans;
  if (outcome.opened > 0) {
    Push(NodeOf(unit.task).open, unit.task);
    units_ += outcome.opened;
    changed_.store(true);
  }
  const int64_t wanted = std::min<int64_t>(units_, pool_.workers()) - runners_ - lookers_;
  if (wanted <= 0) return {0, last};
  runners_ += static_cast<int>(wanted);
  return {static_cast<int>(wanted), last};
}

bool SearchRun::FinishIfComplete(Scratch& scratch) {
  absl::Status failure;
  {
    const std::lock_guard lock(mutex_);
    if (under_way_ > 0 || HasUnits()) return false;
    if (std::exchange(done_called_, true)) return true;
    pool_.CountUnits(units_own_node_, units_other_node_);
    changed_.store(true);
    failure = failure_;
  }
  scratch.Reset();
  searches_.clear();
  if (failure.ok()) {
    done_(std::move(results_), scratch);
  } else {
    done_(std::move(failure), scratch);
  }
  done_ = nullptr;
  return true;
}

void SearchRun::Start(const std::shared_ptr<SearchRun>& run, Scratch& scratch) {
  const int runners = std::clamp(static_cast<int>(run->tasks_.size()), 1, run->pool_.workers());
  {
    const std::lock_guard lock(run->mutex_);
    run->runners_ = runners;
  }
  run->pool_.Submit([run](Scratch& own) { Work(run, own); }, runners - 1);
  Work(run, scratch);
}

void SearchRun::Work(const std::shared_ptr<SearchRun>& run, Scratch& scratch) {
  for (;;) {
    const Unit unit = run->Next();
    Booked booked = {0, true};
    if (!unit.none) {
      booked = run->Book(unit, run->Run(unit, scratch));
      if (booked.more > 0) run->pool_.Submit([run](Scratch& own) { Work(run, own); }, booked.more);
    }
    if (booked.last && run->FinishIfComplete(scratch)) return;
    if (unit.none && !run->ComeBack()) return;
    if (run->pool_.Crowded()) {
      run->pool_.Submit([run](Scratch& own) { Work(run, own); });
      return;
    }
  }
}

}  // namespace

absl::Status GiveUp::Check() const {
  if (stopping != nullptr && stopping->load(std::memory_order_relaxed)) {
    return absl::UnavailableError("the daemon is stopping");
  }
  if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed)) {
    return absl::CancelledError("the request was given up");
  }
  if (std::chrono::steady_clock::now() >= deadline) {
    return absl::DeadlineExceededError("the deadline passed before the answer was complete");
  }
  return absl::OkStatus();
}

void RunSearches(ComputePool& pool, std::vector<SearchTask> tasks, GiveUp give_up, SearchDone done,
                 Scratch& scratch) {
  const auto run =
      std::make_shared<SearchRun>(pool, std::move(tasks), std::move(give_up), std::move(done));
  SearchRun::Start(run, scratch);
}

absl::Status StatusOfException() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return proto::Exhausted("", "out of memory", 0);
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  } catch (...) {
    return absl::InternalError("unknown exception");
  }
}

}  // namespace kvseek::service
