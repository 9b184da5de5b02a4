#include "service/request_counters.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace kvseek::service {

void RequestCounters::CountRequest(proto::Op op, uint64_t payload_bytes) {
  Add(requests_[proto::IsKnownOp(static_cast<uint8_t>(op)) ? static_cast<uint8_t>(op) : 0], 1);
  Add(bytes_in_, payload_bytes);
}

void RequestCounters::CountError(absl::StatusCode code) {
  const auto number = static_cast<size_t>(code);
  const auto unknown = static_cast<size_t>(absl::StatusCode::kUnknown);
  Add(errors_[number < errors_.size() ? number : unknown], 1);
}

void RequestCounters::CountSearches(absl::Span<const index::SearchResult> results) {
  index::SearchReport sum;
  uint64_t reused = 0;
  uint64_t distrusted = 0;
  for (const index::SearchResult& result : results) {
    sum.keys_scanned += result.report.keys_scanned;
    sum.keys_fine += result.report.keys_fine;
    sum.keys_exact += result.report.keys_exact;
    sum.bytes_touched += result.report.bytes_touched;
    reused += result.report.reused ? 1 : 0;
    distrusted += result.report.trusted ? 0 : 1;
  }
  Add(searches_, results.size());
  Add(searches_reused_, reused);
  Add(searches_distrusted_, distrusted);
  Add(keys_scanned_, static_cast<uint64_t>(sum.keys_scanned));
  Add(keys_fine_, static_cast<uint64_t>(sum.keys_fine));
  Add(keys_exact_, static_cast<uint64_t>(sum.keys_exact));
  Add(bytes_touched_, static_cast<uint64_t>(sum.bytes_touched));
}

std::map<std::string, uint64_t> RequestCounters::Values() const {
  std::map<std::string, uint64_t> values;
  const auto set = [&values](std::string name, const Counter& counter) {
    const uint64_t value = counter.load(std::memory_order_relaxed);
    if (value != 0) values[std::move(name)] = value;
  };
  for (size_t op = 0; op < requests_.size(); ++op) {
    set(absl::StrCat("requests_", proto::OpName(static_cast<proto::Op>(op))), requests_[op]);
  }
  for (size_t code = 0; code < errors_.size(); ++code) {
    const std::string name = absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
    set(absl::StrCat("errors_", absl::AsciiStrToLower(name)), errors_[code]);
  }
  set("bytes_in", bytes_in_);
  set("bytes_out", bytes_out_);
  set("tokens_appended", tokens_appended_);
  set("queries_sampled", queries_sampled_);
  set("searches", searches_);
  set("searches_reused", searches_reused_);
  set("searches_distrusted", searches_distrusted_);
  set("keys_scanned", keys_scanned_);
  set("keys_fine", keys_fine_);
  set("keys_exact", keys_exact_);
  set("bytes_touched", bytes_touched_);
  return values;
}

}  // namespace kvseek::service
