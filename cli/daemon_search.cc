#include "cli/daemon_search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace kvseek::cli {
namespace {

constexpr std::chrono::seconds kBuildTimeout{120};

index::SearchResult ToSearchResult(ItemResult item) {
  index::SearchResult result;
  result.out.assign(item.out.begin(), item.out.end());
  result.lse.assign(item.lse.begin(), item.lse.end());
  if (!item.selections.empty()) {
    const absl::Span<const int64_t> positions = item.selections[0].positions;
    result.positions.assign(positions.begin(), positions.end());
  }
  if (!item.reports.empty()) {
    Report& report = item.reports[0];
    result.report.keys_scanned = static_cast<int64_t>(report.keys_scanned);
    result.report.keys_fine = static_cast<int64_t>(report.keys_fine);
    result.report.keys_exact = static_cast<int64_t>(report.keys_exact);
    result.report.bytes_touched = static_cast<int64_t>(report.bytes_touched);
    result.report.reused = report.reused;
    result.report.missed_mass = std::move(report.missed_mass);
    result.report.missed_low = std::move(report.missed_low);
    result.report.missed_high = std::move(report.missed_high);
  }
  return result;
}

/// Some of the trace's prefill queries, in its dtype.
struct Sample {
  std::vector<uint64_t> positions;
  std::vector<uint16_t> rows;
};

/// Those of tokens [begin, end).
Sample TakeSample(const HeadTrace& trace, int64_t begin, int64_t end) {
  Sample sample;
  const auto elements = static_cast<size_t>(trace.group) * static_cast<size_t>(trace.key_dim);
  for (size_t i = 0; i < trace.prefill_positions.size(); ++i) {
    const int64_t position = trace.prefill_positions[i];
    if (position < begin || position >= end) continue;
    sample.positions.push_back(static_cast<uint64_t>(position));
    for (size_t e = 0; e < elements; ++e) {
      const float element = trace.prefill_queries[i * elements + e];
      sample.rows.push_back(trace.dtype == kernels::DType::kBf16 ? kernels::FloatToBf16(element)
                                                                 : kernels::FloatToFp16(element));
    }
  }
  return sample;
}

LandmarkOptions LandmarkOf(const BuildSettings& settings) {
  LandmarkOptions options;
  options.block = static_cast<uint32_t>(settings.block);
  if (settings.summary == "mean") options.summary = LandmarkSummary::kMean;
  if (settings.summary == "given") options.summary = LandmarkSummary::kGiven;
  return options;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DaemonHead>> DaemonHead::Open(KvClient& client,
                                                             const HeadTrace& trace, int scan_bits,
                                                             IndexKind build,
                                                             const BuildSettings& settings) {
  std::unique_ptr<DaemonHead> head(new DaemonHead(client, trace));
  ModelShape shape;
  shape.query_heads = static_cast<uint32_t>(trace.group);
  shape.key_dim = static_cast<uint32_t>(trace.key_dim);
  shape.value_dim = static_cast<uint32_t>(trace.value_dim);
  shape.dtype = trace.dtype;
  shape.softmax_scale = trace.softmax_scale;
  OpenOptions options;
  options.scan_bits = static_cast<uint32_t>(scan_bits);
  options.tokens_expected = static_cast<uint64_t>(trace.tokens);
  options.name = "kvseek eval " + trace.name;
  const bool builds = build >= IndexKind::kLandmark;
  if (builds) options.build = {build};
  if (build == IndexKind::kLandmark) options.landmark = LandmarkOf(settings);
  const bool given = build == IndexKind::kLandmark && settings.summary == "given";
  absl::StatusOr<Session> session = client.Open(shape, options);
  if (!session.ok()) return session.status();
  head->session_ = *std::move(session);
  head->open_ = true;
  for (int64_t at = 0; at < trace.tokens; at += kAppendTokens) {
    const int64_t tokens = std::min<int64_t>(kAppendTokens, trace.tokens - at);
    const Sample sample = builds ? TakeSample(trace, at, at + tokens) : Sample{};
    // An append holds whole blocks, but for the last.
    const TraceLandmarks landmarks =
        given ? MakeLandmarks(trace, settings.block, at, at + tokens) : TraceLandmarks{};
    const absl::StatusOr<uint64_t> held = client.Append(
        head->session_, /*layer=*/0, static_cast<uint64_t>(at), static_cast<uint32_t>(tokens),
        absl::MakeConstSpan(trace.keys.data() + at * trace.key_dim,
                            static_cast<size_t>(tokens * trace.key_dim)),
        absl::MakeConstSpan(trace.values.data() + at * trace.value_dim,
                            static_cast<size_t>(tokens * trace.value_dim)),
        {}, {sample.positions, sample.rows}, {landmarks.positions, landmarks.rows});
    if (!held.ok()) return held.status();
  }
  if (builds) {
    absl::Status built = head->WaitUntilBuilt();
    if (!built.ok()) return built;
  }
  return head;
}

/// The daemon builds while tokens come, and builds anew when what it has not covered is a share of
/// what it has (docs/operations.md): waits for the last of these builds.
absl::Status DaemonHead::WaitUntilBuilt() {
  const auto late = std::chrono::steady_clock::now() + kBuildTimeout;
  while (std::chrono::steady_clock::now() < late) {
    const absl::StatusOr<DaemonStats> stats = client_.Stats(/*with_sessions=*/true);
    if (!stats.ok()) return stats.status();
    for (const SessionStats& session : stats->sessions) {
      if (session.session.session_id != session_.session_id) continue;
      const uint64_t covered = session.built.empty() ? 0 : session.built[0].tokens_covered;
      const uint64_t left = static_cast<uint64_t>(trace_.tokens) - covered;
      if (covered > 0 && left < std::max<uint64_t>(4096, covered / 8) + 1024) {
        return absl::OkStatus();
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return absl::DeadlineExceededError("the daemon did not build the index in time");
}

DaemonHead::~DaemonHead() {
  // A session that cannot be closed now is closed by its lease.
  if (open_) client_.Close(session_).IgnoreError();
}

SearchFunction DaemonHead::Search(IndexKind index, int reuse_steps, int reuse_keep) {
  auto last_step = std::make_shared<int>(-1);
  return [this, index, reuse_steps, reuse_keep, last_step](
             int step, const index::SearchOptions& options) -> absl::StatusOr<index::SearchResult> {
    const bool follows = step == std::exchange(*last_step, step) + 1 && step > 0;
    AttendRequest request;
    request.options.index = index;
    request.options.candidates = static_cast<uint32_t>(options.candidates);
    request.options.exact_rows = static_cast<uint32_t>(options.exact_rows);
    request.options.audit_samples = static_cast<uint32_t>(options.audit_samples);
    request.options.seed = options.seed;
    request.options.list_read = options.list_read;
    request.options.leave_rest_out = !options.estimate_rest;
    request.options.exact_top = static_cast<uint32_t>(options.exact_top);
    request.options.beta = options.beta;
    request.options.mass = options.mass;
    if (options.threshold < 0.0F) request.options.threshold = options.threshold;
    request.options.vote = options.vote == index::Vote::kMax ? Vote::kMax : Vote::kSum;
    request.options.reuse_steps =
        static_cast<uint32_t>(follows ? reuse_steps : std::min(reuse_steps, 1));
    request.options.reuse_keep = static_cast<uint32_t>(reuse_keep);
    if (options.stop_at != std::chrono::steady_clock::time_point::max()) {
      request.options.search_time = std::max(
          std::chrono::microseconds(1), std::chrono::duration_cast<std::chrono::microseconds>(
                                            options.stop_at - std::chrono::steady_clock::now()));
    }
    QueryItem item;
    item.session = session_;
    item.queries = AsBytes(absl::MakeConstSpan(
        trace_.StepQueries(step), trace_.queries.size() / static_cast<size_t>(trace_.steps)));
    request.items.push_back(std::move(item));
    absl::StatusOr<SearchResponse> response = client_.Attend(request);
    if (!response.ok()) return response.status();
    if (response->items.size() != 1) return absl::InternalError("the daemon answered no item");
    return ToSearchResult(std::move(response->items[0]));
  };
}

}  // namespace kvseek::cli
