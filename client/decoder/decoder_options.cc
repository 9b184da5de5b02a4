#include "client/decoder/decoder_options.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "client/head_plan_message.h"
#include "kernels/cuda/attention.h"
#include "proto/head_plan_file.h"
#include "proto/status_code.h"

namespace kvseek::client {
namespace {

absl::Status Invalid(absl::string_view field, absl::string_view message) {
  return proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
}

absl::Status CheckShape(const ModelShape& shape, size_t daemons) {
  if (shape.layers == 0) return Invalid("shape.layers", "is 0");
  if (shape.kv_heads == 0 || shape.query_heads == 0 || shape.query_heads % shape.kv_heads != 0) {
    return Invalid("shape.query_heads", "is not a multiple of kv_heads, or 0");
  }
  if (shape.Group() > kernels::cuda::kMaxGroup) {
    return Invalid("shape.query_heads",
                   absl::StrCat("more than ", kernels::cuda::kMaxGroup, " for each KV head"));
  }
  const auto is_dim = [](uint32_t dim) {
    return dim >= 8 && dim <= kernels::cuda::kMaxRowDim && dim % 8 == 0;
  };
  if (!is_dim(shape.key_dim)) return Invalid("shape.key_dim", "not a multiple of 8 up to 256");
  if (!is_dim(shape.value_dim)) return Invalid("shape.value_dim", "not a multiple of 8 up to 256");
  if (shape.dtype != DType::kBf16 && shape.dtype != DType::kFp16) {
    return Invalid("shape.dtype", "neither bf16 nor fp16");
  }
  if (daemons == 0 || shape.kv_heads % daemons != 0) {
    return Invalid("daemons", "their number does not divide shape.kv_heads");
  }
  return absl::OkStatus();
}

absl::Status CheckRows(const DecoderOptions& options) {
  const uint64_t rows = uint64_t{RowsMax(options)} * options.query_tokens_max;
  if (options.cache_rows < rows) {
    return Invalid("cache_rows", absl::StrCat("less than rows * query_tokens_max, ", rows));
  }
  const auto asks_rows = [](const PlannedHead& head) { return head.mode == HeadMode::kRows; };
  if (options.rows == 0 &&
      std::any_of(options.plan.heads.begin(), options.plan.heads.end(), asks_rows)) {
    return Invalid("rows", "is 0, and a head's mode is kRows");
  }
  return absl::OkStatus();
}

absl::Status CheckPlan(const DecoderOptions& options) {
  if (options.open.plan.has_value()) return Invalid("open.plan", "goes into DecoderOptions::plan");
  const proto::HeadPlan plan = ToMessage(options.plan);
  absl::Status status = proto::CheckHeadPlan(plan, "plan.");
  if (status.ok()) {
    status = proto::CheckHeadPlanFits(plan, options.shape.layers, options.shape.kv_heads, "plan.");
  }
  return status;
}

absl::Status CheckDoorbell(const DecoderOptions& options, size_t daemons) {
  if (options.far_path != FarPath::kDoorbell) return absl::OkStatus();
  if (daemons != 1) return Invalid("daemons", "a doorbell is one daemon's");
  if (options.rows != 0) return Invalid("rows", "a doorbell brings states alone: 0");
  if (options.fallback != Fallback::kSteadyZone) {
    return Invalid("fallback", "with a doorbell the steady zone alone");
  }
  for (const PlannedHead& head : options.plan.heads) {
    if (head.mode == HeadMode::kLocal) return Invalid("plan", "a doorbell asks for all heads");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckOptions(const DecoderOptions& options, size_t daemons) {
  absl::Status shape = CheckShape(options.shape, daemons);
  if (!shape.ok()) return shape;
  if (options.sequences_max == 0) return Invalid("sequences_max", "is 0");
  if (options.query_tokens_max == 0 || options.query_tokens_max > kernels::cuda::kMaxTokens) {
    return Invalid("query_tokens_max", "not in 1..64");
  }
  if (options.sink_tokens % kPageTokens != 0) return Invalid("sink_tokens", "not whole pages");
  if (options.recent_tokens % kPageTokens != 0) return Invalid("recent_tokens", "not whole pages");
  if (options.block_tokens == 0 || options.block_tokens % kPageTokens != 0) {
    return Invalid("block_tokens", "not whole pages, or 0");
  }
  if (options.recent_tokens < options.block_tokens + options.query_tokens_max) {
    return Invalid("recent_tokens", "less than block_tokens + query_tokens_max");
  }
  if (options.layer_deadline.count() <= 0) return Invalid("layer_deadline", "is not positive");
  if (options.append_deadline.count() <= 0) return Invalid("append_deadline", "is not positive");
  if (options.prefill_chunk_tokens == 0) return Invalid("prefill_chunk_tokens", "is 0");
  if ((options.fallback == Fallback::kLocalCopy) != (options.local_tokens_max > 0)) {
    return Invalid("local_tokens_max", "goes with Fallback::kLocalCopy");
  }
  absl::Status plan = CheckPlan(options);
  if (plan.ok()) plan = CheckDoorbell(options, daemons);
  if (!plan.ok()) return plan;
  return CheckRows(options);
}

uint32_t RowsMax(const DecoderOptions& options) {
  uint32_t rows = options.rows;
  for (const PlannedHead& head : options.plan.heads) rows = std::max(rows, head.k);
  return options.rows == 0 ? 0 : rows;
}

}  // namespace kvseek::client
