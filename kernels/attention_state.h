// The algebra of partial attention.
//
// Attention of a query over a set S of tokens is o = sum_S exp(s_i) v_i / sum_S exp(s_i). Over a
// union of disjoint sets it can be put together from parts, if each part also tells its sum of
// exponentials (FlashInfer, arXiv 2501.01005; LeanAttention, arXiv 2405.10480). Two forms of a
// part:
//
//   finished  (o, lse): o is normalised, lse = ln sum exp(s_i). What travels and what users see.
//             The empty part is o = 0, lse = -infinity.
//   running   (max, sum, acc): sum = sum exp(s_i - max), acc = sum exp(s_i - max) v_i. What kernels
//             add to. The empty part is max = -infinity, sum = 0, acc = 0.
//
// Scores s are in natural-log units with the softmax scale already applied. All arithmetic is fp32.
// Merging is associative and commutative up to rounding; the empty part is its neutral element.
#ifndef KVSEEK_KERNELS_ATTENTION_STATE_H_
#define KVSEEK_KERNELS_ATTENTION_STATE_H_

namespace kvseek::kernels {

/// A view of the running states of the `group` query heads that share one KV head. Owns nothing.
struct GroupState {
  int group = 0;      ///< query heads
  int value_dim = 0;  ///< elements of one value row
  float* max =
      nullptr;  ///< (group), reference of the exponentials; any value >= no score is fine too
  float* sum = nullptr;  ///< (group)
  float* acc = nullptr;  ///< (group, value_dim)
};

/// Floats that one running state needs; BindState lays a view over that many.
constexpr int GroupStateFloats(int group, int value_dim) { return group * (value_dim + 2); }

inline GroupState BindState(float* storage, int group, int value_dim) {
  return {group, value_dim, storage, storage + group, storage + 2 * group};
}

/// Makes the state empty.
void ResetState(const GroupState& state) noexcept;

/// into := into + from. Shapes must agree. A NaN score never gets in: callers refuse non-finite
/// input.
void MergeState(const GroupState& into, const GroupState& from) noexcept;

/// Normalises: out (group, value_dim), lse (group). An empty head gives out = 0, lse = -infinity.
void FinishState(const GroupState& state, float* out, float* lse) noexcept;

/// The same algebra on finished parts: (out, lse) := (out, lse) merged with (other_out, other_lse),
/// for `heads` independent heads; out and other_out are (heads, value_dim), lse and other_lse
/// (heads).
void MergeFinished(float* out, float* lse, const float* other_out, const float* other_lse,
                   int heads, int value_dim) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_ATTENTION_STATE_H_
