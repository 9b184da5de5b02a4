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

// An audit holds a score for each query head and key: 128 MiB.
constexpr int64_t kScoresMax = int64_t{1} << 25;
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

RequestAudits::RequestAudits(const DaemonOptions& options)
    : share_(options.audit_share),
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
  if (share_ <= 0.0 || search.topk()) return;
  constexpr uint64_t kGrain = uint64_t{1} << 32;
  if (static_cast<double>(Draw(kGrain)) >= share_ * static_cast<double>(kGrain)) return;
  const std::vector<SearchTask> tasks = MakeTasks(search);
  if (tasks.empty()) return;
  const size_t chosen = Draw(tasks.size());
  const SearchTask& task = tasks[chosen];
  if (task.index == &index::ExactIndex()) return;
  size_t results = 0;
  size_t item = 0;
  while (results + search.items[item].Results() <= chosen)
    results += search.items[item++].Results();
  const int64_t scores = (task.query.end - task.query.begin) * task.query.group;
  auto taken = std::make_unique<Taken>();
  taken->layer = search.items[item].layer;
  taken->task = task;
  taken->queries.assign(
      task.query.queries,
      task.query.queries + static_cast<ptrdiff_t>(task.query.group) * task.view.shape.key_dim);
  taken->task.query.queries = taken->queries.data();
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
  index::Scratch scratch;
  std::unique_lock lock(mutex_);
  while (true) {
    while (!stop_ && queue_.empty()) wake_.wait(lock);
    if (stop_) return;
    const std::unique_ptr<const Taken> taken = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    try {
      Audit(*taken, scratch);
    } catch (...) {  // no memory
      dropped_.fetch_add(1, std::memory_order_relaxed);
    }
    lock.lock();
  }
}

void RequestAudits::Audit(const Taken& taken, index::Scratch& scratch) {
  const SearchTask& task = taken.task;
  const index::SearchAudit audit(task.view, task.query, scratch);
  index::SearchOptions options = task.options;
  options.list_read = true;
  const index::SearchResult result = task.index->Search(task.view, task.query, options, scratch);
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
  audits_.fetch_add(1, std::memory_order_relaxed);
}

std::map<std::string, uint64_t> RequestAudits::Values() const {
  std::map<std::string, uint64_t> values;
  if (share_ <= 0.0) return values;
  values["audits"] = audits_.load(std::memory_order_relaxed);
  values["audits_dropped"] = dropped_.load(std::memory_order_relaxed);
  values["audit_heads"] = heads_.load(std::memory_order_relaxed);
  values["audit_bytes_touched"] = bytes_.load(std::memory_order_relaxed);
  values["audit_bytes_exact"] = exact_bytes_.load(std::memory_order_relaxed);
  error_.AddTo("audit_error", values);
  recall_.AddTo("audit_recall", values);
  missed_.AddTo("audit_missed", values);
  missed_ratio_.AddTo("audit_missed_ratio", values);
  return values;
}

}  // namespace kvseek::service
