#include "cli/daemon_search.h"

#include <algorithm>
#include <utility>

#include "absl/types/span.h"

namespace kvseek::cli {
namespace {

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
    result.report.missed_mass = std::move(report.missed_mass);
    result.report.missed_low = std::move(report.missed_low);
    result.report.missed_high = std::move(report.missed_high);
  }
  return result;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DaemonHead>> DaemonHead::Open(KvClient& client,
                                                             const HeadTrace& trace,
                                                             int scan_bits) {
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
  absl::StatusOr<Session> session = client.Open(shape, options);
  if (!session.ok()) return session.status();
  head->session_ = *std::move(session);
  head->open_ = true;
  for (int64_t at = 0; at < trace.tokens; at += kAppendTokens) {
    const int64_t tokens = std::min<int64_t>(kAppendTokens, trace.tokens - at);
    const absl::StatusOr<uint64_t> held = client.Append(
        head->session_, /*layer=*/0, static_cast<uint64_t>(at), static_cast<uint32_t>(tokens),
        absl::MakeConstSpan(trace.keys.data() + at * trace.key_dim,
                            static_cast<size_t>(tokens * trace.key_dim)),
        absl::MakeConstSpan(trace.values.data() + at * trace.value_dim,
                            static_cast<size_t>(tokens * trace.value_dim)));
    if (!held.ok()) return held.status();
  }
  return head;
}

DaemonHead::~DaemonHead() {
  // A session that cannot be closed now is closed by its lease.
  if (open_) client_.Close(session_).IgnoreError();
}

SearchFunction DaemonHead::Search(IndexKind index) {
  return [this, index](int step,
                       const index::SearchOptions& options) -> absl::StatusOr<index::SearchResult> {
    AttendRequest request;
    request.options.index = index;
    request.options.candidates = static_cast<uint32_t>(options.candidates);
    request.options.exact_rows = static_cast<uint32_t>(options.exact_rows);
    request.options.audit_samples = static_cast<uint32_t>(options.audit_samples);
    request.options.seed = options.seed;
    request.options.list_read = options.list_read;
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
