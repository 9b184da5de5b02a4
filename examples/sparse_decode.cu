// One decode step of one layer with kvseek, as an inference engine would do it.
//
//   kvseekd --listen unix:/tmp/kvseek.sock &
//   sparse_decode unix:/tmp/kvseek.sock
//
// The GPU keeps the steady zone, the first and the most recent tokens; the daemon holds all of
// them. The step attends to the steady zone on the GPU and meanwhile asks the daemon for the keys
// that matter in the range between, with their rows and with the attention state of all others
// there; then it attends to the rows, and merges. The result is compared with full attention in
// double precision. Exit status 1 if it is off.
#include <chrono>
#include <tuple>

#include "client/kv_client.h"
#include "examples/decode_support.h"
#include "kernels/cuda/attention.h"

namespace kvseek::examples {
namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;

constexpr int kTokens = 16384;
constexpr int kKvHeads = 8;
constexpr int kGroup = 4;
constexpr int kHeads = kKvHeads * kGroup;
constexpr int kDim = 128;
constexpr float kScale = 0.088388348F;  // 1 / sqrt(kDim)
constexpr int kSink = 16;
constexpr int kRecent = 512;
constexpr int kChosen = 256;  // keys of each KV head that the daemon returns
constexpr int kParts = 3;     // states to merge: the steady zone's, the chosen rows', the rest's
constexpr int kAppendTokens = 2048;
constexpr int kSteps = 5;

// Up to rows_max rows of each KV head: (kKvHeads, rows_max, kDim).
struct Rows {
  explicit Rows(int rows) : rows_max(rows), keys(kKvHeads * rows * kDim), values(keys.count) {}

  void Add(int kv_head, const uint16_t* key_rows, const uint16_t* value_rows, size_t rows) {
    const size_t offset = static_cast<size_t>(kv_head * rows_max + counts.host[kv_head]) * kDim;
    std::copy_n(key_rows, rows * kDim, keys.host + offset);
    std::copy_n(value_rows, rows * kDim, values.host + offset);
    counts.host[kv_head] += static_cast<int32_t>(rows);
  }
  void Upload(cudaStream_t stream) {
    keys.Upload(stream);
    values.Upload(stream);
    counts.Upload(stream);
  }

  int rows_max;
  Mirror<uint16_t> keys, values;
  Mirror<int32_t> counts{kKvHeads};
};

struct Decoder {
  cudaStream_t stream = nullptr;
  Rows steady{kSink + kRecent};
  Rows chosen{kChosen};
  Mirror<float> queries{kHeads * kDim};          // for the daemon
  Mirror<uint16_t> bf16_queries{kHeads * kDim};  // the same, for the GPU
  Mirror<unsigned char> workspace{kernels::cuda::AttendWorkspaceBytes(kKvHeads, 1, kGroup, kDim)};
  Mirror<float> outs{kParts * kHeads * kDim};
  Mirror<float> lses{kParts * kHeads};
  Mirror<float> out{kHeads * kDim};
  Mirror<float> lse{kHeads};
};

// Attends to `rows`; the state is part `part`.
void AttendRows(Decoder& decoder, const Rows& rows, int part) {
  kernels::cuda::KvPages pages;
  pages.pool.keys = rows.keys.device;
  pages.pool.values = rows.values.device;
  pages.pool.kv_heads = 1;
  pages.pool.page_tokens = rows.rows_max;
  pages.pool.key_dim = kDim;
  pages.pool.value_dim = kDim;
  pages.counts = rows.counts.device;
  pages.sequences = kKvHeads;
  kernels::cuda::PageQueries queries;
  queries.queries = decoder.bf16_queries.device;
  queries.group = kGroup;
  queries.softmax_scale = kScale;
  Must("AttendPages",
       AttendPages(pages, queries, {decoder.workspace.device, decoder.workspace.count},
                   decoder.outs.device + part * kHeads * kDim, decoder.lses.device + part * kHeads,
                   decoder.stream));
}

// Attention of decoder.queries over all tokens of layer 0, into decoder.out. Returns what it waited
// for the daemon.
Milliseconds DecodeStep(Decoder& decoder, KvClient& client, const Session& session,
                        const SearchOptions& options) {
  decoder.bf16_queries.Upload(decoder.stream);
  AttendRows(decoder, decoder.steady, 0);  // runs while the daemon searches

  TopKRequest request;
  QueryItem& item = request.items.emplace_back();
  item.session = session;
  item.queries = AsBytes(absl::MakeConstSpan(decoder.queries.host, decoder.queries.count));
  item.range_begin = kSink;
  item.range_end = {kTokens - kRecent};
  request.options = options;
  request.k = kChosen;
  const auto asked = Clock::now();
  const SearchResponse response = Must("TopK", client.TopK(request));
  const Milliseconds waited = Clock::now() - asked;

  const ItemResult& answer = response.items.at(0);
  std::fill_n(decoder.chosen.counts.host, kKvHeads, 0);
  for (int head = 0; head < kKvHeads; ++head) {
    const Selection& selection = answer.selections.at(head);
    decoder.chosen.Add(head, selection.keys.data(), selection.values.data(),
                       selection.positions.size());
  }
  decoder.chosen.Upload(decoder.stream);
  AttendRows(decoder, decoder.chosen, 1);

  constexpr size_t kRest = 2 * kHeads;
  std::copy(answer.out.begin(), answer.out.end(), decoder.outs.host + kRest * kDim);
  std::copy(answer.lse.begin(), answer.lse.end(), decoder.lses.host + kRest);
  decoder.outs.Upload(decoder.stream, kRest * kDim);
  decoder.lses.Upload(decoder.stream, kRest);
  const kernels::cuda::StateList states{decoder.outs.device, decoder.lses.device, kParts};
  Must("MergeStates",
       kernels::cuda::MergeStates(&states, 1, kHeads, kDim, decoder.out.device,
                                  kernels::DType::kFp32, decoder.lse.device, decoder.stream));
  decoder.out.Download(decoder.stream);
  Must("step", cudaStreamSynchronize(decoder.stream));
  return waited;
}

// Gives the daemon the whole layer, and the GPU its steady zone.
void Prefill(const Layer& layer, KvClient& client, const Session& session, Decoder& decoder) {
  const auto keys = absl::MakeConstSpan(layer.keys);
  const auto values = absl::MakeConstSpan(layer.values);
  for (int start = 0; start < kTokens; start += kAppendTokens) {
    const size_t row = layer.Row(start, 0);
    const size_t count = layer.Row(kAppendTokens, 0);
    Must("append", client.Append(session, /*layer=*/0, start, kAppendTokens,
                                 keys.subspan(row, count), values.subspan(row, count)));
  }
  for (int token = 0; token < kTokens; ++token) {
    if (token >= kSink && token < kTokens - kRecent) continue;
    for (int head = 0; head < kKvHeads; ++head) {
      const size_t row = layer.Row(token, head);
      decoder.steady.Add(head, layer.keys.data() + row, layer.values.data() + row, 1);
    }
  }
  decoder.steady.Upload(decoder.stream);
  std::copy(layer.queries.begin(), layer.queries.end(), decoder.queries.host);
  std::transform(layer.queries.begin(), layer.queries.end(), decoder.bf16_queries.host,
                 kernels::FloatToBf16);
  decoder.workspace.Upload(decoder.stream);  // zeros
}

bool Run(const std::string& address) {
  ClientOptions connection;
  connection.address = address;
  const auto client = Must("connect", KvClient::Connect(connection));
  ModelShape shape;
  shape.kv_heads = kKvHeads;
  shape.query_heads = kHeads;
  shape.key_dim = shape.value_dim = kDim;
  const Session session = Must("open", client->Open(shape, {}));
  Decoder decoder;
  Must("cudaStreamCreate", cudaStreamCreate(&decoder.stream));
  const Layer layer(kTokens, kKvHeads, kGroup, kDim);
  Prefill(layer, *client, session, decoder);
  const std::vector<double> expected = FullAttention(layer, kScale);

  bool is_good = true;
  for (const auto& [name, index, tolerance] :
       {std::tuple("exact", IndexKind::kExact, 1e-3), {"ladder", IndexKind::kLadder, 0.05}}) {
    SearchOptions options;
    options.index = index;
    Milliseconds step_time{}, waited{};
    for (int step = 0; step < kSteps; ++step) {  // the first ones warm up
      const auto begun = Clock::now();
      waited = DecodeStep(decoder, *client, session, options);
      step_time = Clock::now() - begun;
    }
    const double error = WorstError(decoder.out.host, expected, kDim);
    std::printf(
        "%-6s: worst error of a head %.1e, %.0e allowed; step %.2f ms, %.2f ms of it waiting for "
        "the daemon\n",
        name, error, tolerance, step_time.count(), waited.count());
    is_good = is_good && error <= tolerance;
  }
  Must("cudaStreamDestroy", cudaStreamDestroy(decoder.stream));
  if (const absl::Status status = client->Close(session); !status.ok())
    Fail("close", status.ToString());
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
