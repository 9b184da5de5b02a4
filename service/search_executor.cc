#include "service/search_executor.h"

#include <algorithm>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "proto/status_code.h"

namespace kvseek::service {
namespace {

using index::Scratch;

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
        results_(tasks_.size()) {}

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
  };

  struct Unit {
    bool none = true;
    size_t task = 0;
    int piece = -1;  ///< -1: plan
  };

  /// So many searches are planned before any piece is run.
  int plans_wanted() const { return 2 * pool_.workers(); }
  /// Works as a runner.
  static void Work(const std::shared_ptr<SearchRun>& run, Scratch& scratch);
  /// Takes the next unit for a runner; without one, the runner is gone.
  Unit Next() ABSL_LOCKS_EXCLUDED(mutex_);
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
  /// Books a unit. Returns how many more runners there is work for.
  int Book(const Unit& unit, Outcome outcome) ABSL_LOCKS_EXCLUDED(mutex_);
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
  size_t next_task_ ABSL_GUARDED_BY(mutex_) = 0;
  int plans_ ABSL_GUARDED_BY(mutex_) = 0;  ///< searches begun and not finished
  std::deque<size_t> open_
      ABSL_GUARDED_BY(mutex_);  ///< planned searches with pieces left to give out
  int64_t open_pieces_ ABSL_GUARDED_BY(mutex_) = 0;
  int runners_ ABSL_GUARDED_BY(mutex_) = 0;    ///< jobs queued or running
  int under_way_ ABSL_GUARDED_BY(mutex_) = 0;  ///< units taken and not booked
  bool done_called_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
};

SearchRun::Unit SearchRun::Next() {
  absl::Status give_up = give_up_.Check();
  const std::lock_guard lock(mutex_);
  if (failure_.ok()) failure_ = std::move(give_up);
  if (failure_.ok() && next_task_ < tasks_.size() && (open_.empty() || plans_ < plans_wanted())) {
    ++under_way_;
    ++plans_;
    return {false, next_task_++, -1};
  }
  if (failure_.ok() && !open_.empty()) {
    const size_t task = open_.front();
    Search& search = searches_[task];
    const int piece = search.next_piece++;
    --open_pieces_;
    if (search.next_piece == search.pieces) open_.pop_front();
    ++under_way_;
    return {false, task, piece};
  }
  --runners_;
  return {};
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

int SearchRun::Book(const Unit& unit, Outcome outcome) {
  const std::lock_guard lock(mutex_);
  --under_way_;
  if (failure_.ok()) failure_ = std::move(outcome.status);
  if (!failure_.ok()) return 0;
  if (outcome.finished) --plans_;
  if (outcome.opened > 0) {
    open_.push_back(unit.task);
    open_pieces_ += outcome.opened;
  }
  const int64_t units = open_pieces_ + static_cast<int64_t>(tasks_.size() - next_task_);
  const int64_t wanted = std::min<int64_t>(units, pool_.workers()) - runners_;
  if (wanted <= 0) return 0;
  runners_ += static_cast<int>(wanted);
  return static_cast<int>(wanted);
}

bool SearchRun::FinishIfComplete(Scratch& scratch) {
  absl::Status failure;
  {
    const std::lock_guard lock(mutex_);
    const bool nothing_left = open_.empty() && next_task_ == tasks_.size();
    if (under_way_ > 0 || (failure_.ok() && !nothing_left)) return false;
    if (std::exchange(done_called_, true)) return true;
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
    if (!unit.none) {
      const int more = run->Book(unit, run->Run(unit, scratch));
      if (more > 0) run->pool_.Submit([run](Scratch& own) { Work(run, own); }, more);
    }
    if (run->FinishIfComplete(scratch) || unit.none) return;
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
