#include "tests/client/decoder/decoder_fixture.h"

#include <spawn.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <limits>
#include <thread>

extern char** environ;

namespace kvseek::test {

// ---- DaemonChild

void DaemonChild::Start() {
  const auto program = std::filesystem::read_symlink("/proc/self/exe").replace_filename("kvseekd");
  std::vector<std::string> words{program.string(), "--listen", address(), "--workers", "2"};
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  ASSERT_EQ(posix_spawn(&pid_, program.c_str(), nullptr, nullptr, arguments.data(), environ), 0)
      << program;
  for (int i = 0; i < 100; ++i) {
    if (KvClient::Connect({.address = address()}).ok()) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  FAIL() << "kvseekd does not serve at " << address();
}

void DaemonChild::Kill() {
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

void DaemonChild::Pause() {
  kill(pid_, SIGSTOP);
  int status = 0;
  waitpid(pid_, &status, WUNTRACED);
}

void DaemonChild::Resume() { kill(pid_, SIGCONT); }

// ---- DecoderTest

/// A layer's tensors on the device.
struct DecoderTest::LayerRows {
  explicit LayerRows(const std::vector<uint16_t>& host) : count(host.size()) {
    EXPECT_EQ(cudaMalloc(&data, std::max<size_t>(16, count * sizeof(uint16_t))), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data, host.data(), count * sizeof(uint16_t), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  ~LayerRows() { cudaFree(data); }
  LayerRows(const LayerRows&) = delete;
  LayerRows& operator=(const LayerRows&) = delete;
  std::vector<uint16_t> Download() const {
    std::vector<uint16_t> host(count);
    EXPECT_EQ(cudaMemcpy(host.data(), data, count * sizeof(uint16_t), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return host;
  }
  size_t count;
  void* data = nullptr;
};

void DecoderTest::SetUp() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    GTEST_SKIP() << "no CUDA device";
  }
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  options_.shape = {.layers = 2, .kv_heads = 2, .query_heads = 6, .key_dim = 64, .value_dim = 64};
  options_.sequences_max = 4;
  options_.sink_tokens = 32;
  options_.recent_tokens = 128;
  options_.block_tokens = 32;
  options_.rows = 48;
  options_.cache_rows = 96;
  options_.prefill_chunk_tokens = 256;
  options_.layer_deadline = std::chrono::seconds(10);
  options_.search.index = IndexKind::kExact;
}

void DecoderTest::TearDown() {
  decoder_.reset();
  if (stream_ == nullptr) return;
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  cudaStreamDestroy(stream_);
  if (HasFailure()) ADD_FAILURE() << "seed " << seed_;
}

void DecoderTest::Create(const std::vector<std::string>& addresses) {
  std::vector<ClientOptions> daemons;
  for (const std::string& address : addresses) daemons.push_back({.address = address});
  auto decoder = SparseDecoder::Create(options_, daemons);
  ASSERT_TRUE(decoder.ok()) << decoder.status();
  decoder_ = *std::move(decoder);
}

Sequence DecoderTest::Open() {
  const auto id = decoder_->Open();
  EXPECT_TRUE(id.ok()) << id.status();
  Sequence sequence;
  sequence.id = id.ok() ? *id : 0;
  sequence.keys.resize(options_.shape.layers);
  sequence.values.resize(options_.shape.layers);
  return sequence;
}

uint16_t DecoderTest::Element(float scale) {
  const float value = scale * Normal();
  return options_.shape.dtype == DType::kBf16 ? kernels::FloatToBf16(value)
                                              : kernels::FloatToFp16(value);
}

absl::Status DecoderTest::Prefill(Sequence& sequence, uint64_t tokens) {
  const ModelShape& shape = options_.shape;
  absl::Status status = decoder_->BeginPrefill(sequence.id, tokens);
  for (uint32_t layer = 0; layer < shape.layers && status.ok(); ++layer) {
    std::vector<uint16_t> keys(tokens * shape.kv_heads * shape.key_dim);
    std::vector<uint16_t> values(tokens * shape.kv_heads * shape.value_dim);
    for (uint16_t& element : keys) element = Element(1.0F);
    for (uint16_t& element : values) element = Element(1.0F);
    const LayerRows device_keys(keys), device_values(values);
    PrefillTensors tensors;
    tensors.keys = device_keys.data;
    tensors.values = device_values.data;
    const size_t query_row = size_t{shape.query_heads} * shape.key_dim;
    std::vector<uint16_t> queries;
    if (!options_.open.build.empty()) {
      queries.assign(tokens * (query_row + 8), 0x7fff);
      for (size_t t = 0; t < tokens; t += 32) {
        const auto row = queries.begin() + static_cast<ptrdiff_t>(t * (query_row + 8));
        std::generate_n(row, query_row, [this] { return Element(1.0F); });
      }
    }
    const LayerRows device_queries(queries);
    if (!queries.empty()) tensors.queries = device_queries.data;
    tensors.query_token_stride = static_cast<int64_t>(query_row) + 8;
    status = decoder_->PrefillLayer(sequence.id, layer, tensors, stream_);
    auto& all_keys = sequence.keys[layer];
    auto& all_values = sequence.values[layer];
    all_keys.insert(all_keys.end(), keys.begin(), keys.end());
    all_values.insert(all_values.end(), values.begin(), values.end());
  }
  if (status.ok()) sequence.tokens += tokens;
  return status;
}

double DecoderTest::Step(const std::vector<Sequence*>& batch, uint32_t query_tokens,
                         const Visible& visible) {
  const ModelShape& shape = options_.shape;
  std::vector<SequenceId> ids;
  for (const Sequence* sequence : batch) ids.push_back(sequence->id);
  step_status_ = decoder_->BeginStep(ids, query_tokens, stream_);
  if (!step_status_.ok()) return std::numeric_limits<double>::infinity();
  for (Sequence* sequence : batch) sequence->tokens += query_tokens;

  double worst = 0.0;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    const size_t tokens = batch.size() * query_tokens;
    std::vector<uint16_t> queries(tokens * shape.query_heads * shape.key_dim);
    std::vector<uint16_t> keys, values;
    for (uint16_t& element : queries) element = Element(2.0F);
    for (Sequence* sequence : batch) {
      for (uint32_t i = 0; i < query_tokens * shape.kv_heads * shape.key_dim; ++i) {
        keys.push_back(Element(1.0F));
        sequence->keys[layer].push_back(keys.back());
      }
      for (uint32_t i = 0; i < query_tokens * shape.kv_heads * shape.value_dim; ++i) {
        values.push_back(Element(1.0F));
        sequence->values[layer].push_back(values.back());
      }
    }
    const LayerRows device_queries(queries), device_keys(keys), device_values(values);
    const LayerRows out(
        std::vector<uint16_t>(tokens * shape.query_heads * shape.value_dim, 0xffff));
    step_status_ = decoder_->Attend(layer, device_queries.data, device_keys.data,
                                    device_values.data, out.data, stream_);
    if (!step_status_.ok()) return std::numeric_limits<double>::infinity();
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    const std::vector<uint16_t> result = out.Download();
    for (size_t b = 0; b < batch.size(); ++b) {
      const size_t first = b * query_tokens * shape.query_heads;
      worst = std::max(
          worst, WorstError(*batch[b], layer, query_tokens, queries.data() + first * shape.key_dim,
                            result.data() + first * shape.value_dim, visible));
    }
  }
  return worst;
}

double DecoderTest::WorstError(const Sequence& sequence, uint32_t layer, uint32_t query_tokens,
                               const uint16_t* queries, const uint16_t* out,
                               const Visible& visible) const {
  const ModelShape& shape = options_.shape;
  double worst = 0.0;
  for (uint32_t t = 0; t < query_tokens; ++t) {
    const uint64_t position = sequence.tokens - query_tokens + t;
    for (uint32_t head = 0; head < shape.query_heads; ++head) {
      const size_t row = size_t{t} * shape.query_heads + head;
      const double error = HeadError(sequence, layer, position, head, queries + row * shape.key_dim,
                                     out + row * shape.value_dim, visible);
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
  }
  return worst;
}

double DecoderTest::Value(uint16_t bits) const {
  return options_.shape.dtype == DType::kBf16 ? kernels::Bf16ToFloat(bits)
                                              : kernels::Fp16ToFloat(bits);
}

double DecoderTest::HeadError(const Sequence& sequence, uint32_t layer, uint64_t query_position,
                              uint32_t query_head, const uint16_t* query, const uint16_t* out,
                              const Visible& visible) const {
  const ModelShape& shape = options_.shape;
  const uint32_t kv_head = query_head / shape.Group();
  std::vector<double> expected(shape.value_dim, 0.0);
  double sum = 0.0;
  for (uint64_t position = 0; position <= query_position; ++position) {
    if (!visible(position)) continue;
    const size_t row = position * shape.kv_heads + kv_head;
    const uint16_t* const key = sequence.keys[layer].data() + row * shape.key_dim;
    const uint16_t* const value = sequence.values[layer].data() + row * shape.value_dim;
    double dot = 0.0;
    for (uint32_t d = 0; d < shape.key_dim; ++d) dot += Value(query[d]) * Value(key[d]);
    const double weight = std::exp(dot / std::sqrt(static_cast<double>(shape.key_dim)));
    sum += weight;
    for (uint32_t d = 0; d < shape.value_dim; ++d) expected[d] += weight * Value(value[d]);
  }
  double largest = 0.0;
  double error = 0.0;
  for (uint32_t d = 0; d < shape.value_dim; ++d) {
    expected[d] /= sum;
    largest = std::max(largest, std::abs(expected[d]));
    const double difference = std::abs(Value(out[d]) - expected[d]);
    if (std::isnan(difference)) return difference;
    error = std::max(error, difference);
  }
  return error / largest;
}

}  // namespace kvseek::test
