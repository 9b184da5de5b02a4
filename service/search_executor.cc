#include "service/search_executor.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "proto/status_code.h"
#include "service/unit_queue.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

using index::Scratch;

// How long a worker looks for the next step of a run before it looks for other work.
constexpr std::chrono::microseconds kLookMax{200};

constexpr int kUnitsLeft = -1;  // other pieces of the step are still to be run

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
        results_(tasks_.size()) {
    units_.Prepare(tasks_.size(), pool.workers_of_nodes());
    for (const SearchTask& task : tasks_) units_.Add(task.view.shape.node);
  }

  /// Makes the caller one of the run's runners, and submits the others.
  static void Start(const std::shared_ptr<SearchRun>& run, Scratch& scratch);

 private:
  struct alignas(64) Search {
    std::unique_ptr<index::SearchPlan> plan;
    std::atomic<int> pieces_left{0};  ///< of the step, not run
    bool distrusted = false;  ///< answered from an earlier search, but not to be trusted ...
    int64_t wasted = 0;       ///< ... after so many bytes
  };

  /// Works as a runner, until there are no units and none are to come soon.
  static void Work(const std::shared_ptr<SearchRun>& run, Scratch& scratch);
  static void Submit(const std::shared_ptr<SearchRun>& run, int runners);
  /// Takes and runs units until there are none now; true: others want the worker before that.
  static bool RunUnits(const std::shared_ptr<SearchRun>& run, Scratch& scratch);
  /// Lets pieces be taken, and submits runners for them.
  static void MakeReady(const std::shared_ptr<SearchRun>& run, size_t search, int pieces);
  /// For a runner without a unit: looks for units that another runner's makes ready, as long as
  /// idle workers look for jobs, but not long. True: there may be some.
  bool Look() const;
  /// Runs a unit. Returns the pieces that it made ready; 0: its search is finished; or kUnitsLeft.
  int Run(const SearchUnit& unit, Scratch& scratch);
  std::unique_ptr<index::SearchPlan> Plan(const SearchTask& task, bool distrusted,
                                          Scratch& scratch) const;
  /// Plans a search. Returns the pieces of its first step; 0: it is finished.
  int Begin(size_t task, Scratch& scratch);
  /// Goes on with a search of which no piece is left to be run. Returns the next step's pieces; 0:
  /// the search is finished.
  int GoOn(size_t task, Scratch& scratch);
  /// Prepares the plan's step; returns its pieces.
  static int BeginStep(Search& search);
  /// Takes the result of a plan that is complete; false if it is not to be trusted.
  bool Finish(size_t task, Scratch& scratch);
  /// No unit is taken any more; `done` gets the first failure once none is under way.
  void Fail(absl::Status status) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Calls `done`, unless that has been done. No unit may be under way. Runners that still wait for
  /// a worker are not waited for; they will find nothing.
  void CallDone(Scratch& scratch) ABSL_LOCKS_EXCLUDED(mutex_);

  ComputePool& pool_;
  const std::vector<SearchTask> tasks_;
  const GiveUp give_up_;
  SearchDone done_;
  std::vector<Search> searches_;  ///< a slot belongs to the unit that works on it
  std::vector<index::SearchResult> results_;
  UnitQueue units_;

  // Whoever may have a unit is counted before it looks at failed_, and who finds it set takes none:
  // the last of them calls `done`. Likewise a runner stops being counted before it looks for units
  // a last time, and units are there before runners are counted: either the one sees the others or
  // these see it.
  std::atomic<int> runners_{0};  ///< jobs queued or running, in order to work or to look
  std::atomic<int> working_{0};  ///< runners that may have a unit
  std::atomic<bool> failed_{false};
  std::atomic<bool> done_called_{false};
  std::mutex mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
};

bool SearchRun::Look() const {
  const auto end = std::chrono::steady_clock::now() + std::min(pool_.spin(), kLookMax);
  while (!pool_.Crowded() && !done_called_.load() && !failed_.load() &&
         std::chrono::steady_clock::now() < end) {
    if (units_.MayHaveUnits()) return true;
    transport::Pause();
  }
  return false;
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

int SearchRun::Run(const SearchUnit& unit, Scratch& scratch) {
  scratch.Reset();
  if (unit.piece == SearchUnit::kPlan) return Begin(unit.search, scratch);
  Search& search = searches_[unit.search];
  search.plan->Run(unit.piece, scratch);
  if (search.pieces_left.fetch_sub(1) > 1) return kUnitsLeft;
  return GoOn(unit.search, scratch);
}

int SearchRun::Begin(size_t task, Scratch& scratch) {
  Search& search = searches_[task];
  search.plan = Plan(tasks_[task], search.distrusted, scratch);
  const int pieces = BeginStep(search);
  return pieces > 0 ? pieces : GoOn(task, scratch);
}

int SearchRun::BeginStep(Search& search) {
  const int pieces = search.plan->pieces();
  search.pieces_left.store(pieces);
  return pieces;
}

int SearchRun::GoOn(size_t task, Scratch& scratch) {
  Search& search = searches_[task];
  scratch.Reset();
  while (search.plan->NextStep(scratch)) {
    const int pieces = BeginStep(search);
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

void SearchRun::Fail(absl::Status status) {
  const std::lock_guard lock(mutex_);
  if (failure_.ok()) failure_ = std::move(status);
  failed_.store(true);
}

void SearchRun::CallDone(Scratch& scratch) {
  if (done_called_.exchange(true)) return;
  absl::Status failure;
  if (failed_.load()) {
    const std::lock_guard lock(mutex_);
    failure = failure_;
    for (Search& search : searches_) search.plan.reset();
  }
  scratch.Reset();
  if (failure.ok()) {
    done_(std::move(results_), scratch);
  } else {
    done_(std::move(failure), scratch);
  }
  done_ = nullptr;
}

void SearchRun::Start(const std::shared_ptr<SearchRun>& run, Scratch& scratch) {
  if (run->tasks_.empty()) return run->CallDone(scratch);
  const int workers = run->pool_.workers();
  // Where workers look for units, all do from the beginning.
  const int runners = run->pool_.spin().count() > 0
                          ? workers
                          : static_cast<int>(std::min<size_t>(run->tasks_.size(), workers));
  run->runners_.store(runners);
  Submit(run, runners - 1);
  Work(run, scratch);
}

void SearchRun::Submit(const std::shared_ptr<SearchRun>& run, int runners) {
  run->pool_.Submit([run](Scratch& own) { Work(run, own); }, runners);
}

void SearchRun::Work(const std::shared_ptr<SearchRun>& run, Scratch& scratch) {
  for (;;) {
    run->working_.fetch_add(1);
    const bool made_room = RunUnits(run, scratch);
    if (run->working_.fetch_sub(1) == 1 && run->failed_.load()) run->CallDone(scratch);
    if (made_room) return Submit(run, 1);
    if (run->Look()) continue;
    run->runners_.fetch_sub(1);
    if (run->failed_.load() || !run->units_.MayHaveUnits()) return;
    run->runners_.fetch_add(1);
  }
}

bool SearchRun::RunUnits(const std::shared_ptr<SearchRun>& run, Scratch& scratch) {
  const int node = ComputePool::CallersNode();
  while (!run->failed_.load()) {
    if (absl::Status status = run->give_up_.Check(); !status.ok()) {
      run->Fail(std::move(status));
      break;
    }
    const auto unit = run->units_.Take(node);
    if (!unit.has_value()) break;
    try {
      const int opened = run->Run(*unit, scratch);
      run->pool_.CountUnit(unit->node == node);
      if (opened == 0 && run->units_.Finish(unit->search) == 0) run->CallDone(scratch);
      if (opened > 0) MakeReady(run, unit->search, opened);
    } catch (...) {
      run->Fail(StatusOfException());
    }
    if (run->pool_.Crowded()) return true;
  }
  return false;
}

void SearchRun::MakeReady(const std::shared_ptr<SearchRun>& run, size_t search, int pieces) {
  const int ready = run->units_.Open(search, pieces, run->pool_.workers());
  const int missing = ready - run->runners_.load();
  if (missing <= 0) return;
  run->runners_.fetch_add(missing);
  Submit(run, missing);
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
