// A recorded attention head: its stored keys and values, and the queries of decode steps that
// looked at all of them.
//
// `kvseek eval` and `kvseek demo` read traces, and the tests. Files are safetensors: one with `k`
// and `v` (tokens, head_dim), one with `<head>.q_decode` (steps, group, head_dim), unscaled, in
// bf16, fp16 or fp32. The latter may also hold `<head>.q_prefill` of the same form, a sample of the
// queries of stored tokens, with `prefill_positions` [samples] in I64: what indexes train on.
#ifndef KVSEEK_CLI_TRACE_H_
#define KVSEEK_CLI_TRACE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "kernels/dtype.h"

namespace kvseek::cli {

struct HeadTrace {
  std::string name;                              ///< e.g. "layer15.kv1"
  kernels::DType dtype = kernels::DType::kBf16;  ///< of keys and values as stored: bf16 or fp16
  bool rounded = false;  ///< the file had fp32 keys or values; they were rounded to bf16
  int64_t tokens = 0;
  int key_dim = 0;
  int value_dim = 0;
  std::vector<uint16_t> keys;    ///< (tokens, key_dim)
  std::vector<uint16_t> values;  ///< (tokens, value_dim)
  int steps = 0;
  int group = 0;
  std::vector<float> queries;  ///< (steps, group, key_dim), unscaled
  /// Queries of stored tokens, (prefill_positions.size(), group, key_dim), unscaled; those of
  /// sample i saw the keys up to prefill_positions[i], its own. May be empty.
  std::vector<float> prefill_queries;
  std::vector<int64_t> prefill_positions;
  float softmax_scale = 0.0F;  ///< 1 / sqrt(key_dim)

  /// Queries of one step, (group, key_dim).
  const float* StepQueries(int step) const {
    return queries.data() +
           static_cast<size_t>(step) * static_cast<size_t>(group) * static_cast<size_t>(key_dim);
  }
};

/// Reads one head. Errors name the file, tensor and field: not_found for a tensor that is missing,
/// invalid_argument for a dtype, shape or element that cannot be stored (docs: head_dim a multiple
/// of 8 up to 512; all elements finite and at most 65504 in magnitude; prefill positions are stored
/// ones), otherwise as SafeTensors.
absl::StatusOr<HeadTrace> LoadHeadTrace(const std::string& kv_path, const std::string& queries_path,
                                        const std::string& head);

/// The trace of query head `head` of the group alone. Its training queries are those of the whole
/// group.
HeadTrace OneQueryHead(const HeadTrace& trace, int head);

/// Names of the heads whose decode queries are in the file, sorted.
absl::StatusOr<std::vector<std::string>> ListHeads(const std::string& queries_path);

/// `count` steps out of `steps`, evenly spread and ascending; all of them if count is 0 or too
/// large.
std::vector<int> SpreadSteps(int steps, int count);

/// A trace's keys and values as the library stores them: segments with their codes, and the tail. A
/// whole segment at the end is one here, as it is in a daemon some tokens later. Immutable; the
/// trace must outlive it.
class StoredHead {
 public:
  /// REQUIRES: scan_bits is 1 or 2.
  StoredHead(const HeadTrace& trace, int scan_bits);
  index::KvView view() const;

 private:
  index::KvShape shape_;
  std::vector<std::shared_ptr<const index::Segment>> segments_;
  std::vector<index::TailChunkView> tail_;
  int64_t tail_tokens_ = 0;
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_TRACE_H_
