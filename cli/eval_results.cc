#include "cli/eval_results.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "cli/policy_flags.h"
#include "cli/table.h"

namespace kvseek::cli {
namespace {

using Json = nlohmann::ordered_json;

Json OrNull(const std::optional<double>& value) {
  return value.has_value() ? Json(*value) : Json();
}

std::string OrDash(const std::optional<double>& value) {
  return value.has_value() ? Digits(*value) : "-";
}

/// Of the ladder: its scan code.
std::string ScanText(const Json& settings) {
  const bool plain = settings.value("sketch", 1) == 0;
  return absl::StrCat(settings["scan"].get<std::string>(), plain ? " no sketch" : "");
}

/// Of landmark, cluster and graph: what was built.
std::string BuiltText(const std::string& index, const Json& settings) {
  if (index == "landmark") {
    return absl::StrCat(settings["summary"].get<std::string>(), " ", settings["block"].get<int>());
  }
  if (index == "graph") return absl::StrCat("degree ", settings["degree"].get<int>());
  return absl::StrCat("1/", settings["keys_per_cluster"].get<int>());
}

/// Of the same: how they are searched, but for the candidates.
std::string SearchText(const Json& settings) {
  std::string text;
  const int exact_top = settings.value("exact_top", 0);
  if (exact_top > 0) absl::StrAppend(&text, ", top ", exact_top);
  if (!settings["estimate"].get<bool>()) absl::StrAppend(&text, ", no est.");
  return text;
}

std::string SettingsText(const EvalResult& result) {
  if (result.index == "oracle")
    return absl::StrCat("top ", result.settings["exact"].get<int64_t>());
  if (result.index == "exact") return "all keys";
  const int candidates = result.settings["candidates"].get<int>();
  if (result.index == "ladder") {
    return absl::StrCat(ScanText(result.settings), ", ", candidates, ", ",
                        result.settings["exact"].get<int>(), PolicyFlags::Text(result.settings));
  }
  return absl::StrCat(BuiltText(result.index, result.settings), ", ", candidates,
                      SearchText(result.settings), PolicyFlags::Text(result.settings));
}

/// A result without its budget.
std::string CurveName(const EvalResult& result) {
  const Json& settings = result.settings;
  if (result.index == "oracle") return "perfect top k, rest forgotten";
  if (result.index == "ladder") {
    return absl::StrCat("ladder, ", ScanText(settings), PolicyFlags::Text(settings));
  }
  if (result.index == "exact") return result.index;
  return absl::StrCat(result.index, " ", BuiltText(result.index, settings), SearchText(settings),
                      PolicyFlags::Text(settings));
}

/// What one panel shows.
struct Panel {
  const char* title;
  const char* x_label;
  const char* y_label;
  std::optional<double> (*x)(const Evaluation&);
  double (*y)(const Evaluation&);
  bool recall;
};

constexpr char kBytes[] = "bytes read a step, for the group";
constexpr char kMicros[] = "microseconds a step, median";
constexpr char kError[] = "relative output error, mean";
constexpr char kRecall[] = "recall of each head's top 100";

std::optional<double> BytesOf(const Evaluation& f) { return f.bytes_read; }
std::optional<double> MicrosOf(const Evaluation& f) { return f.micros_p50; }
double ErrorOf(const Evaluation& f) { return f.error_mean; }
double RecallOf(const Evaluation& f) { return f.recall_at_100; }

constexpr Panel kPanels[] = {{"error against bytes", kBytes, kError, BytesOf, ErrorOf, false},
                             {"error against time", kMicros, kError, MicrosOf, ErrorOf, false},
                             {"recall against bytes", kBytes, kRecall, BytesOf, RecallOf, true},
                             {"recall against time", kMicros, kRecall, MicrosOf, RecallOf, true}};

Plot PanelPlot(const Panel& panel, const std::string& head, const std::vector<EvalResult>& results,
               const std::vector<std::string>& curves) {
  Plot plot{.title = absl::StrCat(head, ": ", panel.title),
            .x_label = panel.x_label,
            .y_label = panel.y_label,
            .series = {},
            .y_linear = panel.recall};
  double lowest = std::numeric_limits<double>::infinity();
  for (const std::string& name : curves) {
    PlotSeries& series = plot.series.emplace_back();
    series.name = name;
    for (const EvalResult& result : results) {
      if (result.head != head || CurveName(result) != name) continue;
      const std::optional<double> x = panel.x(result.figures);
      if (!x.has_value()) continue;
      const double y = panel.y(result.figures);
      const bool exact = result.index == "exact";
      series.dashed = result.index == "oracle";
      series.points.push_back(
          {*x, y, exact && !panel.recall ? absl::StrCat("exact: ", Digits(y)) : ""});
      if (!exact) lowest = std::min(lowest, y);
    }
  }
  if (!panel.recall && std::isfinite(lowest)) plot.y_min = lowest;
  return plot;
}

/// The values of `of(result)` that occur, in order of their first.
template <typename Of>
std::vector<std::string> Distinct(const std::vector<EvalResult>& results, const Of& of) {
  std::vector<std::string> values;
  for (const EvalResult& result : results) {
    const std::string value = of(result);
    if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
  }
  return values;
}

}  // namespace

std::string EvalJson(const std::vector<EvalResult>& results, const std::string& simd_level) {
  Json list = Json::array();
  for (const EvalResult& result : results) {
    const Evaluation& f = result.figures;
    list.push_back(
        {{"head", result.head},
         {"index", result.index},
         {"settings", result.settings},
         {"output_error", {{"mean", f.error_mean}, {"p90", f.error_p90}, {"max", f.error_max}}},
         {"recall_at_100", f.recall_at_100},
         {"keys_scanned", f.keys_scanned},
         {"keys_read",
          {{"mean", f.keys_read_mean},
           {"min", f.keys_read_min},
           {"p10", f.keys_read_p10},
           {"p90", f.keys_read_p90},
           {"max", f.keys_read_max}}},
         {"bytes_read", f.bytes_read},
         {"searches_skipped", f.searches_skipped},
         {"missed_mass",
          {{"estimated", OrNull(f.missed_estimated)},
           {"true", f.missed_true},
           {"interval_cover", OrNull(f.interval_cover)},
           {"interval_width", OrNull(f.interval_width)}}},
         {"micros",
          {{"mean", OrNull(f.micros_mean)},
           {"p50", OrNull(f.micros_p50)},
           {"p99", OrNull(f.micros_p99)}}},
         {"build_core_seconds", OrNull(result.build_core_seconds)},
         {"index_bytes", OrNull(result.index_bytes)}});
  }
  return Json{{"simd_level", simd_level}, {"results", list}}.dump(2) + "\n";
}

std::string EvalTable(const std::vector<EvalResult>& results, const std::string& simd_level) {
  Table table({"head",  "index",      "settings",    "error mean", "p90",
               "max",   "recall@100", "scanned",     "keys read",  "min-max",
               "bytes", "skipped",    "missed est.", "true",       "cover",
               "width", "us p50",     "p99",         "build s",    "size"});
  for (const EvalResult& result : results) {
    const Evaluation& f = result.figures;
    table.Add({result.head,
               result.index,
               SettingsText(result),
               Digits(f.error_mean),
               Digits(f.error_p90),
               Digits(f.error_max),
               Digits(f.recall_at_100),
               Short(f.keys_scanned),
               Short(f.keys_read_mean),
               absl::StrCat(Short(f.keys_read_min), "-", Short(f.keys_read_max)),
               ShortBytes(f.bytes_read),
               Digits(f.searches_skipped),
               OrDash(f.missed_estimated),
               Digits(f.missed_true),
               OrDash(f.interval_cover),
               OrDash(f.interval_width),
               OrDash(f.micros_p50),
               OrDash(f.micros_p99),
               OrDash(result.build_core_seconds),
               result.index_bytes.has_value() ? ShortBytes(*result.index_bytes) : "-"});
  }
  return absl::StrCat(table.Text(), "\nSIMD level ", simd_level,
                      ". Per group and step: scanned (keys), keys read, bytes, us. `kvseek eval "
                      "--help` explains the "
                      "columns.\n");
}

std::vector<Plot> EvalPlots(const std::vector<EvalResult>& results) {
  std::vector<Plot> plots;
  const std::vector<std::string> curves = Distinct(results, CurveName);
  for (const std::string& head : Distinct(results, [](const EvalResult& r) { return r.head; })) {
    for (const Panel& panel : kPanels) plots.push_back(PanelPlot(panel, head, results, curves));
  }
  return plots;
}

}  // namespace kvseek::cli
