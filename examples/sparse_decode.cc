// Decoding with kvseek, as an inference engine would do it: a prompt layer by layer, then steps in
// which the GPU holds some hundred tokens of each sequence and the daemon all others.
//
//   kvseekd --listen unix:/tmp/kvseek.sock &
//   sparse_decode unix:/tmp/kvseek.sock
//
// The "model" is random numbers. Each step's attention is compared with full attention in double
// precision; exit status 1 if it is off.
#include <chrono>
#include <cstdio>
#include <tuple>

#include "client/sparse_decoder.h"
#include "examples/decode_support.h"

namespace kvseek::examples {
namespace {

constexpr uint32_t kPrompt = 16384;
constexpr int kSteps = 4;

/// Decodes with the daemon's index `index`, and each KV head in mode `mode`. Returns the worst
/// error of a head in any step.
double Decode(const std::string& address, IndexKind index, HeadMode mode, cudaStream_t stream) {
  DecoderOptions options;
  options.shape = {.layers = 2, .kv_heads = 8, .query_heads = 32};
  options.search.index = index;
  const size_t heads = size_t{options.shape.layers} * options.shape.kv_heads;
  options.plan = PlanOfModes(options.shape.kv_heads, std::vector<HeadMode>(heads, mode));
  options.fallback = Fallback::kError;
  options.layer_deadline = std::chrono::seconds(5);
  ClientOptions daemon;
  daemon.address = address;
  const auto decoder = Must("create", SparseDecoder::Create(options, {daemon}));
  const SequenceId sequence = Must("open", decoder->Open());

  // The prompt: what an engine's own prefill computes stays on the GPU for one layer at a time.
  std::vector<Layer> layers;
  Must("prefill", decoder->BeginPrefill(sequence, kPrompt));
  for (uint32_t layer = 0; layer < options.shape.layers; ++layer) {
    layers.emplace_back(options.shape, kPrompt);
    const DeviceCopy keys(layers[layer].keys), values(layers[layer].values);
    Must("prefill", decoder->PrefillLayer(sequence, layer,
                                          {.keys = keys.data, .values = values.data}, stream));
  }

  double worst = 0.0;
  for (int step = 0; step < kSteps; ++step) {
    Must("step", decoder->BeginStep({sequence}, /*query_tokens=*/1, stream));
    for (uint32_t layer = 0; layer < options.shape.layers; ++layer) {
      const NewToken token = layers[layer].Next();
      const DeviceCopy queries(token.queries), keys(token.keys), values(token.values);
      const DeviceCopy out(token.queries);
      Must("attend",
           decoder->Attend(layer, queries.data, keys.data, values.data, out.data, stream));
      Must("attend", cudaStreamSynchronize(stream));
      worst = std::max(worst, layers[layer].WorstError(token.queries, out.Download()));
    }
  }
  std::printf("%.1f MB of KV in HBM; ", 1e-6 * static_cast<double>(decoder->device_bytes()));
  Must("close", decoder->Close(sequence));
  return worst;
}

bool Run(const std::string& address) {
  cudaStream_t stream = nullptr;
  Must("stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  bool is_good = true;
  for (const auto& [name, index, mode, tolerance] :
       {std::tuple("exact index, state", IndexKind::kExact, HeadMode::kState, 5e-3),
        {"exact index, rows", IndexKind::kExact, HeadMode::kRows, 5e-3},
        {"ladder, state", IndexKind::kLadder, HeadMode::kState, 5e-2},
        {"ladder, rows", IndexKind::kLadder, HeadMode::kRows, 5e-2}}) {
    std::printf("%-18s: ", name);
    const double error = Decode(address, index, mode, stream);
    std::printf("worst error of a head %.1e, %.0e allowed\n", error, tolerance);
    is_good = is_good && error <= tolerance;
  }
  cudaStreamDestroy(stream);
  return is_good;
}

}  // namespace
}  // namespace kvseek::examples

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: no CUDA device");
    return 0;
  }
  return kvseek::examples::Run(argc > 1 ? argv[1] : "unix:/tmp/kvseek.sock") ? 0 : 1;
}
