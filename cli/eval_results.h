// What `kvseek eval` measured, as JSON, as a table and as a picture.
#ifndef KVSEEK_CLI_EVAL_RESULTS_H_
#define KVSEEK_CLI_EVAL_RESULTS_H_

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/evaluation.h"
#include "cli/plot.h"

namespace kvseek::cli {

/// One index with one choice of settings on one head.
struct EvalResult {
  std::string head;
  std::string index;
  nlohmann::ordered_json settings;
  Evaluation figures;
  std::optional<double> build_core_seconds;
  std::optional<double> index_bytes;
};

std::string EvalJson(const std::vector<EvalResult>& results, const std::string& simd_level);
std::string EvalTable(const std::vector<EvalResult>& results, const std::string& simd_level);

/// For each head four panels: output error and recall, against bytes read and against time. A curve
/// is one index with all settings but its budget; its points are the budgets.
std::vector<Plot> EvalPlots(const std::vector<EvalResult>& results);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_EVAL_RESULTS_H_
