#include "cli/bench.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "cli/daemon_search.h"
#include "cli/synthetic.h"
#include "cli/table.h"
#include "index/segment.h"

namespace kvseek::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kDistinctSteps = 16;  // queries that requests choose from
// As a decoder's: half of what fp32 would be travels.
constexpr DType kQueryDType = DType::kBf16;
constexpr DType kStateDType = DType::kFp16;
constexpr uint32_t kSampledEvery = 32;  // tokens whose queries go along, one in so many
constexpr uint64_t kUncoveredMax = 4096 + index::kSegmentTokens;  // that a daemon leaves, at least

Clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

class Bench {
 public:
  Bench(const std::vector<std::unique_ptr<KvClient>>& clients, const BenchOptions& options,
        Progress& progress)
      : clients_(clients),
        options_(options),
        progress_(progress),
        model_(options.shape, options.seed),
        search_(options.search) {}
  ~Bench() {
    for (size_t i = 0; i < sessions_.size(); ++i) Client(i).Close(sessions_[i]).IgnoreError();
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  absl::StatusOr<BenchResult> Run() {
    if (absl::Status status = FillAll(); !status.ok()) return status;
    for (uint32_t layer = 0; layer < options_.shape.layers; ++layer) {
      for (uint64_t step = 0; step < kDistinctSteps; ++step) {
        AppendQueries(layer, step, queries_.emplace_back());
      }
    }
    if (!options_.build.empty()) {
      if (absl::Status status = MeasureBuilding(); !status.ok()) return status;
    }
    const absl::StatusOr<Counters> before = ReadCounters();
    if (!before.ok()) return before.status();
    Send(options_.duration_s, options_.rate);
    const absl::StatusOr<Counters> after = ReadCounters();
    if (!after.ok()) return after.status();
    result_.seconds =
        std::max(options_.duration_s, std::chrono::duration<double>(last_ - counted_from_).count());
    for (size_t p = 0; p < index::kSearchPhases; ++p) {
      const auto phase = static_cast<index::SearchPhase>(p);
      const std::string name = absl::StrCat("search_us_", index::NameOf(phase));
      result_.phase_micros[p] = static_cast<double>(Get(*after, name) - Get(*before, name));
    }
    MeasureExact();
    return std::move(result_);
  }

 private:
  using Counters = std::map<std::string, uint64_t>;

  absl::StatusOr<Counters> ReadCounters() const {
    absl::StatusOr<DaemonStats> stats = clients_[0]->Stats(/*with_sessions=*/false);
    if (!stats.ok()) return stats.status();
    return Counters(stats->counters.begin(), stats->counters.end());
  }
  static uint64_t Get(const Counters& counters, const std::string& name) {
    const auto found = counters.find(name);
    return found == counters.end() ? 0 : found->second;
  }

  void MeasureExact() {
    if (options_.exact_s <= 0.0 || options_.topk || search_.index == IndexKind::kExact) return;
    BenchResult measured = std::exchange(result_, {});
    search_.index = IndexKind::kExact;
    Send(options_.exact_s, /*rate=*/0.0);
    measured.exact_daemon_micros = std::move(result_.daemon_micros);
    result_ = std::move(measured);
  }

  /// Requests while the daemon builds; returns when it has built all.
  absl::Status MeasureBuilding() {
    const Clock::time_point begun = Clock::now();
    const absl::StatusOr<Counters> before = ReadCounters();
    if (!before.ok()) return before.status();
    Send(options_.duration_s, options_.rate);
    const absl::StatusOr<Counters> after = ReadCounters();
    if (!after.ok()) return after.status();
    const double fill_seconds = result_.fill_seconds;
    BenchResult building = std::exchange(result_, {});
    result_.fill_seconds = fill_seconds;
    result_.micros_building = std::move(building.micros);
    result_.errors = std::move(building.errors);
    result_.built_meanwhile = Get(*after, "indexes_built") - Get(*before, "indexes_built");
    absl::Status status = WaitUntilBuilt();
    result_.build_seconds = std::chrono::duration<double>(Clock::now() - begun).count();
    return status;
  }

  absl::Status WaitUntilBuilt() {
    progress_.Begin("building indexes", 0);
    for (bool idle = false;;) {
      const absl::StatusOr<DaemonStats> stats = clients_[0]->Stats(/*with_sessions=*/true);
      if (!stats.ok()) return stats.status();
      bool all = true;
      for (const SessionStats& session : stats->sessions) {
        for (const BuiltIndexStats& built : session.built) {
          // Product codes take in every segment; others leave some keys uncovered.
          const auto sealed = index::SealedTokens(static_cast<int64_t>(options_.tokens));
          all = all && (built.index == IndexKind::kProduct
                            ? built.tokens_covered >= static_cast<uint64_t>(sealed)
                            : built.tokens_covered + kUncoveredMax > options_.tokens);
        }
      }
      if (all) break;
      // Twice, since the last may have been published after its session was described.
      const auto queued = stats->counters.find("index_layers_queued");  // older daemons have none
      if (queued == stats->counters.end() || queued->second > 0) {
        idle = false;
      } else if (std::exchange(idle, true)) {
        return absl::FailedPreconditionError(absl::StrCat(
            "the daemon does not build all indexes of ", options_.tokens,
            " tokens: these are too few, it has no threads for it (--build-threads) or no memory (",
            Get(stats->counters, "indexes_refused"), " indexes refused)"));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    progress_.End("");
    return absl::OkStatus();
  }

  /// In the session's dtype.
  void AppendQueries(uint32_t layer, uint64_t step, std::vector<uint16_t>& to) const {
    for (const float element : model_.Queries(layer, step)) {
      to.push_back(kernels::FloatToBf16(element));
    }
  }

  /// Some queries of [at, at + tokens) of a layer.
  void SampleQueries(uint32_t layer, uint32_t at, uint32_t tokens) {
    sample_positions_.clear();
    sample_rows_.clear();
    for (uint32_t t = 0; t < tokens && !options_.build.empty(); t += kSampledEvery) {
      sample_positions_.push_back(at + t);
      AppendQueries(layer, kDistinctSteps + at + t, sample_rows_);
    }
  }

  KvClient& Client(size_t session) const { return *clients_[session % clients_.size()]; }

  absl::Status FillAll() {
    const ModelShape& shape = options_.shape;
    const uint32_t blocks = (options_.tokens + kAppendTokens - 1) / kAppendTokens;
    progress_.Begin("filling sessions", int64_t{options_.sessions} * shape.layers * blocks);
    const Clock::time_point begin = Clock::now();
    std::vector<uint16_t> keys;
    std::vector<uint16_t> values;
    for (uint32_t i = 0; i < options_.sessions; ++i) {
      const absl::StatusOr<Session> session =
          Client(i).Open(shape, {.lease = std::chrono::minutes(30),
                                 .scan_bits = options_.scan_bits,
                                 .tokens_expected = options_.tokens,
                                 .name = absl::StrCat("kvseek bench ", i),
                                 .build = options_.build});
      if (!session.ok()) return session.status();
      sessions_.push_back(*session);
      for (uint32_t layer = 0; layer < shape.layers; ++layer) {
        for (uint32_t at = 0; at < options_.tokens; at += kAppendTokens) {
          const uint32_t tokens = std::min(kAppendTokens, options_.tokens - at);
          model_.Fill(i, layer, at, tokens, keys, values);
          SampleQueries(layer, at, tokens);
          const absl::StatusOr<uint64_t> held = Client(i).Append(
              *session, layer, at, tokens, keys, values, {}, {sample_positions_, sample_rows_});
          if (!held.ok()) return held.status();
          progress_.Step();
        }
      }
    }
    result_.fill_seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    progress_.End(
        absl::StrCat(options_.sessions, " sessions in ", Digits(result_.fill_seconds), " s"));
    return absl::OkStatus();
  }

  /// Requests of the warm-up and of `duration_s`, at a rate or, if it is 0, one after the other;
  /// returns when all are answered.
  void Send(double duration_s, double rate) {
    progress_.Begin("sending requests", static_cast<int64_t>(options_.warmup_s + duration_s));
    const Clock::time_point begin = Clock::now();
    counted_from_ = begin + Seconds(options_.warmup_s);
    until_ = counted_from_ + Seconds(duration_s);
    {
      const std::lock_guard lock(mutex_);
      last_ = counted_from_;
    }
    if (rate > 0.0) {
      SendAtRate(begin, rate);
    } else {
      std::vector<std::thread> others;
      for (size_t c = 1; c < std::min(clients_.size(), sessions_.size()); ++c) {
        others.emplace_back([this, c] { SendOneByOne(c); });
      }
      SendOneByOne(0);
      for (std::thread& other : others) other.join();
    }
    std::unique_lock lock(mutex_);
    all_answered_.wait(lock, [this] { return waiting_ == 0; });
    progress_.End("");
  }

  /// As a decoder does: layer after layer, each when the last one is answered.
  void SendOneByOne(size_t client) {
    std::mt19937_64 random(options_.seed + client);
    std::uniform_int_distribution<size_t> pick_step(0, kDistinctSteps - 1);
    Clock::time_point next_tick = Clock::now() + std::chrono::seconds(1);
    const uint32_t layers = options_.shape.layers;
    const size_t own = (sessions_.size() - client + clients_.size() - 1) / clients_.size();
    std::atomic<bool> answered{false};
    for (size_t i = 0; Clock::now() < until_; ++i) {
      answered.store(false, std::memory_order_relaxed);
      SendOne(client + i / layers % own * clients_.size(), static_cast<uint32_t>(i % layers),
              pick_step(random), Clock::now(), &answered);
      while (options_.poll && !answered.load(std::memory_order_acquire)) clients_[client]->Poll();
      {
        std::unique_lock lock(mutex_);
        one_answered_.wait(lock, [&answered] { return answered.load(); });
      }
      if (client != 0) continue;
      for (; next_tick < Clock::now(); next_tick += std::chrono::seconds(1)) progress_.Step();
    }
  }

  /// At exponentially distributed distances, whatever comes back.
  void SendAtRate(Clock::time_point begin, double rate) {
    std::mt19937_64 random(options_.seed);
    std::exponential_distribution<double> distance(rate);
    std::uniform_int_distribution<size_t> pick_session(0, sessions_.size() - 1);
    std::uniform_int_distribution<size_t> pick_query(0, queries_.size() - 1);
    Clock::time_point next_tick = begin + std::chrono::seconds(1);
    Clock::time_point intended = begin + Seconds(distance(random));
    while (intended < until_) {
      std::this_thread::sleep_until(intended);
      const size_t session = pick_session(random);
      const size_t query = pick_query(random);
      SendOne(session, static_cast<uint32_t>(query / kDistinctSteps), query % kDistinctSteps,
              intended, /*answered=*/nullptr);
      intended += Seconds(distance(random));
      for (; next_tick < intended; next_tick += std::chrono::seconds(1)) progress_.Step();
    }
  }

  /// A layer of the session, or of all sessions of its connection, each with a step of its own.
  std::vector<QueryItem> Items(size_t session, uint32_t layer, size_t step) const {
    std::vector<QueryItem> items;
    const size_t first = options_.batch ? session % clients_.size() : session;
    const size_t last = options_.batch ? sessions_.size() : session + 1;
    for (size_t s = first; s < last; s += clients_.size()) {
      QueryItem& item = items.emplace_back();
      item.session = sessions_[s];
      item.layer = layer;
      const size_t query = layer * kDistinctSteps + (step + items.size() - 1) % kDistinctSteps;
      item.queries = AsBytes(absl::MakeConstSpan(queries_[query]));
    }
    return items;
  }

  /// Sets `answered`, if not null, when all is counted.
  void SendOne(size_t session, uint32_t layer, size_t step, Clock::time_point intended,
               std::atomic<bool>* answered) {
    const bool counted = intended >= counted_from_;
    {
      const std::lock_guard lock(mutex_);
      ++waiting_;
      ++result_.sent;
      if (counted) ++result_.offered;
    }
    const CallOptions call{.deadline = std::chrono::milliseconds(options_.deadline_ms)};
    const auto done = [this, intended, counted,
                       answered](const absl::StatusOr<SearchResponse>& response) {
      const Clock::time_point now = Clock::now();
      const std::lock_guard lock(mutex_);
      Count(intended, counted, now, response);
      if (answered == nullptr) return;
      answered->store(true, std::memory_order_release);
      one_answered_.notify_all();
    };
    if (options_.topk) {
      TopKRequest request;
      request.items = Items(session, layer, step);
      request.options = search_;
      request.k = options_.k;
      request.query_dtype = kQueryDType;
      request.state_dtype = kStateDType;
      Client(session).TopKAsync(request, call, done);
    } else {
      AttendRequest request;
      request.items = Items(session, layer, step);
      request.options = search_;
      request.query_dtype = kQueryDType;
      request.state_dtype = kStateDType;
      Client(session).AttendAsync(request, call, done);
    }
  }

  void Count(Clock::time_point intended, bool counted, Clock::time_point now,
             const absl::StatusOr<SearchResponse>& response) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (--waiting_ == 0) all_answered_.notify_all();
    if (!counted) return;
    last_ = std::max(last_, now);
    if (!response.ok()) {
      ++result_.errors[absl::StatusCodeToString(response.status().code())];
      return;
    }
    ++result_.answered;
    result_.sessions_answered += response->items.size();
    result_.micros.push_back(std::chrono::duration<double, std::micro>(now - intended).count());
    result_.daemon_micros.push_back(response->daemon_us);
    result_.bytes_sent += response->bytes_sent;
    result_.bytes_received += response->bytes_received;
    for (const ItemResult& item : response->items) {
      for (const Report& report : item.reports) {
        result_.keys_scanned += report.keys_scanned;
        result_.bytes_touched += report.bytes_touched;
      }
    }
  }

  const std::vector<std::unique_ptr<KvClient>>& clients_;
  const BenchOptions& options_;
  Progress& progress_;
  SyntheticModel model_;
  std::vector<Session> sessions_;
  std::vector<std::vector<uint16_t>> queries_;  // (layers * kDistinctSteps), bf16
  std::vector<uint64_t> sample_positions_;
  std::vector<uint16_t> sample_rows_;
  SearchOptions search_;
  Clock::time_point counted_from_;
  Clock::time_point until_;

  std::mutex mutex_;
  std::condition_variable all_answered_;
  std::condition_variable one_answered_;
  uint64_t waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  Clock::time_point last_ ABSL_GUARDED_BY(mutex_);
  BenchResult result_;  // while requests are under way, guarded by mutex_
};

}  // namespace

uint64_t BenchMemoryBytes(const BenchOptions& options) {
  const ModelShape& model = options.shape;
  const index::KvShape shape{.key_dim = static_cast<int>(model.key_dim),
                             .value_dim = static_cast<int>(model.value_dim),
                             .dtype = model.dtype,
                             .softmax_scale = 1.0F,
                             .scan_bits = static_cast<int>(options.scan_bits)};
  const uint64_t segments = (options.tokens + index::kSegmentTokens - 1) / index::kSegmentTokens;
  const uint64_t heads = uint64_t{options.sessions} * model.layers * model.kv_heads;
  // An index has some hundred bytes a key at most.
  return heads * segments *
         (index::Segment::Bytes(shape) +
          options.build.size() * size_t{256} * index::kSegmentTokens);
}

absl::StatusOr<BenchResult> RunBench(const std::vector<std::unique_ptr<KvClient>>& clients,
                                     const BenchOptions& options, Progress& progress) {
  return Bench(clients, options, progress).Run();
}

}  // namespace kvseek::cli
