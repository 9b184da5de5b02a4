#include "service/search_executor.h"

#include <algorithm>
#include <exception>
#include <memory_resource>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "index/spares.h"
#include "proto/status_code.h"
#include "service/unit_queue.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

using index::Scratch;

// How long a worker looks for the next step of a run before it looks for other work.
constexpr std::chrono::microseconds kLookMax{200};

constexpr int kUnitsLeft = -1;  // other pieces of the step are still to be run

/// Gives a worker's time to phases.
class PhaseClock {
 public:
  explicit PhaseClock(ComputePool& pool) : counts_(pool.search_counts()) {}

  /// All since the last call.
  void Spent(index::SearchPhase phase) {
    const auto now = std::chrono::steady_clock::now();
    counts_.CountTime(ComputePool::CallersWorker(), phase, now - since_);
    since_ = now;
  }

 private:
  SearchCounts& counts_;
  std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

struct RunMemory;

/// The searches of one request under way. Runners (jobs on the pool) take units from it until there
/// are none.
class SearchRun {
 public:
  SearchRun(RunMemory& memory, ComputePool& pool, absl::Span<const SearchTask> tasks,
            GiveUp give_up, SearchDone done);

  /// Makes the caller one of the run's runners, and submits the others.
  void Start(Scratch& scratch);
  /// After Start, and at the end of each runner's job: the last one ends the run, and its memory is
  /// kept for another.
  void LetGo();

 private:
  struct alignas(64) Search {
    index::PlanPtr plan;
    std::atomic<int> pieces_left{0};  ///< of the step, not run
    bool distrusted = false;  ///< answered from an earlier search, but not to be trusted ...
    int64_t wasted = 0;       ///< ... after so many bytes
  };

  /// Works as a runner, until there are no units and none are to come soon.
  void Work(Scratch& scratch);
  void Submit(int runners);
  /// Has guests of the pool work as long as there are units, or some are to come soon. They are not
  /// counted as runners: there are enough of these without them.
  void InviteGuests();
  /// RunUnits, of one that is counted while it may have a unit.
  bool RunCounted(Scratch& scratch);
  /// Takes and runs units until there are none now; true: others want the worker before that.
  bool RunUnits(Scratch& scratch);
  /// Lets pieces be taken, and submits runners for them.
  void MakeReady(size_t search, int pieces);
  /// For a runner without a unit: looks for units that another runner's makes ready, as long as
  /// idle workers look for jobs, but not long. True: there may be some.
  bool Look() const;
  /// Runs a unit. Returns the pieces that it made ready; 0: its search is finished; or kUnitsLeft.
  int Run(const SearchUnit& unit, Scratch& scratch);
  index::PlanPtr Plan(const SearchTask& task, bool distrusted, Scratch& scratch) const;
  /// Plans a search. Returns the pieces of its first step; 0: it is finished.
  int Begin(size_t task, PhaseClock& clock, Scratch& scratch);
  /// Goes on with a search of which no piece is left to be run. Returns the next step's pieces; 0:
  /// the search is finished.
  int GoOn(size_t task, PhaseClock& clock, Scratch& scratch);
  /// Prepares the plan's step; returns its pieces.
  static int BeginStep(Search& search);
  /// Takes the result of a plan that is complete; false if it is not to be trusted.
  bool Finish(size_t task, Scratch& scratch);
  /// Whether the run has failed, as it does when it is to be given up. Before each piece.
  bool GivenUp();
  /// No unit is taken any more; `done` gets the first failure once none is under way.
  void Fail(absl::Status status) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Calls `done`, unless that has been done. No unit may be under way. Runners that still wait for
  /// a worker are not waited for; they will find nothing.
  void CallDone(Scratch& scratch) ABSL_LOCKS_EXCLUDED(mutex_);

  RunMemory& memory_;
  ComputePool& pool_;
  const absl::Span<const SearchTask> tasks_;
  const GiveUp give_up_;
  SearchDone done_;
  std::pmr::vector<Search> searches_;  ///< a slot belongs to the unit that works on it
  const absl::Span<index::SearchResult> results_;
  UnitQueue units_;

  // Whoever may have a unit is counted before it looks at failed_, and who finds it set takes none:
  // the last of them calls `done`. Likewise a runner stops being counted before it looks for units
  // a last time, and units are there before runners are counted: either the one sees the others or
  // these see it.
  alignas(64) std::atomic<int> holders_{1};  ///< who has not let go
  std::atomic<int> runners_{0};  ///< jobs queued or running, in order to work or to look
  std::atomic<int> working_{0};  ///< runners that may have a unit
  // Apart from those, since all runners read these at each unit.
  alignas(64) std::atomic<bool> failed_{false};
  std::atomic<bool> done_called_{false};
  std::mutex mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
};

/// What a run stands on, which another uses again.
struct RunMemory {
  static constexpr size_t kSpares = 64;
  static constexpr size_t kSpareBytes = size_t{4} << 20;  ///< of each

  Scratch scratch;                           ///< its lists
  std::vector<index::SearchResult> results;  ///< as many as a run ever had
  std::optional<SearchRun> run;

  size_t Bytes() const {
    size_t bytes = scratch.Bytes();
    for (const index::SearchResult& result : results) bytes += sizeof(result) + result.Bytes();
    return bytes;
  }
  absl::Span<index::SearchResult> Results(size_t count) {
    if (results.size() < count) results.resize(count);
    return absl::MakeSpan(results).first(count);
  }
};

index::Spares<RunMemory>& SpareRuns() {
  static auto* const spares = new index::Spares<RunMemory>(RunMemory::kSpares);  // never destroyed
  return *spares;
}

SearchRun::SearchRun(RunMemory& memory, ComputePool& pool, absl::Span<const SearchTask> tasks,
                     GiveUp give_up, SearchDone done)
    : memory_(memory),
      pool_(pool),
      tasks_(tasks),
      give_up_(std::move(give_up)),
      done_(std::move(done)),
      searches_(tasks.size(), &memory.scratch),
      results_(memory.Results(tasks.size())),
      units_(tasks.size(), pool.workers_of_nodes(), &memory.scratch) {
  for (const SearchTask& task : tasks) units_.Add(task.view.shape.node);
}

bool SearchRun::Look() const {
  const auto end = std::chrono::steady_clock::now() + std::min(pool_.spin(), kLookMax);
  while (!pool_.Wanted() && !done_called_.load() && !failed_.load() &&
         std::chrono::steady_clock::now() < end) {
    if (units_.MayHaveUnits()) return true;
    transport::Pause();
  }
  return false;
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

int SearchRun::Run(const SearchUnit& unit, Scratch& scratch) {
  PhaseClock clock(pool_);
  scratch.Reset();
  if (unit.piece == SearchUnit::kPlan) return Begin(unit.search, clock, scratch);
  Search& search = searches_[unit.search];
  const index::SearchPhase phase = search.plan->phase();
  for (int i = 0; i < unit.pieces; ++i) {
    if (i > 0) {
      if (GivenUp()) return kUnitsLeft;
      scratch.Reset();
    }
    search.plan->Run(unit.piece + i, scratch);
  }
  clock.Spent(phase);
  if (search.pieces_left.fetch_sub(unit.pieces) > unit.pieces) return kUnitsLeft;
  return GoOn(unit.search, clock, scratch);
}

int SearchRun::Begin(size_t task, PhaseClock& clock, Scratch& scratch) {
  Search& search = searches_[task];
  search.plan = Plan(tasks_[task], search.distrusted, scratch);
  clock.Spent(index::SearchPhase::kPlan);
  const int pieces = BeginStep(search);
  return pieces > 0 ? pieces : GoOn(task, clock, scratch);
}

int SearchRun::BeginStep(Search& search) {
  const int pieces = search.plan->pieces();
  search.pieces_left.store(pieces);
  return pieces;
}

int SearchRun::GoOn(size_t task, PhaseClock& clock, Scratch& scratch) {
  Search& search = searches_[task];
  scratch.Reset();
  for (;;) {
    const index::SearchPhase phase = search.plan->phase();
    const bool more = search.plan->NextStep(scratch);
    clock.Spent(phase);
    if (!more) break;
    const int pieces = BeginStep(search);
    if (pieces > 0) return pieces;
  }
  scratch.Reset();
  const bool trusted = Finish(task, scratch);
  clock.Spent(index::SearchPhase::kFinish);
  if (trusted) return 0;
  scratch.Reset();
  return Begin(task, clock, scratch);
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

void SearchRun::Fail(absl::Status status) {
  const std::lock_guard lock(mutex_);
  if (failure_.ok()) failure_ = std::move(status);
  failed_.store(true);
}

bool SearchRun::GivenUp() {
  if (failed_.load()) return true;
  absl::Status status = give_up_.Check();
  if (status.ok()) return false;
  Fail(std::move(status));
  return true;
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
    done_(absl::Span<const index::SearchResult>(results_), scratch);
  } else {
    done_(std::move(failure), scratch);
  }
  done_ = nullptr;
}

void SearchRun::Start(Scratch& scratch) {
  if (tasks_.empty()) return CallDone(scratch);
  const int workers = pool_.workers();
  // Where workers look for units, all do from the beginning.
  const int runners = pool_.spin().count() > 0
                          ? workers
                          : static_cast<int>(std::min<size_t>(tasks_.size(), workers));
  runners_.store(runners);
  Submit(runners - 1);
  InviteGuests();
  Work(scratch);
}

void SearchRun::InviteGuests() {
  const int guests = pool_.GuestsLooking();
  if (guests <= 0) return;
  holders_.fetch_add(guests);
  const int invited = pool_.Invite(
      [this](Scratch& own) {
        do {
          RunCounted(own);
        } while (Look());
        LetGo();
      },
      guests);
  holders_.fetch_sub(guests - invited);  // the caller is one
}

void SearchRun::Submit(int runners) {
  if (runners <= 0) return;
  holders_.fetch_add(runners);
  pool_.Submit(
      [this](Scratch& own) {
        Work(own);
        LetGo();
      },
      runners);
}

void SearchRun::LetGo() {
  if (holders_.fetch_sub(1) > 1) return;
  std::unique_ptr<RunMemory> memory(&memory_);
  memory->run.reset();
  memory->scratch.Reset();
  if (memory->Bytes() <= RunMemory::kSpareBytes) SpareRuns().Give(std::move(memory));
}

void SearchRun::Work(Scratch& scratch) {
  for (;;) {
    if (RunCounted(scratch)) return Submit(1);
    if (Look()) continue;
    runners_.fetch_sub(1);
    if (failed_.load() || !units_.MayHaveUnits()) return;
    runners_.fetch_add(1);
  }
}

bool SearchRun::RunCounted(Scratch& scratch) {
  working_.fetch_add(1);
  const bool made_room = RunUnits(scratch);
  if (working_.fetch_sub(1) == 1 && failed_.load()) CallDone(scratch);
  return made_room;
}

bool SearchRun::RunUnits(Scratch& scratch) {
  const int node = ComputePool::CallersNode();
  while (!GivenUp()) {
    const auto unit = units_.Take(node);
    if (!unit.has_value()) break;
    try {
      const int opened = Run(*unit, scratch);
      pool_.search_counts().CountUnits(ComputePool::CallersWorker(), unit->node == node,
                                       static_cast<uint64_t>(unit->pieces));
      if (opened == 0 && units_.Finish(unit->search) == 0) CallDone(scratch);
      if (opened > 0) MakeReady(unit->search, opened);
    } catch (...) {
      Fail(StatusOfException());
    }
    if (pool_.Wanted()) return true;
  }
  return false;
}

void SearchRun::MakeReady(size_t search, int pieces) {
  const int ready = units_.Open(search, pieces, pool_.workers());
  InviteGuests();
  const int missing = ready - runners_.load();
  if (missing <= 0) return;
  runners_.fetch_add(missing);
  Submit(missing);
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
  std::unique_ptr<RunMemory> memory = SpareRuns().Take();
  SearchRun& run = memory->run.emplace(*memory, pool, tasks, std::move(give_up), std::move(done));
  (void)memory.release();  // LetGo takes it again
  run.Start(scratch);
  run.LetGo();
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
