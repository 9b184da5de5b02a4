// What appending costs, from a client's process to a daemon's: a whole prefill, and a decode step's
// one token of all layers.
//
//   append_bench [--transport shm|unix] [--via ADDRESS] [--shape llama3-8b] [--layers N]
//                [--tokens 131072] [--chunk 1024] [--under-way 16] [--connections 1]
//                [--rounds 8] [--steps 128] [--gap-us 500] [--apart] [--spin-us 0] [--workers 0]
//                [--prefault]
//                [--format text|json]
//
// Prefill: chunks in the order of a chunked prefill (all layers of a chunk, then the next chunk),
// so many appends under way at once; GB/s of bf16 K and V from the first call to the last answer.
// Then each layer is searched for its last key. Decode: all layers in one request or, with --apart,
// a request each, which leave together; a step ends when all are answered. Between steps the client
// does nothing for --gap-us. Each
// round has --steps of them, from 32 tokens before the end of a segment on. The step that ends one
// in every head of every layer and the one in which it becomes due (index/segment.h, kSealDelay),
// made by then or not, are counted apart. The numbers come from memory made before the clock
// starts.
//
// Without --via a kvseekd is started for it, with --workers, with threads that spin for --spin-us
// as the client's do, and with --prefault with all of its memory touched before.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/connect.h"
#include "cli/daemon_process.h"
#include "cli/percentile.h"
#include "cli/synthetic.h"
#include "cli/table.h"
#include "client/kv_client.h"
#include "index/segment.h"

namespace {

using Clock = std::chrono::steady_clock;
using kvseek::KvClient;
using kvseek::index::kSegmentTokens;
using Json = nlohmann::ordered_json;

const kvseek::CallOptions kCall{.deadline = std::chrono::minutes(1)};
constexpr size_t kChunks = 8;  ///< of different numbers, used again and again

struct Flags {
  kvseek::cli::ConnectFlags connect;
  std::string transport = "shm";
  std::string shape = "llama3-8b";
  uint32_t layers = 0;
  uint32_t tokens = 131072;
  uint32_t chunk = 1024;
  uint32_t under_way = 16;
  uint32_t connections = 1;
  uint32_t rounds = 8;
  uint32_t steps = 128;
  uint32_t gap_us = 500;
  int workers = 0;
  bool prefault = false;
  bool apart = false;
  std::string format = "text";
};

struct Result {
  double prefill_seconds = 0.0;
  uint64_t prefill_bytes = 0;
  double found_us = 0.0;           ///< the first search after the last answer
  std::vector<double> steps_us;    ///< that fill the tail
  std::vector<double> ending_us;   ///< that end a segment in every head
  std::vector<double> sealing_us;  ///< in which these become due
  double GigabytesPerSecond() const {
    return static_cast<double>(prefill_bytes) / prefill_seconds / 1e9;
  }
};

[[noreturn]] void Fail(const std::string& what) {
  std::cerr << "append_bench: " << what << "\n";
  std::exit(1);
}

double Micros(Clock::duration time) {
  return std::chrono::duration<double, std::micro>(time).count();
}

/// Keys and values of some tokens of one layer.
struct Chunk {
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;
};

class Bench {
 public:
  Bench(const Flags& flags, const kvseek::ModelShape& shape) : flags_(flags), shape_(shape) {
    const kvseek::cli::SyntheticModel model(shape, /*seed=*/1);
    chunks_.resize(kChunks);
    for (size_t c = 0; c < kChunks; ++c) {
      model.Fill(0, static_cast<uint32_t>(c) % shape.layers, c * flags.chunk, flags.chunk,
                 chunks_[c].keys, chunks_[c].values);
    }
    // Far along its own key, which no other comes near.
    last_ = chunks_[0];
    const size_t row = size_t{shape.kv_heads} * shape.key_dim;
    const size_t end = row * ((flags.tokens - 1) % flags.chunk + 1);
    for (size_t i = end - row; i < end; ++i) {
      last_.keys[i] = kvseek::kernels::FloatToBf16(i % 2 == 0 ? kFar : -kFar);
    }
    for (uint32_t i = 0; i < flags.connections; ++i) {
      auto client = kvseek::cli::Connect(flags.connect);
      if (!client.ok()) Fail(client.status().ToString());
      clients_.push_back(*std::move(client));
    }
    auto session = clients_[0]->Open(
        shape, {.lease = std::chrono::minutes(30), .tokens_expected = flags.tokens});
    if (!session.ok()) Fail(session.status().ToString());
    session_ = *session;
  }
  ~Bench() { clients_[0]->Close(session_).IgnoreError(); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  Result Run() {
    Prefill();
    FindLastKeys();
    Decode();
    return result_;
  }

 private:
  static constexpr float kFar = 32.0F;

  /// Layers share the connections.
  KvClient& Client(uint32_t layer) { return *clients_[layer % clients_.size()]; }

  void Append(uint32_t layer, uint32_t tokens, const Chunk& chunk) {
    const size_t keys = size_t{tokens} * shape_.kv_heads * shape_.key_dim;
    const size_t values = size_t{tokens} * shape_.kv_heads * shape_.value_dim;
    under_way_.fetch_add(1);
    Client(layer).AppendAsync(session_, layer, held_, tokens, {chunk.keys.data(), keys},
                              {chunk.values.data(), values}, kCall, Done());
  }

  kvseek::Callback<uint64_t> Done() {
    return [this](const absl::StatusOr<uint64_t>& done) {
      if (!done.ok()) Fail(done.status().ToString());
      under_way_.fetch_sub(1);
      under_way_.notify_one();
    };
  }

  /// Until at most so many appends are under way.
  void WaitFor(uint32_t rest) {
    for (uint32_t now = under_way_.load(); now > rest; now = under_way_.load()) {
      if (flags_.connect.spin_us == 0) {
        under_way_.wait(now);
      } else {
        for (const auto& client : clients_) client->Poll();
      }
    }
  }

  void Prefill() {
    const Clock::time_point begin = Clock::now();
    size_t next = 0;
    while (held_ < flags_.tokens) {
      const uint32_t tokens = std::min<uint32_t>(flags_.chunk, flags_.tokens - held_);
      const bool ends = held_ + tokens == flags_.tokens;
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        WaitFor(flags_.under_way - 1);
        Append(layer, tokens, ends ? last_ : chunks_[next++ % kChunks]);
      }
      held_ += tokens;
    }
    WaitFor(0);
    result_.prefill_seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    result_.prefill_bytes = uint64_t{flags_.tokens} * shape_.layers * shape_.kv_heads *
                            (shape_.key_dim + shape_.value_dim) * sizeof(uint16_t);
  }

  void FindLastKeys() {
    std::vector<float> queries(size_t{shape_.query_heads} * shape_.key_dim);
    for (size_t i = 0; i < queries.size(); ++i) queries[i] = i % 2 == 0 ? 1.0F : -1.0F;
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      kvseek::TopKRequest request;
      request.items.push_back(
          {.session = session_, .layer = layer, .queries = kvseek::AsBytes(queries)});
      request.k = 1;
      const Clock::time_point begin = Clock::now();
      const auto found = Client(layer).TopK(request);
      if (layer == 0) result_.found_us = Micros(Clock::now() - begin);
      if (!found.ok()) Fail(found.status().ToString());
      for (const kvseek::Selection& selection : found->items[0].selections) {
        if (selection.positions.size() != 1 || selection.positions[0] != flags_.tokens - 1) {
          Fail(absl::StrCat("layer ", layer, ": the last key is not found"));
        }
      }
    }
  }

  /// Takes every layer to shortly before the end of a segment.
  void GoToSealing() {
    constexpr uint64_t kBefore = 32;
    auto left = static_cast<uint32_t>((2 * kSegmentTokens - kBefore - held_ % kSegmentTokens) %
                                      kSegmentTokens);
    while (left > 0) {
      const uint32_t tokens = std::min(left, flags_.chunk);
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        WaitFor(flags_.under_way - 1);
        Append(layer, tokens, chunks_[layer % kChunks]);
      }
      WaitFor(0);
      held_ += tokens;
      left -= tokens;
    }
  }

  void AppendStep(uint32_t step) {
    for (uint32_t layer = 0; flags_.apart && layer < shape_.layers; ++layer) {
      Append(layer, 1, chunks_[(layer + step) % kChunks]);
    }
    if (flags_.apart) return;
    std::vector<kvseek::LayerTensors> layers(shape_.layers);
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      const Chunk& chunk = chunks_[(layer + step) % kChunks];
      layers[layer] = {{chunk.keys.data(), size_t{shape_.kv_heads} * shape_.key_dim},
                       {chunk.values.data(), size_t{shape_.kv_heads} * shape_.value_dim}};
    }
    under_way_.fetch_add(1);
    clients_[0]->AppendLayersAsync(session_, 0, held_, 1, layers, kCall, Done());
  }

  /// Times of steps like the one that has brought the layers to `held` tokens.
  std::vector<double>& StepsLike(uint64_t held) {
    if (held % kSegmentTokens == 0) return result_.ending_us;
    return held % kSegmentTokens == kvseek::index::kSealDelay ? result_.sealing_us
                                                              : result_.steps_us;
  }

  void Decode() {
    for (uint32_t round = 0; round < flags_.rounds; ++round) {
      GoToSealing();
      for (uint32_t step = 0; step < flags_.steps; ++step) {
        const Clock::time_point ready = Clock::now() + std::chrono::microseconds(flags_.gap_us);
        while (Clock::now() < ready) {
        }
        const Clock::time_point begin = Clock::now();
        AppendStep(step);
        WaitFor(0);
        const double took = Micros(Clock::now() - begin);
        ++held_;
        StepsLike(held_).push_back(took);
      }
    }
  }

  const Flags& flags_;
  const kvseek::ModelShape shape_;
  std::vector<Chunk> chunks_;
  Chunk last_;
  std::vector<std::unique_ptr<KvClient>> clients_;
  kvseek::Session session_;
  uint64_t held_ = 0;  ///< tokens of every layer, once what is under way is answered
  std::atomic<uint32_t> under_way_{0};
  Result result_;
};

/// A daemon with room for the session, beside this program.
std::unique_ptr<kvseek::cli::DaemonProcess> StartDaemon(Flags& flags,
                                                        const kvseek::ModelShape& shape) {
  const kvseek::index::KvShape kv{.key_dim = static_cast<int>(shape.key_dim),
                                  .value_dim = static_cast<int>(shape.value_dim)};
  const uint64_t segments = flags.tokens / kSegmentTokens + flags.rounds + 2;
  const uint64_t memory =
      (segments * shape.layers * shape.kv_heads + 64) * kvseek::index::Segment::Bytes(kv);
  const std::string program =
      (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "kvseekd").string();
  const std::string spin = absl::StrCat(flags.connect.spin_us);
  auto daemon = kvseek::cli::DaemonProcess::Start(
      program, {"--log-level", "warn", "--memory", absl::StrCat(memory), "--prefault",
                absl::StrCat(flags.prefault ? memory : 0), "--workers", absl::StrCat(flags.workers),
                "--io-spin-us", spin, "--worker-spin-us", spin});
  if (!daemon.ok()) Fail(daemon.status().ToString());
  const std::string address = (*daemon)->address();  // unix:/path
  flags.connect.via = flags.transport + address.substr(address.find(':'));
  return *std::move(daemon);
}

Json TimesJson(const std::vector<double>& samples) {
  return {{"steps", samples.size()},
          {"p50_us", kvseek::cli::Percentile(samples, 0.5)},
          {"p99_us", kvseek::cli::Percentile(samples, 0.99)},
          {"max_us", kvseek::cli::Percentile(samples, 1.0)}};
}

void Print(const Flags& flags, const kvseek::ModelShape& shape, const Result& result) {
  if (flags.format == "json") {
    std::cout << Json{{"via", flags.connect.via},
                      {"layers", shape.layers},
                      {"kv_heads", shape.kv_heads},
                      {"head_dim", shape.key_dim},
                      {"tokens", flags.tokens},
                      {"chunk_tokens", flags.chunk},
                      {"under_way", flags.under_way},
                      {"connections", flags.connections},
                      {"prefault", flags.prefault},
                      {"apart", flags.apart},
                      {"prefill",
                       {{"seconds", result.prefill_seconds},
                        {"bytes", result.prefill_bytes},
                        {"gigabytes_per_second", result.GigabytesPerSecond()},
                        {"first_search_us", result.found_us}}},
                      {"decode_step", TimesJson(result.steps_us)},
                      {"ending_step", TimesJson(result.ending_us)},
                      {"sealing_step", TimesJson(result.sealing_us)}}
                     .dump(2)
              << "\n";
    return;
  }
  using kvseek::cli::Digits;
  const auto times = [](const std::vector<double>& samples) {
    return absl::StrCat(Digits(kvseek::cli::Percentile(samples, 0.5)), ", ",
                        Digits(kvseek::cli::Percentile(samples, 0.99)), ", ",
                        Digits(kvseek::cli::Percentile(samples, 1.0)), " us");
  };
  kvseek::cli::Table table({absl::StrCat("append, ", flags.connect.via), ""});
  table.Add({"layers, KV heads, dim",
             absl::StrCat(shape.layers, ", ", shape.kv_heads, ", ", shape.key_dim)});
  table.Add({"prefill",
             absl::StrCat(flags.tokens, " tokens, ",
                          kvseek::cli::ShortBytes(static_cast<double>(result.prefill_bytes)))});
  table.Add({"prefill takes", Digits(result.prefill_seconds) + " s"});
  table.Add({"bf16 K and V", Digits(result.GigabytesPerSecond()) + " GB/s"});
  table.Add({"first search after it", Digits(result.found_us) + " us"});
  table.Add({"decode step p50, p99, max", times(result.steps_us)});
  table.Add({"step that ends segments p50, p99, max", times(result.ending_us)});
  table.Add({"step that they are due in p50, p99, max", times(result.sealing_us)});
  std::cout << table.Text();
}

kvseek::ModelShape ShapeOf(const Flags& flags) {
  kvseek::ModelShape shape{.layers = 32, .kv_heads = 8, .query_heads = 32};
  if (flags.shape == "qwen2.5-1.5b") shape = {.layers = 28, .kv_heads = 2, .query_heads = 12};
  if (flags.layers != 0) shape.layers = flags.layers;
  return shape;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("A prefill, and decode steps, appended from another process.", "append_bench");
  Flags flags;
  kvseek::cli::AddConnectFlags(app, flags.connect, /*required=*/false);
  kvseek::cli::AddSpinFlag(app, flags.connect);
  app.add_option("--transport", flags.transport, "To the daemon started here")
      ->check(CLI::IsMember({"unix", "shm"}));
  app.add_option("--shape", flags.shape)->check(CLI::IsMember({"llama3-8b", "qwen2.5-1.5b"}));
  app.add_option("--layers", flags.layers, "Instead of the shape's")->check(CLI::Range(1, 512));
  app.add_option("--tokens", flags.tokens, "Of the prefill")->check(CLI::Range(1, 1 << 24));
  app.add_option("--chunk", flags.chunk, "Tokens of an append")->check(CLI::Range(1, 8192));
  app.add_option("--under-way", flags.under_way, "Appends at once")->check(CLI::Range(1, 256));
  app.add_option("--connections", flags.connections)->check(CLI::Range(1, 16));
  app.add_option("--rounds", flags.rounds, "Of decode steps, each with a sealing one");
  app.add_option("--steps", flags.steps, "Of a round")->check(CLI::Range(128, 992));
  app.add_option("--gap-us", flags.gap_us, "Between steps");
  app.add_option("--workers", flags.workers, "Of the daemon started here; 0: one a core");
  app.add_flag("--apart", flags.apart, "A decode step is a request for each layer");
  app.add_flag("--prefault", flags.prefault, "The daemon started here touches its memory first");
  app.add_option("--format", flags.format)->check(CLI::IsMember({"text", "json"}));
  CLI11_PARSE(app, argc, argv);
  const kvseek::ModelShape shape = ShapeOf(flags);
  std::unique_ptr<kvseek::cli::DaemonProcess> daemon;
  if (flags.connect.via.empty()) daemon = StartDaemon(flags, shape);
  Print(flags, shape, Bench(flags, shape).Run());
  if (daemon != nullptr) {
    if (const absl::Status stopped = daemon->Stop(); !stopped.ok()) Fail(stopped.ToString());
  }
  return 0;
}
