#include "service/request_audits.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "index/rest_audit.h"
#include "service/query_operations.h"

namespace kvseek::service {
namespace {

// An audit holds a score for each query head and key, 128 MiB, and a search about as much.
constexpr int64_t kScoresMax = int64_t{1} << 25;
constexpr uint64_t kBytesPerScore = 2 * sizeof(float);
// Below this the ratio of the estimated to the true missed mass says nothing.
constexpr double kMissedMin = 1e-3;

}  // namespace

void AuditHistogram::Count(double value) {
  const auto at = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  counts_[static_cast<size_t>(at)].fetch_add(1, std::memory_order_relaxed);
}

void AuditHistogram::AddTo(const std::string& name, std::map<std::string, uint64_t>& values) const {
  uint64_t sum = 0;
  for (size_t i = 0; i < bounds_.size(); ++i) {
    sum += counts_[i].load(std::memory_order_relaxed);
    values[absl::StrCat(name, "_le_", bounds_[i])] = sum;
  }
}

RequestAudits::RequestAudits(const DaemonOptions& options, MemoryBudget& budget)
    : budget_(budget),
      share_(options.audit_share),
      queue_max_(options.audit_queue_max),
      draws_(std::random_device{}()),
      error_({0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0}),
      recall_({0.5, 0.8, 0.9, 0.95, 0.99, 1.0}),
      missed_({0.001, 0.01, 0.03, 0.1, 0.3, 1.0}),
      missed_ratio_({0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0}) {
  if (share_ > 0.0) thread_ = std::thread([this] { Work(); });
}

RequestAudits::~RequestAudits() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

uint64_t RequestAudits::Draw(uint64_t bound) {
  const uint64_t draw = draws_.fetch_add(1, std::memory_order_relaxed);
  return static_cast<uint64_t>(index::UniformHash(0, draw, 0) * static_cast<double>(bound));
}

void RequestAudits::Offer(const CheckedSearch& search) {
  if (share_ <= 0.0) return;
  constexpr uint64_t kGrain = uint64_t{1} << 32;
  if (static_cast<double>(Draw(kGrain)) >= share_ * static_cast<double>(kGrain)) return;
  const auto tasks = MakeTasks(search);
  if (tasks.empty()) return;
  const size_t chosen = Draw(tasks.size());
  const SearchTask& task = tasks[chosen];
  size_t place = chosen;
  size_t i = 0;
  while (place >= search.items[i].Results()) place -= search.items[i++].Results();
  const CheckedItem& item = search.items[i];
  const size_t head = place % item.kv_heads.size();
  const bool counts = !search.topk() && task.index != &index::ExactIndex();
  if (!counts && item.session->planner() == nullptr) return;

  auto taken = std::make_unique<Taken>();
  taken->session = item.session;
  taken->layer = item.layer_number;
  taken->kv_head = item.kv_heads[head];
  taken->index = ChooseIndex(item, head, task.query.end - task.query.begin);
  taken->counts = counts;
  taken->queries.assign(
      task.query.queries,
      task.query.queries + static_cast<ptrdiff_t>(task.query.group) * task.view.shape.key_dim);
  taken->query = task.query;
  taken->query.queries = taken->queries.data();
  taken->options = task.options;
  taken->options.k = -1;
  taken->options.stop_at = index::SearchOptions().stop_at;  // it has passed
  const int64_t scores = (task.query.end - task.query.begin) * task.query.group;
  {
    // The other thread may be off its core while it holds the lock: nobody waits for it.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || scores > kScoresMax || queue_.size() >= queue_max_) {
      dropped_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    queue_.push_back(std::move(taken));
  }
  wake_.notify_one();
}

void RequestAudits::Work() {
  // Without it the audits would be paid for by the answers.
  const sched_param idle{};
  pthread_setschedparam(pthread_self(), SCHED_IDLE, &idle);
  std::unique_lock lock(mutex_);
  while (true) {
    while (!stop_ && queue_.empty()) wake_.wait(lock);
    if (stop_) return;
    const std::unique_ptr<const Taken> taken = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    bool done = false;
    try {
      done = Audit(*taken);
    } catch (...) {  // no memory
    }
    (done ? audits_ : dropped_).fetch_add(1, std::memory_order_relaxed);
    lock.lock();
  }
}

bool RequestAudits::Audit(const Taken& taken) {
  std::shared_ptr<const Session> session = taken.session.lock();
  if (session == nullptr) return false;
  const std::shared_ptr<const LayerState> state = session->State(taken.layer);
  const std::shared_ptr<LivePlanner> planner = session->planner();
  session.reset();
  const index::KeyIndex* const index = FindIndex(*state, taken.kv_head, taken.index);
  if (state->tokens < taken.query.end || index == nullptr) return false;
  const auto range = static_cast<uint64_t>(taken.query.end - taken.query.begin);
  const auto memory = budget_.Reserve(
      range * static_cast<uint64_t>(taken.query.group) * kBytesPerScore, "audit_share");
  if (!memory.ok()) return false;

  index::Scratch scratch;
  const index::KvView view = state->View(taken.kv_head);
  const index::SearchAudit audit(view, taken.query, scratch);
  if (taken.counts) Count(taken, *index, view, audit, scratch);
  if (planner == nullptr || range == 0) return true;
  const LivePlanner::Learned learned =
      planner->Learn({taken.layer, taken.kv_head, state.get(), taken.query, taken.options, &audit},
                     budget_, scratch);
  trials_.fetch_add(static_cast<uint64_t>(learned.trials), std::memory_order_relaxed);
  plan_changes_.fetch_add(learned.changed ? 1 : 0, std::memory_order_relaxed);
  return true;
}

void RequestAudits::Count(const Taken& taken, const index::KeyIndex& index,
                          const index::KvView& view, const index::SearchAudit& audit,
                          index::Scratch& scratch) {
  index::SearchOptions options = taken.options;
  options.list_read = true;
  const index::SearchResult result = index.Search(view, taken.query, options, scratch);
  const index::AuditFigures figures = audit.Compare(result);
  for (size_t h = 0; h < figures.missed.size(); ++h) {
    const double missed = double{figures.missed[h]};
    error_.Count(double{figures.output_error[h]});
    recall_.Count(double{figures.recall[h]});
    missed_.Count(missed);
    if (missed >= kMissedMin) missed_ratio_.Count(double{result.report.missed_mass[h]} / missed);
  }
  heads_.fetch_add(figures.missed.size(), std::memory_order_relaxed);
  bytes_.fetch_add(static_cast<uint64_t>(result.report.bytes_touched), std::memory_order_relaxed);
  exact_bytes_.fetch_add(static_cast<uint64_t>(audit.exact_bytes()), std::memory_order_relaxed);
}

std::map<std::string, uint64_t> RequestAudits::Values() const {
  std::map<std::string, uint64_t> values;
  if (share_ <= 0.0) return values;
  values["audits"] = audits_.load(std::memory_order_relaxed);
  values["audits_dropped"] = dropped_.load(std::memory_order_relaxed);
  values["audit_heads"] = heads_.load(std::memory_order_relaxed);
  values["audit_bytes_touched"] = bytes_.load(std::memory_order_relaxed);
  values["audit_trials"] = trials_.load(std::memory_order_relaxed);
  values["audit_plan_changes"] = plan_changes_.load(std::memory_order_relaxed);
  values["audit_bytes_exact"] = exact_bytes_.load(std::memory_order_relaxed);
  error_.AddTo("audit_error", values);
  recall_.AddTo("audit_recall", values);
  missed_.AddTo("audit_missed", values);
  missed_ratio_.AddTo("audit_missed_ratio", values);
  return values;
}

}  // namespace kvseek::service
