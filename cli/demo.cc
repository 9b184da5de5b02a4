#include "cli/demo.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cli/daemon_search.h"
#include "cli/evaluation.h"
#include "cli/percentile.h"
#include "cli/reference.h"
#include "cli/table.h"
#include "cli/trace.h"
#include "kernels/attention_state.h"
#include "kernels/cpu/attention.h"

namespace kvseek::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kBudgets[] = {128, 256, 512, 1024, 2048, 4096};
constexpr const char* kHeads[] = {"layer15.kv1", "layer20.kv0"};

double Micros(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

/// Attention of one step as a decoder gets it, and what it cost.
struct StepAnswer {
  std::vector<float> out;  ///< (query_heads, value_dim)
  double keys_scanned = 0.0;
  double keys_fine = 0.0;
  double keys_exact = 0.0;
  double bytes_read = 0.0;
  double bytes_wire = 0.0;
};

using AnswerStep = std::function<absl::StatusOr<StepAnswer>(int step)>;

void AddCosts(const SearchResponse& response, StepAnswer& answer) {
  for (const Report& report : response.items[0].reports) {
    answer.keys_scanned += static_cast<double>(report.keys_scanned);
    answer.keys_fine += static_cast<double>(report.keys_fine);
    answer.keys_exact += static_cast<double>(report.keys_exact);
    answer.bytes_read += static_cast<double>(report.bytes_touched);
  }
  answer.bytes_wire = static_cast<double>(response.bytes_sent + response.bytes_received);
}

/// The two heads as one layer: (tokens, kv_heads, dim) and (steps, query_heads, dim).
class Demo {
 public:
  Demo(KvClient& client, const DemoOptions& options, Progress& progress)
      : client_(client), options_(options), progress_(progress) {}
  ~Demo() {
    if (open_) client_.Close(session_).IgnoreError();
  }
  Demo(const Demo&) = delete;
  Demo& operator=(const Demo&) = delete;

  absl::StatusOr<DemoResult> Run() {
    absl::Status status = Load();
    if (status.ok()) status = Prefill();
    if (status.ok()) status = Compare();
    if (status.ok()) status = Sweep();
    if (!status.ok()) return status;
    return std::move(result_);
  }

 private:
  absl::Status Load() {
    progress_.Begin("reading the traces and computing full attention in double precision", 4);
    ReferenceOptions reference;
    reference.oracle_ks.assign(std::begin(kBudgets), std::end(kBudgets));
    for (const char* head : kHeads) {
      absl::StatusOr<HeadTrace> trace =
          LoadHeadTrace(absl::StrCat(options_.data, "/code8.", head, ".safetensors"),
                        absl::StrCat(options_.data, "/code8.queries.safetensors"), head);
      if (!trace.ok()) return trace.status();
      progress_.Step();
      traces_.push_back(*std::move(trace));
      steps_ = SpreadSteps(traces_[0].steps, options_.steps);
      references_.push_back(ComputeReference(traces_.back(), steps_, reference));
      progress_.Step();
    }
    const HeadTrace& a = traces_[0];
    const HeadTrace& b = traces_[1];
    if (a.tokens != b.tokens || a.steps != b.steps || a.group != b.group ||
        a.key_dim != b.key_dim || a.value_dim != b.value_dim || a.dtype != b.dtype) {
      return absl::InvalidArgumentError("the two heads do not have the same shape");
    }
    result_.tokens = a.tokens;
    result_.steps = static_cast<int>(steps_.size());
    shape_.kv_heads = 2;
    shape_.query_heads = static_cast<uint32_t>(2 * a.group);
    shape_.key_dim = static_cast<uint32_t>(a.key_dim);
    shape_.value_dim = static_cast<uint32_t>(a.value_dim);
    shape_.dtype = a.dtype;
    shape_.softmax_scale = a.softmax_scale;
    return absl::OkStatus();
  }

  /// Rows [at, at + count) of both heads, interleaved.
  std::vector<uint16_t> Interleave(std::vector<uint16_t> HeadTrace::*rows, int dim, int64_t at,
                                   int64_t count) const {
    std::vector<uint16_t> both;
    both.reserve(static_cast<size_t>(2 * count * dim));
    for (int64_t t = at; t < at + count; ++t) {
      for (const HeadTrace& trace : traces_) {
        const auto row = (trace.*rows).begin() + t * dim;
        both.insert(both.end(), row, row + dim);
      }
    }
    return both;
  }

  absl::Status Prefill() {
    const HeadTrace& trace = traces_[0];
    absl::StatusOr<Session> session =
        client_.Open(shape_, {.lease = {},
                              .tokens_expected = static_cast<uint64_t>(trace.tokens),
                              .name = "kvseek demo"});
    if (!session.ok()) return session.status();
    session_ = *std::move(session);
    open_ = true;
    progress_.Begin("appending keys and values, block by block",
                    (trace.tokens + kAppendTokens - 1) / kAppendTokens);
    double micros = 0.0;
    for (int64_t at = 0; at < trace.tokens; at += kAppendTokens) {
      const int64_t count = std::min<int64_t>(kAppendTokens, trace.tokens - at);
      const std::vector<uint16_t> keys = Interleave(&HeadTrace::keys, trace.key_dim, at, count);
      const std::vector<uint16_t> values =
          Interleave(&HeadTrace::values, trace.value_dim, at, count);
      const Clock::time_point begin = Clock::now();
      const absl::StatusOr<uint64_t> held =
          client_.Append(session_, /*layer=*/0, static_cast<uint64_t>(at),
                         static_cast<uint32_t>(count), keys, values);
      if (!held.ok()) return held.status();
      micros += Micros(begin);
      progress_.Step();
    }
    result_.append_tokens_per_second = static_cast<double>(trace.tokens) * 1e6 / micros;
    progress_.End(absl::StrCat(Short(static_cast<double>(trace.tokens)), " tokens, ",
                               Short(result_.append_tokens_per_second), " tokens/s"));
    return absl::OkStatus();
  }

  std::vector<float> StepQueries(int step) const {
    std::vector<float> queries;
    for (const HeadTrace& trace : traces_) {
      const float* from = trace.StepQueries(step);
      queries.insert(queries.end(), from, from + trace.group * trace.key_dim);
    }
    return queries;
  }

  QueryItem Item(const std::vector<float>& queries) const {
    QueryItem item;
    item.session = session_;
    item.queries = AsBytes(absl::MakeConstSpan(queries));
    return item;
  }

  /// Full attention in double precision on this side; what it costs is time.
  absl::StatusOr<StepAnswer> FullAttention(int step) const {
    StepAnswer answer;
    for (const HeadTrace& trace : traces_) {
      const Reference reference =
          ComputeReference(trace, absl::MakeConstSpan(&step, 1), {.threads = 1});
      answer.out.insert(answer.out.end(), reference.out.begin(), reference.out.end());
      const auto tokens = static_cast<double>(trace.tokens);
      answer.keys_scanned += tokens;
      answer.keys_exact += tokens;
      answer.bytes_read += tokens * 2.0 * (trace.key_dim + trace.value_dim);
    }
    return answer;
  }

  absl::StatusOr<StepAnswer> Attend(int step, IndexKind index, uint32_t candidates) const {
    const std::vector<float> queries = StepQueries(step);
    AttendRequest request;
    request.items.push_back(Item(queries));
    request.options.index = index;
    request.options.candidates = candidates;
    request.options.exact_rows = options_.exact_rows;
    absl::StatusOr<SearchResponse> response = client_.Attend(request);
    if (!response.ok()) return response.status();
    StepAnswer answer;
    AddCosts(*response, answer);
    const absl::Span<const float> out = response->items[0].out;
    answer.out.assign(out.begin(), out.end());
    return answer;
  }

  /// TopK with rows: this side attends to the rows exactly, as a GPU would, and merges the state of
  /// the rest.
  absl::StatusOr<StepAnswer> TopK(int step) const {
    const std::vector<float> queries = StepQueries(step);
    TopKRequest request;
    request.items.push_back(Item(queries));
    request.options.index = IndexKind::kLadder;
    request.options.candidates = options_.candidates;
    request.options.exact_rows = options_.exact_rows;
    request.k = options_.k;
    absl::StatusOr<SearchResponse> response = client_.TopK(request);
    if (!response.ok()) return response.status();
    StepAnswer answer;
    AddCosts(*response, answer);
    const ItemResult& rest = response->items[0];
    answer.out.resize(rest.out.size());
    const int group = traces_[0].group;
    const int dim = traces_[0].value_dim;
    std::vector<float> scaled(queries);
    for (float& element : scaled) element *= shape_.softmax_scale;
    std::vector<float> storage(static_cast<size_t>(kernels::GroupStateFloats(group, dim)));
    std::vector<float> lse(static_cast<size_t>(group));
    for (int head = 0; head < 2; ++head) {
      const Selection& selection = rest.selections[static_cast<size_t>(head)];
      const kernels::GroupState state = kernels::BindState(storage.data(), group, dim);
      kernels::ResetState(state);
      kernels::AttendRows(scaled.data() + head * group * traces_[0].key_dim, selection.keys.data(),
                          selection.values.data(), shape_.dtype,
                          static_cast<int>(selection.positions.size()), traces_[0].key_dim, state);
      float* const out = answer.out.data() + head * group * dim;
      kernels::FinishState(state, out, lse.data());
      kernels::MergeFinished(out, lse.data(), rest.out.data() + head * group * dim,
                             rest.lse.data() + head * group, group, dim);
    }
    return answer;
  }

  /// Answers every step and sums up.
  absl::StatusOr<DemoRow> Measure(const std::string& name, const AnswerStep& answer_step) {
    progress_.Begin(name, static_cast<int64_t>(steps_.size()));
    std::vector<double> errors;
    std::vector<double> micros;
    DemoRow row;
    row.name = name;
    const double share = 1.0 / static_cast<double>(steps_.size());
    const auto dim = static_cast<size_t>(shape_.value_dim);
    for (size_t s = 0; s < steps_.size(); ++s) {
      const Clock::time_point begin = Clock::now();
      const absl::StatusOr<StepAnswer> answer = answer_step(steps_[s]);
      if (!answer.ok()) return answer.status();
      micros.push_back(Micros(begin));
      const auto group = static_cast<size_t>(shape_.Group());
      for (size_t h = 0; h < 2 * group; ++h) {
        const Reference& reference = references_[h / group];
        errors.push_back(OutputError(answer->out.data() + h * dim,
                                     reference.out.data() + (s * group + h % group) * dim,
                                     static_cast<int>(dim)));
      }
      row.keys_scanned += share * answer->keys_scanned;
      row.keys_fine += share * answer->keys_fine;
      row.keys_exact += share * answer->keys_exact;
      row.bytes_read += share * answer->bytes_read;
      row.bytes_wire += share * answer->bytes_wire;
      progress_.Step();
    }
    row.error_mean = Mean(errors);
    row.error_p90 = Percentile(errors, 0.9);
    row.error_max = Percentile(errors, 1.0);
    row.micros_p50 = Percentile(micros, 0.5);
    row.micros_p99 = Percentile(micros, 0.99);
    progress_.End(
        absl::StrCat("error ", Digits(row.error_mean), ", ", Digits(row.micros_p50), " us a step"));
    return row;
  }

  absl::Status Compare() {
    const std::pair<std::string, AnswerStep> ways[] = {
        {"full attention, here", [this](int step) { return FullAttention(step); }},
        {"Attend, exact", [this](int step) { return Attend(step, IndexKind::kExact, 1); }},
        {"Attend, ladder",
         [this](int step) { return Attend(step, IndexKind::kLadder, options_.candidates); }},
        {absl::StrCat("TopK ", options_.k, " with rows + rest"),
         [this](int step) { return TopK(step); }},
    };
    for (const auto& [name, answer_step] : ways) {
      absl::StatusOr<DemoRow> row = Measure(name, answer_step);
      if (!row.ok()) return row.status();
      result_.rows.push_back(*std::move(row));
    }
    return absl::OkStatus();
  }

  absl::Status Sweep() {
    for (const int64_t budget : kBudgets) {
      const absl::StatusOr<DemoRow> row =
          Measure(absl::StrCat("ladder with ", budget, " candidates"), [&](int step) {
            return Attend(step, IndexKind::kLadder, static_cast<uint32_t>(budget));
          });
      if (!row.ok()) return row.status();
      result_.ladder.push_back({budget, row->bytes_read, row->error_mean});
    }
    for (size_t i = 0; i < std::size(kBudgets); ++i) {
      const Evaluation a = EvaluateOracle(traces_[0], references_[0], i);
      const Evaluation b = EvaluateOracle(traces_[1], references_[1], i);
      result_.oracle.push_back(
          {kBudgets[i], a.bytes_read + b.bytes_read, (a.error_mean + b.error_mean) / 2.0});
    }
    return absl::OkStatus();
  }

  KvClient& client_;
  const DemoOptions& options_;
  Progress& progress_;
  std::vector<HeadTrace> traces_;
  std::vector<Reference> references_;
  std::vector<int> steps_;
  ModelShape shape_;
  Session session_;
  bool open_ = false;
  DemoResult result_;
};

}  // namespace

absl::StatusOr<DemoResult> RunDemo(KvClient& client, const DemoOptions& options,
                                   Progress& progress) {
  return Demo(client, options, progress).Run();
}

}  // namespace kvseek::cli
