// Whole decode steps of a model with random weights: attention by a kvseek daemon against full
// attention from the GPU's own memory.
//
//   decode_bench --daemon unix:/tmp/kvseek.sock [--model llama3-8b] [--tokens 131072] [--batch 1]
//                [--attention state|rows|auto|full] [--layers 4] [--steps 12] [--scan-bits 2]
//                [--host-bytes-max N] [--attention-only] [--far-path requests|doorbell] [--graph]
//                [--json FILE]
//
// --tokens, --batch and --attention take lists; every combination is run. A step has the matrix
// products of a layer (cuBLAS, bf16; norms, rotary embedding and activations are left out) and its
// attention, for --layers layers of the model, each with its own weights, keys and values; times
// and memory are multiplied up to all of the model's layers, and the output head is added. A case
// that needs more of the GPU's memory than there is, with all layers, is said not to fit. Keys,
// values and queries are random normal numbers, queries the same in every step (so rows mode finds
// nearly all of its rows in the cache). attention_us is the stream's time of a layer's attention,
// from its queries' being there to its output's being there, the next number what of it is beyond
// the daemon's own time. --attention-only leaves the matrix products out and waits for the GPU
// after every layer, so that launching the first kernel is in those times too. --far-path doorbell
// asks by kernels (state mode); with --graph the layers of a step are one CUDA graph, which a step
// launches. An event takes the stream some microseconds; with --whole-steps there are two a step
// in place of two a layer, and a layer's times are a step's, divided.
#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "bench/dense_layers.h"
#include "bench/random_fill.h"
#include "client/decoder/gpu_memory.h"
#include "client/sparse_decoder.h"
#include "kernels/cuda/attention.h"

namespace kvseek::bench {
namespace {

using client::DeviceArray;
using client::GpuEvent;
using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr uint32_t kFullPageTokens = 64;
constexpr double kReserve = 4e9;  ///< of the GPU's memory, for activations and the engine

struct Options {
  std::string daemon = "unix:/tmp/kvseek.sock";
  std::string model = "llama3-8b";
  std::vector<uint64_t> tokens{131072};
  std::vector<uint32_t> batch{1};
  std::vector<std::string> attention{"state", "full"};
  uint32_t layers = 4;
  int steps = 12;
  int warm_up = 4;
  uint32_t scan_bits = 2;
  uint32_t rows = 256;
  double host_bytes_max = 100e9;
  int spin_us = 2000;
  bool attention_only = false;
  std::string far_path = "requests";
  bool graph = false;
  bool whole_steps = false;
  std::string json;
};

struct Case {
  const Model* model;
  uint64_t tokens;
  uint32_t batch;
  std::string attention;
};

/// A layer's attention of one step; the same tensors are the new rows of each layer.
struct NewRows {
  NewRows(const Model& model, uint32_t batch, cudaStream_t stream)
      : queries(RandomArray(size_t{batch} * model.query_heads * model.head_dim, 1.0F, 7, stream)),
        keys(RandomArray(size_t{batch} * model.kv_heads * model.head_dim, 1.0F, 8, stream)),
        values(RandomArray(size_t{batch} * model.kv_heads * model.head_dim, 1.0F, 9, stream)) {}
  DeviceArray<uint16_t> queries, keys, values;
};

Json Quantiles(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {{"p50", times[times.size() / 2]}, {"p99", times[times.size() * 99 / 100]}};
}

/// How long the stream is at each layer's attention: from its queries' being there to its output's.
class StreamTimes {
 public:
  StreamTimes(uint32_t layers, cudaStream_t stream) : events_(2 * size_t{layers}), stream_(stream) {
    for (GpuEvent& event : events_) Must("event", event.Create(0));
  }
  void Begin(uint32_t layer) { Record(events_[size_t{2} * layer]); }
  void End(uint32_t layer) { Record(events_[size_t{2} * layer + 1]); }
  /// Microseconds from the first layer's beginning to the last one's end, once the stream is idle.
  double Between(uint32_t first, uint32_t last) const {
    float ms = 0.0F;
    Must("event", cudaEventElapsedTime(&ms, events_[size_t{2} * first].get(),
                                       events_[size_t{2} * last + 1].get()));
    return 1e3 * static_cast<double>(ms);
  }

 private:
  /// In a graph that is being captured an event has to be said to be the host's.
  void Record(const GpuEvent& event) {
    cudaStreamCaptureStatus captured = cudaStreamCaptureStatusNone;
    Must("event", cudaStreamIsCapturing(stream_, &captured));
    const unsigned flags = captured == cudaStreamCaptureStatusActive ? cudaEventRecordExternal
                                                                     : cudaEventRecordDefault;
    Must("event", cudaEventRecordWithFlags(event.get(), stream_, flags));
  }

  std::vector<GpuEvent> events_;
  cudaStream_t stream_;
};

/// Work that is done once, so that all of its code is loaded, then captured and launched from then
/// on; or, if `captured` is not set, done anew each time.
class Replay {
 public:
  Replay(bool captured, cudaStream_t stream) : captured_(captured), stream_(stream) {}
  ~Replay() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  template <typename Work>
  void Run(const Work& work) {
    if (!captured_ || !std::exchange(warm_, true)) return work();
    if (graph_ == nullptr) {
      cudaGraph_t graph = nullptr;
      Must("capture", cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
      work();
      Must("capture", cudaStreamEndCapture(stream_, &graph));
      Must("graph", cudaGraphInstantiate(&graph_, graph, 0));
      Must("graph", cudaGraphDestroy(graph));
    }
    Must("graph", cudaGraphLaunch(graph_, stream_));
  }

 private:
  bool captured_;
  bool warm_ = false;
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

/// Times `steps` steps of `layers` layers and one output head, and the head alone: milliseconds.
/// And the stream's time of a layer's attention, and what of it is beyond daemon_us(layer).
template <typename Begin, typename Attend, typename DaemonTime>
Json TimeSteps(const Options& options, DenseLayers& dense, uint32_t layers, const Begin& begin,
               const Attend& attend, const DaemonTime& daemon_us, cudaStream_t stream) {
  std::vector<double> steps, heads, attention_us, beyond_us;
  const bool captured = options.graph && options.far_path == "doorbell";
  StreamTimes times(layers, stream);
  Replay replay(captured, stream);
  const auto times_layer = [&](uint32_t layer, uint32_t edge) {
    return !options.whole_steps || layer == edge;
  };
  for (int step = 0; step < options.warm_up + options.steps; ++step) {
    const auto begun = Clock::now();
    begin();
    replay.Run([&] {
      for (uint32_t layer = 0; layer < layers; ++layer) {
        dense.BeforeAttention(layer);
        if (times_layer(layer, 0)) times.Begin(layer);
        attend(layer);
        if (times_layer(layer, layers - 1)) times.End(layer);
        dense.AfterAttention(layer);
      }
    });
    Must("step", cudaStreamSynchronize(stream));
    const auto layers_done = Clock::now();
    dense.Head();
    Must("head", cudaStreamSynchronize(stream));
    const auto done = Clock::now();
    if (step < options.warm_up) continue;
    using Milliseconds = std::chrono::duration<double, std::milli>;
    steps.push_back(Milliseconds(layers_done - begun).count());
    heads.push_back(Milliseconds(done - layers_done).count());
    if (options.whole_steps) {
      double daemons_us = 0.0;
      for (uint32_t layer = 0; layer < layers; ++layer) daemons_us += daemon_us(layer);
      const double whole_us = times.Between(0, layers - 1);
      attention_us.push_back(whole_us / layers);
      beyond_us.push_back((whole_us - daemons_us) / layers);
      continue;
    }
    for (uint32_t layer = 0; layer < layers; ++layer) {
      attention_us.push_back(times.Between(layer, layer));
      beyond_us.push_back(times.Between(layer, layer) - daemon_us(layer));
    }
  }
  std::sort(steps.begin(), steps.end());
  std::sort(heads.begin(), heads.end());
  return {{"layers_ms", steps[steps.size() / 2]},
          {"layers_worst_ms", steps.back()},
          {"head_ms", heads[heads.size() / 2]},
          {"attention_us", Quantiles(std::move(attention_us))},
          {"attention_beyond_daemon_us", Quantiles(std::move(beyond_us))}};
}

Json RunFull(const Options& options, const Case& run, uint32_t layers, cudaStream_t stream) {
  const Model& model = *run.model;
  const uint64_t pages = (run.tokens + kFullPageTokens - 1) / kFullPageTokens;
  const size_t row = size_t{model.kv_heads} * model.head_dim;
  const size_t elements = run.batch * pages * kFullPageTokens * row;
  std::vector<DeviceArray<uint16_t>> keys, values;
  for (uint32_t layer = 0; layer < layers; ++layer) {
    keys.push_back(RandomArray(elements, 1.0F, 10 + layer, stream));
    values.push_back(RandomArray(elements, 1.0F, 50 + layer, stream));
  }
  std::vector<int32_t> lists(run.batch * pages), counts(run.batch);
  for (size_t i = 0; i < lists.size(); ++i) lists[i] = static_cast<int32_t>(i);
  std::fill(counts.begin(), counts.end(), static_cast<int32_t>(run.tokens));
  size_t total = 0;
  DeviceArray<int32_t> device_lists, device_counts;
  DeviceArray<uint8_t> workspace;
  DeviceArray<float> out, lse;
  const size_t heads = size_t{run.batch} * model.query_heads;
  const int group = static_cast<int>(model.query_heads / model.kv_heads);
  Must("memory", device_lists.Allocate(lists.size(), total));
  Must("memory", device_counts.Allocate(counts.size(), total));
  Must("memory",
       workspace.Allocate(kernels::cuda::AttendWorkspaceBytes(
                              static_cast<int>(run.batch * model.kv_heads), 1, group, 128),
                          total));
  Must("memory", out.Allocate(heads * model.head_dim, total));
  Must("memory", lse.Allocate(heads, total));
  Must("lists",
       cudaMemcpy(device_lists.get(), lists.data(), device_lists.bytes(), cudaMemcpyHostToDevice));
  Must("counts", cudaMemcpy(device_counts.get(), counts.data(), device_counts.bytes(),
                            cudaMemcpyHostToDevice));
  DenseLayers dense(model, layers, run.batch, stream);
  const NewRows rows(model, run.batch, stream);
  const auto attend = [&](uint32_t layer) {
    kernels::cuda::KvPages kv;
    kv.pool = {.keys = keys[layer].get(),
               .values = values[layer].get(),
               .kv_heads = static_cast<int>(model.kv_heads),
               .page_tokens = static_cast<int>(kFullPageTokens),
               .key_dim = static_cast<int>(model.head_dim),
               .value_dim = static_cast<int>(model.head_dim)};
    kv.pages = device_lists.get();
    kv.counts = device_counts.get();
    kv.pages_max = static_cast<int>(pages);
    kv.sequences = static_cast<int>(run.batch);
    kernels::cuda::PageQueries queries;
    queries.queries = rows.queries.get();
    queries.group = group;
    queries.softmax_scale = 0.088388348F;
    Must("AttendPages",
         kernels::cuda::AttendPages(kv, queries, {workspace.get(), workspace.bytes()}, out.get(),
                                    lse.get(), stream));
    const kernels::cuda::StateList list{out.get(), lse.get(), 1};
    Must("MergeStates", kernels::cuda::MergeStates(
                            &list, 1, static_cast<int>(heads), static_cast<int>(model.head_dim),
                            dense.attended(), DType::kBf16, nullptr, stream));
  };
  return TimeSteps(
      options, dense, layers, [] {}, attend, [](uint32_t) { return 0.0; }, stream);
}

/// Opens the batch and gives the daemon its tokens, layer by layer.
std::vector<SequenceId> Fill(SparseDecoder& decoder, const Case& run, uint32_t layers,
                             cudaStream_t stream) {
  const Model& model = *run.model;
  const size_t elements = run.tokens * model.kv_heads * model.head_dim;
  const DeviceArray<uint16_t> keys = RandomArray(elements, 1.0F, 1, stream);
  const DeviceArray<uint16_t> values = RandomArray(elements, 1.0F, 2, stream);
  std::vector<SequenceId> sequences;
  for (uint32_t b = 0; b < run.batch; ++b) {
    sequences.push_back(Must("Open", decoder.Open()));
    Must("BeginPrefill", decoder.BeginPrefill(sequences[b], run.tokens));
    for (uint32_t layer = 0; layer < layers; ++layer) {
      const uint64_t seed = 1000 + b * 100 + layer;
      Must("random numbers", RandomFill(keys.get(), elements, 1.0F, 2 * seed, stream));
      Must("random numbers", RandomFill(values.get(), elements, 1.0F, 2 * seed + 1, stream));
      PrefillTensors tensors;
      tensors.keys = keys.get();
      tensors.values = values.get();
      Must("PrefillLayer", decoder.PrefillLayer(sequences[b], layer, tensors, stream));
    }
  }
  return sequences;
}

HeadMode ModeOf(const std::string& attention) {
  if (attention == "rows") return HeadMode::kRows;
  return attention == "auto" ? HeadMode::kAuto : HeadMode::kState;
}

Json RunSparse(const Options& options, const Case& run, uint32_t layers, cudaStream_t stream) {
  const Model& model = *run.model;
  DecoderOptions decoding;
  decoding.shape = {.layers = layers,
                    .kv_heads = model.kv_heads,
                    .query_heads = model.query_heads,
                    .key_dim = model.head_dim,
                    .value_dim = model.head_dim};
  decoding.sequences_max = run.batch;
  decoding.plan = PlanOfModes(
      model.kv_heads, std::vector<HeadMode>(layers * model.kv_heads, ModeOf(run.attention)));
  decoding.rows = run.attention == "state" ? 0 : options.rows;
  decoding.cache_rows = 2 * options.rows;
  decoding.layer_deadline = std::chrono::seconds(30);
  decoding.append_deadline = std::chrono::seconds(60);
  const bool doorbell = options.far_path == "doorbell";
  if (doorbell) {
    decoding.far_path = FarPath::kDoorbell;
  } else {
    decoding.fallback = Fallback::kError;  // a step that misses is no step to time
  }
  decoding.open.scan_bits = options.scan_bits;
  ClientOptions connection;
  connection.address = options.daemon;
  connection.spin = std::chrono::microseconds(options.spin_us);
  const auto decoder = Must("Create", SparseDecoder::Create(decoding, {connection}));
  const auto filling = Clock::now();
  const std::vector<SequenceId> sequences = Fill(*decoder, run, layers, stream);
  const double fill_s = std::chrono::duration<double>(Clock::now() - filling).count();

  DenseLayers dense(model, options.attention_only ? 0 : layers, run.batch, stream);
  const NewRows rows(model, run.batch, stream);
  const auto begin = [&] { Must("BeginStep", decoder->BeginStep(sequences, 1, stream)); };
  std::vector<double> daemon_us(layers);
  const auto attend = [&](uint32_t layer) {
    const uint64_t before = decoder->stats().daemon_us;
    Must("Attend", decoder->Attend(layer, rows.queries.get(), rows.keys.get(), rows.values.get(),
                                   dense.attended(), stream));
    daemon_us[layer] = static_cast<double>(decoder->stats().daemon_us - before);
    if (options.attention_only && !doorbell) Must("Attend", cudaStreamSynchronize(stream));
  };
  const DecoderStats start = decoder->stats();
  Json result = TimeSteps(
      options, dense, layers, begin, attend,
      [&](uint32_t layer) {
        return doorbell ? 1e-3 * static_cast<double>(decoder->daemon_ns(layer)) : daemon_us[layer];
      },
      stream);
  const DecoderStats end = decoder->stats();
  if (end.misses != 0) Fail("a question through the doorbell was not answered");
  const auto per_layer = [&](uint64_t DecoderStats::*part) {
    return static_cast<double>(end.*part - start.*part) /
           static_cast<double>(end.layers - start.layers);
  };
  result["layer_us"] = {{"queries_to_host", per_layer(&DecoderStats::queries_us)},
                        {"asking", per_layer(&DecoderStats::asking_us)},
                        {"daemon", per_layer(&DecoderStats::daemon_us)},
                        {"placing", per_layer(&DecoderStats::placing_us)}};
  result["layer_bytes_to_host"] = per_layer(&DecoderStats::bytes_to_host);
  result["layer_bytes_to_device"] = per_layer(&DecoderStats::bytes_to_device);
  result["rows_cached"] = end.rows_asked > 0 ? static_cast<double>(end.rows_cached) /
                                                   static_cast<double>(end.rows_asked)
                                             : 0.0;
  result["kv_device_bytes"] = static_cast<double>(decoder->device_bytes()) / layers * model.layers;
  result["fill_s"] = fill_s;
  result["fill_gb_per_s"] = 1e-9 * static_cast<double>(model.KvBytesPerToken()) / model.layers *
                            layers * static_cast<double>(run.tokens * run.batch) / fill_s;
  for (const SequenceId sequence : sequences) Must("Close", decoder->Close(sequence));
  return result;
}

Json Run(const Options& options, const Case& run, cudaStream_t stream) {
  const Model& model = *run.model;
  size_t free_bytes = 0, gpu_bytes = 0;
  Must("memory", cudaMemGetInfo(&free_bytes, &gpu_bytes));
  const double kv = static_cast<double>(model.KvBytesPerToken() * run.tokens);
  const double room =
      static_cast<double>(gpu_bytes) - kReserve - static_cast<double>(model.WeightBytes());
  Json result{{"model", model.name},
              {"tokens", run.tokens},
              {"batch", run.batch},
              {"attention", run.attention},
              {"far_path", options.far_path},
              {"graph", options.graph},
              {"scan_bits", options.scan_bits},
              {"full_kv_bytes", kv * run.batch},
              {"full_batch_max", std::max(0.0, room / kv)}};
  const bool full = run.attention == "full";
  if (full && kv * run.batch > room) {
    result["fits"] = false;
    return result;
  }
  // The daemon holds rows and about a third more of codes.
  const double host = 1.4 * kv * run.batch / model.layers * options.layers;
  if (!full && host > options.host_bytes_max) {
    result["skipped"] = "more host memory than --host-bytes-max";
    return result;
  }
  const Json times = full ? RunFull(options, run, options.layers, stream)
                          : RunSparse(options, run, options.layers, stream);
  result.update(times);
  const double step_ms = times["layers_ms"].get<double>() / options.layers * model.layers +
                         times["head_ms"].get<double>();
  result["fits"] = true;
  result["layers_measured"] = options.layers;
  result["layers_of_model"] = model.layers;
  result["step_ms"] = step_ms;
  result["tokens_per_s"] = 1e3 * run.batch / step_ms;
  if (full) result["kv_device_bytes"] = kv * run.batch;
  result["kv_device_share"] = result["kv_device_bytes"].get<double>() / (kv * run.batch);
  return result;
}

void Print(const Json& result) {
  std::printf("%-15s %8lu tokens, batch %3u, %-5s: ", result["model"].get<std::string>().c_str(),
              result["tokens"].get<unsigned long>(), result["batch"].get<unsigned>(),
              result["attention"].get<std::string>().c_str());
  if (result.contains("skipped")) {
    std::printf("skipped: %s\n", result["skipped"].get<std::string>().c_str());
  } else if (!result["fits"].get<bool>()) {
    std::printf("does not fit: %.0f GB of keys and values, %.1f sequences do\n",
                1e-9 * result["full_kv_bytes"].get<double>(),
                result["full_batch_max"].get<double>());
  } else {
    std::printf("step %8.2f ms, %8.1f tokens/s, KV in HBM %6.2f GB (%.2f %% of full)",
                result["step_ms"].get<double>(), result["tokens_per_s"].get<double>(),
                1e-9 * result["kv_device_bytes"].get<double>(),
                100.0 * result["kv_device_share"].get<double>());
    if (result.contains("layer_us"))
      std::printf("\n    a layer, us: %s", result["layer_us"].dump().c_str());
    std::printf("\n    a layer's attention %s us, beyond the daemon's time %s us",
                result["attention_us"].dump().c_str(),
                result["attention_beyond_daemon_us"].dump().c_str());
    std::printf("\n");
  }
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("Whole decode steps: kvseek against full attention from the GPU's memory");
  app.add_option("--daemon", options.daemon, "address of kvseekd");
  app.add_option("--model", options.model, "llama3-8b or llama3-70b-tp8");
  app.add_option("--tokens", options.tokens, "of each sequence")->delimiter(',');
  app.add_option("--batch", options.batch, "sequences")->delimiter(',');
  app.add_option("--attention", options.attention, "state, rows, auto, full")
      ->delimiter(',')
      ->check(CLI::IsMember({"state", "rows", "auto", "full"}));
  app.add_option("--layers", options.layers, "layers to measure")->check(CLI::Range(1, 200));
  app.add_option("--steps", options.steps, "steps to time")->check(CLI::Range(1, 100000));
  app.add_option("--warm-up", options.warm_up, "steps before them")->check(CLI::Range(0, 100000));
  app.add_option("--scan-bits", options.scan_bits, "of the daemon's ladder")
      ->check(CLI::Range(1, 2));
  app.add_option("--rows", options.rows, "keys of each KV head in rows mode");
  app.add_option("--spin-us", options.spin_us, "how long the client polls before it sleeps");
  app.add_option("--host-bytes-max", options.host_bytes_max, "that the daemon may take");
  app.add_flag("--attention-only", options.attention_only,
               "no matrix products; wait for each layer");
  app.add_option("--far-path", options.far_path, "how daemons are asked: requests, doorbell")
      ->check(CLI::IsMember({"requests", "doorbell"}));
  app.add_flag("--graph", options.graph, "with a doorbell: a step's layers are one CUDA graph");
  app.add_flag("--whole-steps", options.whole_steps,
               "time the stream from a step's first layer to its last (with --attention-only)");
  app.add_option("--json", options.json, "file for the results");
  CLI11_PARSE(app, argc, argv);
  if (options.whole_steps && !options.attention_only) {
    Fail("--whole-steps needs --attention-only: matrix products are no attention");
  }
  const auto model = std::find_if(Models().begin(), Models().end(),
                                  [&](const Model& m) { return m.name == options.model; });
  if (model == Models().end()) Fail("no model " + options.model);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: no CUDA device");
    return 0;
  }
  cudaDeviceProp device{};
  Must("device", cudaGetDeviceProperties(&device, 0));
  cudaStream_t stream = nullptr;
  Must("stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  Json all{{"gpu", device.name}, {"cases", Json::array()}};
  for (const uint64_t tokens : options.tokens) {
    for (const uint32_t batch : options.batch) {
      for (const std::string& attention : options.attention) {
        all["cases"].push_back(Run(options, {&*model, tokens, batch, attention}, stream));
        Print(all["cases"].back());
      }
    }
  }
  cudaStreamDestroy(stream);
  if (!options.json.empty()) std::ofstream(options.json) << all.dump(2) << "\n";
  return 0;
}

}  // namespace
}  // namespace kvseek::bench

int main(int argc, char** argv) { return kvseek::bench::Main(argc, argv); }
