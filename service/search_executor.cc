#include "service/search_executor.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "index/spares.h"
#include "proto/status_code.h"
#include "service/short_lock.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

using index::Scratch;

// How long a worker looks for the next step of a run before it looks for other work.
constexpr std::chrono::microseconds kLookMax{200};

struct RunMemory;

/// The searches of one request under way. Runners (jobs on the pool) take units from it until there
/// are none.
class SearchRun {
 public:
  /// Makes the caller one of a run's runners, and submits as many as there is work for.
  static void Start(ComputePool& pool, absl::Span<const SearchTask> tasks, GiveUp give_up,
                    SearchDone done, Scratch& scratch);

  SearchRun(RunMemory& memory, ComputePool& pool, absl::Span<const SearchTask> tasks,
            GiveUp give_up, SearchDone done, int runners);

  /// One of its searches.
  struct Search {
    index::PlanPtr plan;
    int pieces = 0;           ///< of the step
    int next_piece = 0;       ///< to be given out
    int pieces_left = 0;      ///< to be done; atomic
    bool distrusted = false;  ///< answered from an earlier search, but not to be trusted ...
    int64_t wasted = 0;       ///< ... after so many bytes
  };

 private:
  struct Unit {
    bool none = true;
    size_t task = 0;
    int piece = -1;  ///< -1: plan
  };

  /// So many searches are planned before any piece is run.
  int plans_wanted() const { return 2 * pool_.workers(); }
  /// Submits `count` runners.
  void SubmitRunners(int count);
  /// Works as a runner, which holds the run until it is gone: the last one destroys it.
  void Work(Scratch& scratch);
  /// Until there are no units, or other requests want the worker.
  void TakeUnits(Scratch& scratch);
  /// Takes the next unit for a runner; without one, the runner is gone.
  Unit Next() ABSL_LOCKS_EXCLUDED(mutex_);
  /// For a runner that has gone: looks for units that another runner's unit makes ready, as long as
  /// idle workers look for jobs, but not long. True: there are some, and it is back.
  bool ComeBack() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether there are units to be given out.
  bool HasUnits() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return failure_.ok() && (next_open_ < open_.size() || next_task_ < tasks_.size());
  }
  /// What came of a unit.
  struct Outcome {
    absl::Status status;
    int opened = 0;         ///< pieces of its search that can be run now
    bool finished = false;  ///< its search is
  };
  Outcome Run(const Unit& unit, Scratch& scratch);
  index::PlanPtr Plan(const SearchTask& task, bool distrusted, Scratch& scratch) const;
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

  RunMemory& memory_;
  ComputePool& pool_;
  const absl::Span<const SearchTask> tasks_;
  const GiveUp give_up_;
  SearchDone done_;
  std::vector<Search>& searches_;  ///< a slot belongs to the unit that works on it
  std::vector<index::SearchResult>& results_;
  std::atomic<int> holders_;  ///< runners that are queued or not gone for good

  std::mutex mutex_;
  size_t next_task_ ABSL_GUARDED_BY(mutex_) = 0;
  int plans_ ABSL_GUARDED_BY(mutex_) = 0;  ///< searches begun and not finished
  /// Searches of which a step was opened, in that order: from next_open_ on with pieces left to
  /// give out.
  std::vector<size_t>& open_ ABSL_GUARDED_BY(mutex_);
  size_t next_open_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t open_pieces_ ABSL_GUARDED_BY(mutex_) = 0;
  int runners_ ABSL_GUARDED_BY(mutex_) = 0;    ///< jobs queued or running
  int lookers_ ABSL_GUARDED_BY(mutex_) = 0;    ///< runners gone that may come back
  int under_way_ ABSL_GUARDED_BY(mutex_) = 0;  ///< units taken and not booked
  bool done_called_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> changed_{false};  ///< since a looker has last looked; set with the lock
};

/// A run with the arrays that it works in, which the next one uses again.
struct RunMemory {
  std::vector<SearchRun::Search> searches;
  std::vector<index::SearchResult> results;  ///< as many as a run ever had
  std::vector<size_t> open;
  std::optional<SearchRun> run;

  size_t Bytes() const {
    size_t bytes = searches.capacity() * sizeof(SearchRun::Search);
    for (const index::SearchResult& result : results) bytes += sizeof(result) + result.Bytes();
    return bytes;
  }
};

constexpr size_t kSpareRuns = 64;
constexpr size_t kSpareRunBytes = size_t{4} << 20;  // of each

index::Spares<RunMemory>& TheSpares() {
  static auto* const spares = new index::Spares<RunMemory>(kSpareRuns);  // outlives what is in use
  return *spares;
}

SearchRun::SearchRun(RunMemory& memory, ComputePool& pool, absl::Span<const SearchTask> tasks,
                     GiveUp give_up, SearchDone done, int runners)
    : memory_(memory),
      pool_(pool),
      tasks_(tasks),
      give_up_(std::move(give_up)),
      done_(std::move(done)),
      searches_(memory.searches),
      results_(memory.results),
      holders_(1),
      open_(memory.open),
      runners_(runners) {
  searches_.resize(tasks.size());
  if (results_.size() < tasks.size()) results_.resize(tasks.size());
  open_.clear();
}

SearchRun::Unit SearchRun::Next() {
  absl::Status give_up = give_up_.Check();
  const auto lock = LockShortly(mutex_);
  if (failure_.ok()) failure_ = std::move(give_up);
  if (failure_.ok() && next_task_ < tasks_.size() &&
      (next_open_ == open_.size() || plans_ < plans_wanted())) {
    ++under_way_;
    ++plans_;
    return {false, next_task_++, -1};
  }
  if (failure_.ok() && next_open_ < open_.size()) {
    const size_t task = open_[next_open_];
    Search& search = searches_[task];
    const int piece = search.next_piece++;
    --open_pieces_;
    if (search.next_piece == search.pieces) ++next_open_;
    ++under_way_;
    return {false, task, piece};
  }
  --runners_;
  return {};
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

index::PlanPtr SearchRun::Plan(const SearchTask& task, bool distrusted, Scratch& scratch) const {
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
      if (std::atomic_ref(search.pieces_left).fetch_sub(1) > 1) return {};
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
  search.pieces_left = search.pieces;
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
  index::SearchResult& result = results_[task];
  result.Clear();
  search.plan->Finish(result, scratch);
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
  return true;
}

SearchRun::Booked SearchRun::Book(const Unit& unit, Outcome outcome) {
  const auto lock = LockShortly(mutex_);
  --under_way_;
  const bool last = under_way_ == 0;
  if (failure_.ok()) failure_ = std::move(outcome.status);
  if (!failure_.ok()) return {0, last};
  if (outcome.finished) --plans_;
  if (outcome.opened > 0) {
    open_.push_back(unit.task);
    open_pieces_ += outcome.opened;
  }
  const int64_t units = open_pieces_ + static_cast<int64_t>(tasks_.size() - next_task_);
  if (outcome.opened > 0) changed_.store(true);
  const int64_t wanted = std::min<int64_t>(units, pool_.workers()) - runners_ - lookers_;
  if (wanted <= 0) return {0, last};
  runners_ += static_cast<int>(wanted);
  return {static_cast<int>(wanted), last};
}

bool SearchRun::FinishIfComplete(Scratch& scratch) {
  absl::Status failure;
  {
    const std::lock_guard lock(mutex_);
    const bool nothing_left = next_open_ == open_.size() && next_task_ == tasks_.size();
    if (under_way_ > 0 || (failure_.ok() && !nothing_left)) return false;
    if (std::exchange(done_called_, true)) return true;
    changed_.store(true);
    failure = failure_;
  }
  scratch.Reset();
  searches_.clear();
  if (failure.ok()) {
    done_(absl::MakeConstSpan(results_).first(tasks_.size()), scratch);
  } else {
    done_(std::move(failure), scratch);
  }
  done_ = nullptr;
  return true;
}

void SearchRun::Start(ComputePool& pool, absl::Span<const SearchTask> tasks, GiveUp give_up,
                      SearchDone done, Scratch& scratch) {
  const int runners = std::clamp(static_cast<int>(tasks.size()), 1, pool.workers());
  std::unique_ptr<RunMemory> memory = TheSpares().Take();
  SearchRun& run =
      memory->run.emplace(*memory, pool, tasks, std::move(give_up), std::move(done), runners);
  memory.release();  // the last runner takes it
  run.SubmitRunners(runners - 1);
  run.Work(scratch);
}

void SearchRun::SubmitRunners(int count) {
  holders_.fetch_add(count, std::memory_order_relaxed);
  pool_.Submit([this](Scratch& own) { Work(own); }, count);
}

void SearchRun::Work(Scratch& scratch) {
  TakeUnits(scratch);
  if (holders_.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  std::unique_ptr<RunMemory> memory(&memory_);
  memory->run.reset();
  if (memory->Bytes() <= kSpareRunBytes) TheSpares().Give(std::move(memory));
}

void SearchRun::TakeUnits(Scratch& scratch) {
  for (;;) {
    const Unit unit = Next();
    Booked booked = {0, true};
    if (!unit.none) {
      booked = Book(unit, Run(unit, scratch));
      if (booked.more > 0) SubmitRunners(booked.more);
    }
    if (booked.last && FinishIfComplete(scratch)) return;
    if (unit.none && !ComeBack()) return;
    if (pool_.Crowded()) return SubmitRunners(1);
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

void RunSearches(ComputePool& pool, absl::Span<const SearchTask> tasks, GiveUp give_up,
                 SearchDone done, Scratch& scratch) {
  SearchRun::Start(pool, tasks, std::move(give_up), std::move(done), scratch);
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
