// What the decoder's tests share: a daemon to kill, and sequences whose keys and values the host
// remembers, with attention over them in double precision.
#ifndef KVSEEK_TESTS_CLIENT_DECODER_DECODER_FIXTURE_H_
#define KVSEEK_TESTS_CLIENT_DECODER_DECODER_FIXTURE_H_

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <sys/types.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "client/sparse_decoder.h"
#include "tests/client/raw_socket.h"

namespace kvseek::test {

/// kvseekd, from beside this program, in a process of its own.
class DaemonChild {
 public:
  explicit DaemonChild(std::string path) : path_(std::move(path)) { Start(); }
  ~DaemonChild() { Kill(); }
  DaemonChild(const DaemonChild&) = delete;
  DaemonChild& operator=(const DaemonChild&) = delete;

  std::string address() const { return "unix:" + path_; }
  void Start();   ///< and waits until it serves
  void Kill();    ///< SIGKILL
  void Pause();   ///< SIGSTOP
  void Resume();  ///< SIGCONT

 private:
  std::string path_;
  pid_t pid_ = -1;
};

/// One sequence's rows, all layers, as the host remembers them.
struct Sequence {
  SequenceId id = 0;
  uint64_t tokens = 0;
  std::vector<std::vector<uint16_t>> keys;    ///< (layers): (tokens, kv_heads, key_dim)
  std::vector<std::vector<uint16_t>> values;  ///< likewise
};

/// Whether a query token of the step may see a position.
using Visible = std::function<bool(uint64_t position)>;

class DecoderTest : public testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;

  /// With options_ and one connection to each of `addresses`.
  void Create(const std::vector<std::string>& addresses);
  Sequence Open();
  /// The next `tokens` tokens of random rows, through PrefillLayer. With options_.open.build
  /// queries go along, each token's 8 elements apart from the next; all that nobody should read are
  /// NaN.
  absl::Status Prefill(Sequence& sequence, uint64_t tokens);
  /// One step of random rows and queries of every layer; each head of each output is compared with
  /// attention over the positions that `visible` lets through, up to the query's own. Returns the
  /// worst error, relative to the head's largest element; infinity for a NaN.
  double Step(
      const std::vector<Sequence*>& batch, uint32_t query_tokens,
      const Visible& visible = [](uint64_t) { return true; });
  /// Status of the last failing call in Step; OK if there was none.
  absl::Status step_status_;

  float Normal() { return std::normal_distribution<float>()(random_); }
  uint16_t Element(float scale);

  const uint64_t seed_ = std::random_device()();
  std::mt19937_64 random_{seed_};
  TempDir directory_;
  DecoderOptions options_;
  std::unique_ptr<SparseDecoder> decoder_;
  cudaStream_t stream_ = nullptr;

 private:
  struct LayerRows;
  double WorstError(const Sequence& sequence, uint32_t layer, uint32_t query_tokens,
                    const uint16_t* queries, const uint16_t* out, const Visible& visible) const;
  double HeadError(const Sequence& sequence, uint32_t layer, uint64_t query_position,
                   uint32_t query_head, const uint16_t* query, const uint16_t* out,
                   const Visible& visible) const;
  double Value(uint16_t bits) const;
};

}  // namespace kvseek::test

#endif  // KVSEEK_TESTS_CLIENT_DECODER_DECODER_FIXTURE_H_
