#include "cli/library_search.h"

#include <utility>

namespace kvseek::cli {

PieceRunner::PieceRunner(int threads) {
  for (int i = 1; i < threads; ++i) {
    threads_.emplace_back([this] {
      index::Scratch scratch;
      Work(scratch);
    });
  }
}

PieceRunner::~PieceRunner() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void PieceRunner::RunPieces(std::unique_lock<std::mutex>& lock, index::Scratch& scratch) {
  while (plan_ != nullptr && next_ < plan_->pieces()) {
    index::SearchPlan* plan = plan_;
    const int piece = next_++;
    ++running_;
    lock.unlock();
    plan->Run(piece, scratch);
    lock.lock();
    --running_;
  }
  if (running_ == 0) done_.notify_all();
}

void PieceRunner::Work(index::Scratch& scratch) {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return stop_ || (plan_ != nullptr && next_ < plan_->pieces()); });
    if (stop_) return;
    RunPieces(lock, scratch);
  }
}

index::SearchResult PieceRunner::Search(const index::KeyIndex& index, const index::KvView& view,
                                        const index::SearchQuery& query,
                                        const index::SearchOptions& options) {
  return Run(index.Plan(view, query, options, scratch_));
}

index::SearchResult PieceRunner::Run(index::PlanPtr plan) {
  if (threads_.empty()) return index::RunAll(*plan, scratch_);
  do {
    std::unique_lock lock(mutex_);
    plan_ = plan.get();
    next_ = 0;
    work_.notify_all();
    RunPieces(lock, scratch_);
    done_.wait(lock, [&] { return running_ == 0; });
    plan_ = nullptr;
  } while (plan->NextStep(scratch_));
  index::SearchResult result;
  plan->Finish(result, scratch_);
  return result;
}

SearchFunction SearchLibrary(const HeadTrace& trace, const StoredHead& head,
                             const index::KeyIndex& index, PieceRunner& runner) {
  return [&trace, &index, &runner, view = head.view()](
             int step, const index::SearchOptions& options) -> absl::StatusOr<index::SearchResult> {
    const index::SearchQuery query{
        .queries = trace.StepQueries(step), .group = trace.group, .begin = 0, .end = trace.tokens};
    return runner.Search(index, view, query, options);
  };
}

SearchFunction SearchReusing(const HeadTrace& trace, const StoredHead& head,
                             const index::KeyIndex& index, const index::ReuseOptions& options,
                             PieceRunner& runner) {
  struct State {
    index::SelectionReuse reuse;
    int step;  // the last one
  };
  auto state = std::make_shared<State>(State{index::SelectionReuse(options), -1});
  return [&trace, &index, &runner, view = head.view(), state](
             int step, const index::SearchOptions& search) -> absl::StatusOr<index::SearchResult> {
    if (step != state->step + 1) state->reuse.Forget();
    state->step = step;
    const index::SearchQuery query{
        .queries = trace.StepQueries(step), .group = trace.group, .begin = 0, .end = trace.tokens};
    int64_t wasted = 0;
    if (auto plan = state->reuse.Plan(view, query, search, runner.scratch())) {
      index::SearchResult result = runner.Run(std::move(plan));
      if (result.report.trusted) return result;
      wasted = result.report.bytes_touched;
    }
    index::SearchResult result = runner.Search(index, view, query, state->reuse.ForSearch(search));
    result.report.bytes_touched += wasted;
    state->reuse.Remember(result);
    return result;
  };
}

}  // namespace kvseek::cli
