#include "service/index_builder.h"

#include <pthread.h>
#include <sched.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <exception>
#include <utility>

#include "index/product_index.h"

namespace kvseek::service {
namespace {

using index::BuiltIndex;
using index::BuiltKind;

// An index is built anew when it leaves so many keys uncovered, or this share of those it covers.
constexpr int64_t kUncoveredMin = 4096;
constexpr int64_t kUncoveredShare = 8;
// Queries from traffic that are worth a build: what a client sends is all there will be.
constexpr size_t kTrafficQueriesMin = 64;

uint64_t ThreadMicros() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

/// There are queries to learn from.
size_t Queries(const LayerState& state) {
  return state.queries == nullptr ? 0 : state.queries->positions().size();
}

bool CanLearn(const LayerState& state) {
  return Queries(state) >= (state.queries_sent ? 1 : kTrafficQueriesMin);
}

/// An index and the memory that it takes.
struct AccountedIndex {
  std::shared_ptr<const BuiltIndex> index;
  MemoryBudget::Reservation memory;
};

}  // namespace

IndexBuilder::IndexBuilder(const DaemonOptions& options, MemoryBudget& budget)
    : from_tokens_(static_cast<int64_t>(options.build_from_tokens)), budget_(budget) {
  for (int i = 0; i < options.build_threads; ++i) {
    threads_.emplace_back([this] { Work(); });
  }
}

IndexBuilder::~IndexBuilder() {
  {
    const std::lock_guard lock(mutex_);
    stopping_.store(true);
  }
  job_waits_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool IndexBuilder::IsDue(const SessionSettings& settings, const LayerState& state, size_t head,
                         BuiltKind kind) const {
  if (!settings.Builds(kind)) return false;
  if (kind == BuiltKind::kGraph && !CanLearn(state)) return false;
  if (kind == BuiltKind::kProduct &&
      (!CanLearn(state) || Queries(state) < index::kProductQueriesMin)) {
    return false;
  }
  const int64_t sealed = state.View(head).SealedTokens();
  const BuiltIndex* const built = state.Built(head, kind);
  const int64_t covered = built == nullptr ? 0 : built->covered();
  if (covered == 0) return sealed >= from_tokens_ && sealed > 0;
  if (settings.Learns(kind) && !state.Learned(head, kind) && CanLearn(state)) return true;
  if (kind == BuiltKind::kLandmark &&
      state.Landmarks(covered) != state.indexes->landmarks_built[head]) {
    return true;  // some came late
  }
  if (kind == BuiltKind::kProduct) return sealed > covered;  // it encodes what is new, no more
  return sealed - covered >= std::max(kUncoveredMin, covered / kUncoveredShare);
}

bool IndexBuilder::IsDue(const SessionSettings& settings, const LayerState& state) const {
  for (size_t head = 0; head < state.kv_heads(); ++head) {
    for (int kind = 0; kind < index::kBuiltKinds; ++kind) {
      if (IsDue(settings, state, head, static_cast<BuiltKind>(kind))) return true;
    }
  }
  return false;
}

void IndexBuilder::Consider(const std::shared_ptr<Session>& session, uint32_t layer) {
  const SessionSettings& settings = session->settings();
  if (threads_.empty() || settings.build == 0) return;
  if (!IsDue(settings, *session->State(layer)) || session->TakeBuildPlace(layer)) return;
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back({session, layer});
    layers_.fetch_add(1, std::memory_order_relaxed);
  }
  job_waits_.notify_one();
}

void IndexBuilder::Work() {
  pthread_setname_np(pthread_self(), "kvseek-build");
  const sched_param none{};
  pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
  for (;;) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      while (jobs_.empty() && !stopping_.load()) job_waits_.wait(lock);
      if (stopping_.load()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    const uint64_t begun = ThreadMicros();
    BuildQueued(job);
    core_us_.fetch_add(ThreadMicros() - begun, std::memory_order_relaxed);
    layers_.fetch_sub(1, std::memory_order_relaxed);
  }
}

void IndexBuilder::BuildQueued(const Job& job) {
  SessionSettings settings;
  std::shared_ptr<const QuerySample> queries;
  std::shared_ptr<const LandmarkKeys> landmarks;
  int64_t tokens = 0;
  {
    const std::shared_ptr<Session> session = job.session.lock();
    if (session == nullptr) return;
    settings = session->settings();
    const std::shared_ptr<const LayerState> state = session->State(job.layer);
    tokens = state->tokens;
    queries = state->queries;
    landmarks = state->landmarks;
  }
  BuildLayer(job, settings);
  const std::shared_ptr<Session> session = job.session.lock();
  if (session == nullptr) return;
  session->GiveBuildPlaceBack(job.layer);
  // What came meanwhile found the place taken. Without any, what was refused is not tried again.
  const std::shared_ptr<const LayerState> state = session->State(job.layer);
  if (state->tokens != tokens || state->queries != queries || state->landmarks != landmarks) {
    Consider(session, job.layer);
  }
}

void IndexBuilder::BuildLayer(const Job& job, const SessionSettings& settings) {
  for (size_t head = 0; head < settings.kv_heads; ++head) {
    for (int kind = 0; kind < index::kBuiltKinds; ++kind) {
      try {
        if (!BuildHead(job, settings, head, static_cast<BuiltKind>(kind))) return;
      } catch (const std::exception& error) {
        spdlog::warn("an index was not built: {}", error.what());
        refused_.fetch_add(1, std::memory_order_relaxed);
      }
    }
  }
}

bool IndexBuilder::BuildHead(const Job& job, const SessionSettings& settings, size_t head,
                             BuiltKind kind) {
  std::shared_ptr<const LayerState> state;
  {
    const std::shared_ptr<Session> session = job.session.lock();
    if (session == nullptr) return false;
    state = session->State(job.layer);
  }
  if (!IsDue(settings, *state, head, kind)) return true;
  const auto group = static_cast<size_t>(settings.Group());
  std::vector<float> queries;
  index::BuildInput input;
  input.view = state->View(head);
  input.group = settings.Group();
  if (state->queries != nullptr) {
    queries = state->queries->OfHead(head, group, static_cast<size_t>(settings.kv.key_dim),
                                     settings.kv.dtype);
    input.query_positions = state->queries->positions();
  }
  input.queries = queries;
  std::vector<float> landmarks;
  std::vector<int64_t> landmark_positions;
  if (state->landmarks != nullptr && kind == BuiltKind::kLandmark) {
    landmark_positions = state->landmarks->Positions();
    landmarks =
        state->landmarks->OfHead(head, static_cast<size_t>(settings.kv.key_dim), settings.kv.dtype);
  }
  input.landmark_positions = landmark_positions;
  input.landmarks = landmarks;
  // Parts of one that has learned nothing would not learn now.
  if (!settings.Learns(kind) || queries.empty() || state->Learned(head, kind)) {
    input.previous = state->indexes->built[head][static_cast<size_t>(kind)];
  }
  input.give_up = [this, &job] {
    return stopping_.load(std::memory_order_relaxed) || job.session.expired();
  };
  std::shared_ptr<const BuiltIndex> built = index::BuildIndex(kind, input, settings.landmark);
  if (built == nullptr) return !input.give_up();

  absl::StatusOr<MemoryBudget::Reservation> memory = budget_.Reserve(built->Bytes(), "build");
  const std::shared_ptr<Session> session = job.session.lock();
  if (session == nullptr) return false;
  if (!memory.ok()) {
    spdlog::warn("an index of {} bytes was not kept: {}", built->Bytes(),
                 memory.status().ToString());
    refused_.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  const auto accounted =
      std::make_shared<const AccountedIndex>(AccountedIndex{std::move(built), *std::move(memory)});
  const bool published = session->Publish(
      job.layer, head, kind, std::shared_ptr<const BuiltIndex>(accounted, accounted->index.get()),
      *state);
  (published ? built_ : outdated_).fetch_add(1, std::memory_order_relaxed);
  return true;
}

}  // namespace kvseek::service
