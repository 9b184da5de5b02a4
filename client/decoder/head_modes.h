// How a decoder has each KV head of each layer answered, and the choice between rows and state.
//
// Which of the two is faster depends on the machine: a state costs the daemon more reading and the
// bus nothing, rows the other way round. ModeChooser measures both in the first steps, keeps to the
// faster one, and looks at the other again now and then.
#ifndef KVSEEK_CLIENT_DECODER_HEAD_MODES_H_
#define KVSEEK_CLIENT_DECODER_HEAD_MODES_H_

#include <cstdint>
#include <vector>

namespace kvseek {

/// Where a KV head's attention to tokens outside of the steady zone comes from.
enum class HeadMode : uint8_t {
  kAuto,   ///< kRows or kState, whichever was measured to be faster in this layer
  kLocal,  ///< nowhere: a streaming head (DuoAttention, arXiv 2410.10819) asks for nothing
  kRows,   ///< the daemon's best rows, attended to on the GPU, and the state of all others
  kState,  ///< the daemon attends to all
};

namespace client {

/// Resolves kAuto layer by layer. Not thread-safe.
class ModeChooser {
 public:
  static constexpr int kTrials = 3;        ///< steps of each mode before the first decision
  static constexpr int kTrialEvery = 512;  ///< then one step of the slower mode in so many
  static constexpr double kKeep = 0.9;     ///< of an average that the next measurement leaves

  /// `modes` (layers, kv_heads), or empty: kAuto for all. Without `rows`, kAuto means kState.
  ModeChooser(uint32_t layers, uint32_t kv_heads, std::vector<HeadMode> modes, bool rows);

  /// The modes of a layer's KV heads for its next step, without kAuto; valid until the next call.
  const std::vector<HeadMode>& Next(uint32_t layer);
  /// Whether some head of the layer is to be chosen for, so that its steps should be recorded.
  bool Chooses(uint32_t layer) const;
  /// What the step that Next was asked for took in its kAuto heads' mode, in microseconds for each
  /// query token of the batch. Steps with a miss are not told.
  void Record(uint32_t layer, double microseconds);

 private:
  struct Cost {
    double average = 0.0;  ///< microseconds
    int measured = 0;
  };
  struct Layer {
    Cost rows;
    Cost state;
    HeadMode current = HeadMode::kState;
    uint32_t steps = 0;
  };

  uint32_t kv_heads_;
  std::vector<HeadMode> modes_;
  bool rows_;
  std::vector<Layer> layers_;
  std::vector<HeadMode> resolved_;
};

}  // namespace client
}  // namespace kvseek

#endif  // KVSEEK_CLIENT_DECODER_HEAD_MODES_H_
