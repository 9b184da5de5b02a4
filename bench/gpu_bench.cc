// The GPU kernels against what the same run measures of the hardware: attention over pages, merging
// and packing against the bandwidth of device memory and of the bus. Checks results first.
//
//   gpu_bench [--quick] [--filter REGEX] [--json FILE]
#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <regex>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "tests/kernels/reference.h"

namespace kvseek::bench {
namespace {

using kernels::DType;
using kernels::cuda::AttendWorkspace;
using kernels::cuda::KvPages;
using kernels::cuda::PagePool;
using kernels::cuda::PageQueries;
using kernels::cuda::StateList;

constexpr int kKvHeads = 8;
constexpr size_t kPoolBytes = size_t{64} * kKvHeads * 16384 * 256;  // of keys, and of values
constexpr size_t kHostBytes = size_t{256} << 20;
constexpr size_t kCopyBytes = size_t{1} << 30;
constexpr size_t kColdBytes = size_t{400} << 20;  // between two uses of the same rows: 8 times L2
constexpr int kRepeats = 7;
constexpr double kTolerance = 1e-3;

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

void Must(const char* what, cudaError_t error) {
  if (error != cudaSuccess) Fail(std::string(what) + ": " + cudaGetErrorString(error));
}

// Device memory, or pinned host memory.
class Buffer {
 public:
  explicit Buffer(size_t bytes, bool is_pinned = false) : is_pinned_(is_pinned) {
    Must("allocate", is_pinned ? cudaHostAlloc(&data_, bytes, cudaHostAllocDefault)
                               : cudaMalloc(&data_, bytes));
  }
  ~Buffer() { is_pinned_ ? cudaFreeHost(data_) : cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  T* As(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }
  template <typename T>
  void Upload(const std::vector<T>& host) const {
    Must("upload", cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyDefault));
  }

 private:
  void* data_ = nullptr;
  bool is_pinned_;
};

// Median seconds of a call; `call` gets a running number, to rotate its data.
class Timer {
 public:
  explicit Timer(cudaStream_t stream) : stream_(stream) {
    Must("event", cudaEventCreate(&begin_));
    Must("event", cudaEventCreate(&end_));
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  double Median(const std::function<void(int)>& call) {
    int number = 0;
    Seconds(call, 2, number);
    const double once = Seconds(call, 3, number) / 3;
    const int calls = std::clamp(static_cast<int>(3e-3 / once), 3, 400);
    std::vector<double> seconds(kRepeats);
    for (double& time : seconds) time = Seconds(call, calls, number) / calls;
    std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
    return seconds[kRepeats / 2];
  }

 private:
  double Seconds(const std::function<void(int)>& call, int calls, int& number) {
    Must("record", cudaEventRecord(begin_, stream_));
    for (int i = 0; i < calls; ++i) call(number++);
    Must("record", cudaEventRecord(end_, stream_));
    Must("run", cudaEventSynchronize(end_));
    float milliseconds = 0;
    Must("time", cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds * 1e-3;
  }

  cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

struct AttendCase {
  int page_tokens;  // 0: contiguous rows; 1: a list of rows for each head
  int batch;
  int rows;
  int group = 4;
  int dim = 128;
  DType dtype = DType::kBf16;
  int tokens = 1;

  std::string Name() const {
    const std::string layout = page_tokens == 0   ? "contiguous"
                               : page_tokens == 1 ? "row list"
                                                  : "pages of " + std::to_string(page_tokens);
    return layout + ", " + kernels::DTypeName(dtype) + ", d " + std::to_string(dim) + ", G " +
           std::to_string(group) + ", tokens " + std::to_string(tokens) + ", batch " +
           std::to_string(batch) + ", rows " + std::to_string(rows);
  }
  size_t Bytes() const { return size_t{2} * batch * kKvHeads * rows * dim * 2; }
};

// Everything that the measurements share.
class Bench {
 public:
  // Measures lines only whose kind and name, as they are printed, match `filter`.
  explicit Bench(const std::string& filter) : filter_(filter) {
    const std::vector<uint16_t> tile =
        reference::RandomElements(random_(), size_t{16} << 20, 1.0F, DType::kBf16);
    Fill(keys_, tile, 0);
    Fill(values_, tile, 4242 * 8);
    Must("fill", cudaMemcpy(host_.As<void>(), keys_.As<void>(), kHostBytes, cudaMemcpyDefault));
    cudaDeviceProp properties;
    Must("properties", cudaGetDeviceProperties(&properties, 0));
    int driver = 0;
    int runtime = 0;
    Must("driver", cudaDriverGetVersion(&driver));
    Must("runtime", cudaRuntimeGetVersion(&runtime));
    report_ = {{"device", properties.name},
               {"multiprocessors", properties.multiProcessorCount},
               {"l2_bytes", properties.l2CacheSize},
               {"cuda_driver", driver},
               {"cuda_runtime", runtime},
               {"lines", nlohmann::ordered_json::array()}};
    std::printf("%s, CUDA driver %d, runtime %d\n", properties.name, driver, runtime);
  }
  ~Bench() { cudaStreamDestroy(stream_); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  void MeasureCopies() {
    hbm_ = 2 * kCopyBytes / Copy(values_.As<char>(), keys_.As<char>(), kCopyBytes);
    h2d_ = kHostBytes / Copy(values_.As<char>(), host_.As<char>(), kHostBytes);
    d2h_ = kHostBytes / Copy(host_.As<char>(), keys_.As<char>(), kHostBytes);
    report_["hbm_copy_gb_s"] = hbm_ * 1e-9;
    report_["host_to_device_gb_s"] = h2d_ * 1e-9;
    report_["device_to_host_gb_s"] = d2h_ * 1e-9;
    std::printf("copies: device %.0f GB/s (read and written), host to device %.1f, back %.1f\n\n",
                hbm_ * 1e-9, h2d_ * 1e-9, d2h_ * 1e-9);
  }

  void Attend(const AttendCase& shape);
  void Merge(int states, int heads, DType out_dtype);
  void MoveRows(int rows, bool is_into_pool, bool is_host);
  void PackTensor(int tokens, bool is_host);
  const nlohmann::ordered_json& report() const { return report_; }

 private:
  // The elements of `tile`, over and over, starting at `shift`.
  static void Fill(const Buffer& buffer, const std::vector<uint16_t>& tile, size_t shift) {
    for (size_t at = 0; at < kPoolBytes;) {
      const size_t from = at == 0 ? shift : 0;
      const size_t bytes = std::min((tile.size() - from) * 2, kPoolBytes - at);
      Must("fill", cudaMemcpy(buffer.As<char>(at), tile.data() + from, bytes, cudaMemcpyDefault));
      at += bytes;
    }
  }
  double Copy(void* to, const void* from, size_t bytes) {
    return timer_.Median(
        [&](int) { Must("copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_)); });
  }
  bool IsChosen(const std::string& kind, const std::string& name) const {
    return std::regex_search(kind + " " + name, filter_);
  }
  void Line(const std::string& kind, const std::string& name, size_t bytes, double seconds,
            const char* roof_name, double roof) {
    const double rate = bytes / seconds;
    std::printf("%-8s %-68s %9.2f us %8.1f GB/s  %4.2f of %s\n", kind.c_str(), name.c_str(),
                seconds * 1e6, rate * 1e-9, rate / roof, roof_name);
    report_["lines"].push_back({{"kind", kind},
                                {"name", name},
                                {"bytes", bytes},
                                {"us", seconds * 1e6},
                                {"gb_s", rate * 1e-9},
                                {"roof", roof_name},
                                {"of_roof", rate / roof}});
  }
  void CheckGroup(const AttendCase& shape, const std::vector<uint16_t>& queries,
                  const std::vector<int32_t>& numbers, int sequence, int head,
                  const std::vector<float>& out, const std::vector<float>& lse);

  static cudaStream_t NewStream() {
    cudaStream_t stream = nullptr;
    Must("stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }

  std::regex filter_;
  std::mt19937 random_{7};
  cudaStream_t stream_ = NewStream();
  Buffer keys_{kPoolBytes}, values_{kPoolBytes}, host_{kHostBytes, true};
  Timer timer_{stream_};
  double hbm_ = 0, h2d_ = 0, d2h_ = 0;  // bytes a second
  nlohmann::ordered_json report_;
};

// Compares a KV head's first token with the reference.
void Bench::CheckGroup(const AttendCase& shape, const std::vector<uint16_t>& queries,
                       const std::vector<int32_t>& numbers, int sequence, int head,
                       const std::vector<float>& out, const std::vector<float>& lse) {
  const int page_tokens = shape.page_tokens == 0 ? shape.rows : shape.page_tokens;
  const bool is_row_list = shape.page_tokens == 1;
  const size_t row_bytes = static_cast<size_t>(shape.dim) * 2;
  std::vector<uint16_t> keys(static_cast<size_t>(shape.rows) * shape.dim);
  std::vector<uint16_t> values(keys.size());
  for (int row = 0; row < shape.rows; row += page_tokens) {
    size_t from = 0;
    if (is_row_list) {
      from = numbers[(static_cast<size_t>(sequence) * kKvHeads + head) * shape.rows + row];
    } else {
      const size_t index = static_cast<size_t>(sequence) * (shape.rows / page_tokens);
      const size_t page = shape.page_tokens == 0 ? sequence : numbers[index + row / page_tokens];
      from = (page * kKvHeads + head) * page_tokens;
    }
    const size_t at = static_cast<size_t>(row) * shape.dim;
    Must("read", cudaMemcpy(keys.data() + at, keys_.As<char>(from * row_bytes),
                            page_tokens * row_bytes, cudaMemcpyDefault));
    Must("read", cudaMemcpy(values.data() + at, values_.As<char>(from * row_bytes),
                            page_tokens * row_bytes, cudaMemcpyDefault));
  }
  const size_t first =
      (static_cast<size_t>(sequence) * shape.tokens * kKvHeads + head) * shape.group;
  std::vector<float> floats(static_cast<size_t>(shape.group) * shape.dim);
  for (size_t i = 0; i < floats.size(); ++i) {
    floats[i] = kernels::LoadElement(queries.data(), shape.dtype, first * shape.dim + i);
  }
  std::vector<double> scores = reference::Scores(floats.data(), shape.group, keys.data(),
                                                 shape.dtype, shape.rows, shape.dim);
  for (double& score : scores) score /= std::sqrt(static_cast<double>(shape.dim));
  const auto expected =
      reference::Attend(scores, shape.group, values.data(), shape.dtype, shape.rows, shape.dim);
  const auto error = reference::Compare(expected, out.data() + first * shape.dim, &lse[first]);
  if (!(error.out <= kTolerance && error.lse <= kTolerance)) {
    Fail(shape.Name() + ": error " + std::to_string(error.out));
  }
}

void Bench::Attend(const AttendCase& shape) {
  if (!IsChosen("attend", shape.Name())) return;
  const bool is_row_list = shape.page_tokens == 1;
  const int sequences = is_row_list ? shape.batch * kKvHeads : shape.batch;
  const int kv_heads = is_row_list ? 1 : kKvHeads;
  const int page_tokens = shape.page_tokens == 0 ? shape.rows : shape.page_tokens;
  const int pages_max = shape.rows / page_tokens;
  const size_t page_bytes = size_t{2} * page_tokens * kv_heads * shape.dim;
  const size_t pages_of_call = static_cast<size_t>(sequences) * pages_max;
  const size_t variants =
      std::min(kPoolBytes / (pages_of_call * page_bytes), kColdBytes / shape.Bytes() + 1);
  std::vector<int32_t> numbers(shape.page_tokens == 0 ? 1 : kPoolBytes / page_bytes);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::shuffle(numbers.begin(), numbers.end(), random_);
  const size_t heads = static_cast<size_t>(shape.batch) * shape.tokens * kKvHeads * shape.group;
  const std::vector<uint16_t> query_rows =
      reference::RandomElements(random_(), heads * shape.dim, 1.0F, shape.dtype);
  const size_t workspace_bytes = kernels::cuda::AttendWorkspaceBytes(
      sequences * kv_heads, shape.tokens, shape.group, shape.dim);
  const Buffer device_numbers(numbers.size() * 4), counts(sequences * sizeof(int32_t)),
      device_queries(query_rows.size() * 2), workspace(workspace_bytes), out(heads * shape.dim * 4),
      lse(heads * 4);
  device_numbers.Upload(numbers);
  counts.Upload(std::vector<int32_t>(sequences, shape.rows));
  device_queries.Upload(query_rows);
  Must("zero", cudaMemset(workspace.As<void>(), 0, workspace_bytes));
  const PageQueries queries{device_queries.As<void>(), shape.tokens, shape.group,
                            1.0F / std::sqrt(static_cast<float>(shape.dim)), false};
  const auto call = [&](int number) {
    const size_t variant = number % variants;
    KvPages pages;
    pages.pool = {keys_.As<void>(), values_.As<void>(), kv_heads,   page_tokens,
                  shape.dim,        shape.dim,          shape.dtype};
    if (shape.page_tokens == 0) {
      pages.pool.keys = keys_.As<void>(variant * pages_of_call * page_bytes);
      pages.pool.values = values_.As<void>(variant * pages_of_call * page_bytes);
    } else {
      pages.pages = device_numbers.As<int32_t>(variant * pages_of_call * 4);
    }
    pages.counts = counts.As<int32_t>();
    pages.pages_max = pages_max;
    pages.sequences = sequences;
    Must("AttendPages",
         AttendPages(pages, queries, AttendWorkspace{workspace.As<void>(), workspace_bytes},
                     out.As<float>(), lse.As<float>(), stream_));
  };
  call(0);
  Must("AttendPages", cudaStreamSynchronize(stream_));
  std::vector<float> host_out(heads * shape.dim);
  std::vector<float> host_lse(heads);
  Must("read",
       cudaMemcpy(host_out.data(), out.As<void>(), heads * shape.dim * 4, cudaMemcpyDefault));
  Must("read", cudaMemcpy(host_lse.data(), lse.As<void>(), heads * 4, cudaMemcpyDefault));
  CheckGroup(shape, query_rows, numbers, 0, 1, host_out, host_lse);
  CheckGroup(shape, query_rows, numbers, shape.batch - 1, kKvHeads - 1, host_out, host_lse);
  Line("attend", shape.Name(), shape.Bytes(), timer_.Median(call), "HBM", hbm_);
}

void Bench::Merge(int states, int heads, DType out_dtype) {
  constexpr int kDim = 128;
  constexpr size_t kVariants = 4;
  const std::string name = std::to_string(states) + " states to " + kernels::DTypeName(out_dtype) +
                           ", heads " + std::to_string(heads) + ", d 128";
  if (!IsChosen("merge", name)) return;
  const size_t list_bytes = static_cast<size_t>(states) * heads * kDim * 4;
  const size_t out_bytes = static_cast<size_t>(heads) * kDim * kernels::DTypeBytes(out_dtype);
  const size_t lse_bytes = static_cast<size_t>(states) * heads * 4;
  const std::vector<float> tile = reference::RandomFloats(random_(), list_bytes / 4 / states, 1.0F);
  const Buffer outs(kVariants * list_bytes), lses(kVariants * lse_bytes),
      out(kVariants * out_bytes), lse(heads * sizeof(float));
  for (size_t at = 0; at < kVariants * list_bytes; at += tile.size() * 4) {
    Must("fill", cudaMemcpy(outs.As<char>(at), tile.data(), tile.size() * 4, cudaMemcpyDefault));
  }
  lses.Upload(reference::RandomFloats(random_(), kVariants * lse_bytes / 4, 2.0F));
  // Two lists, as a decode step has them: its own states, and those of the daemon.
  const auto call = [&](int number) {
    const size_t variant = number % kVariants;
    const auto* first_outs = outs.As<float>(variant * list_bytes);
    const auto* first_lses = lses.As<float>(variant * lse_bytes);
    const StateList lists[2] = {{first_outs, first_lses, states - 1},
                                {first_outs + (states - 1) * static_cast<size_t>(heads) * kDim,
                                 first_lses + (states - 1) * static_cast<size_t>(heads), 1}};
    Must("MergeStates",
         kernels::cuda::MergeStates(lists, 2, heads, kDim, out.As<void>(variant * out_bytes),
                                    out_dtype, lse.As<float>(), stream_));
  };
  call(0);
  Must("MergeStates", cudaStreamSynchronize(stream_));
  // All states of a head are the same, so they merge to themselves.
  std::vector<unsigned char> merged(out_bytes);
  Must("read", cudaMemcpy(merged.data(), out.As<void>(), out_bytes, cudaMemcpyDefault));
  for (size_t i = 0; i < tile.size(); ++i) {
    const float value = kernels::LoadElement(merged.data(), out_dtype, i);
    if (!(std::abs(value - tile[i]) <= 1e-2F * std::abs(tile[i]) + 1e-6F)) Fail("MergeStates");
  }
  const size_t bytes = list_bytes + lse_bytes + out_bytes + static_cast<size_t>(heads) * 4;
  Line("merge", name, bytes, timer_.Median(call), "HBM", hbm_);
}

// ScatterRows or PackRows of a row cache: each row goes to, or comes from, a random place.
void Bench::MoveRows(int rows, bool is_into_pool, bool is_host) {
  constexpr int kDim = 128;
  constexpr size_t kRowBytes = kDim * 2;
  constexpr size_t kPoolRows = kPoolBytes / kRowBytes;
  const std::string kind = is_into_pool ? "scatter" : "pack";
  const std::string name = std::to_string(rows) + " rows, d 128, " +
                           (is_into_pool ? "from " : "to ") +
                           (is_host ? "pinned memory" : "device memory");
  if (!IsChosen(kind, name)) return;
  const size_t bytes = rows * kRowBytes;
  const size_t variants = std::min(kHostBytes / (2 * bytes), kColdBytes / (2 * bytes) + 1);
  std::vector<int32_t> slots(variants * rows);
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i] = static_cast<int32_t>(i * (kPoolRows / slots.size()));
  }
  std::shuffle(slots.begin(), slots.end(), random_);
  const Buffer device_slots(slots.size() * 4), device_rows(is_host ? 16 : kHostBytes);
  device_slots.Upload(slots);
  if (!is_host) {
    Must("fill",
         cudaMemcpy(device_rows.As<void>(), host_.As<void>(), kHostBytes, cudaMemcpyDefault));
  }
  const PagePool pool{keys_.As<void>(), values_.As<void>(), 1, 1, kDim, kDim, DType::kBf16};
  const Buffer& rows_at = is_host ? host_ : device_rows;
  const auto call = [&](int number) {
    const size_t variant = number % variants;
    auto* keys = rows_at.As<void>(2 * bytes * variant);
    auto* values = rows_at.As<void>(2 * bytes * variant + bytes);
    const auto* numbers = device_slots.As<int32_t>(variant * rows * 4);
    Must("move", is_into_pool ? ScatterRows(keys, values, numbers, rows, 1, pool, stream_)
                              : PackRows(pool, numbers, rows, 0, 1, keys, values, stream_));
  };
  const double seconds = timer_.Median(call);
  std::vector<uint16_t> in_array(kDim), in_pool(kDim);
  Must("read", cudaMemcpy(in_array.data(), rows_at.As<char>(bytes), kRowBytes, cudaMemcpyDefault));
  Must("read", cudaMemcpy(in_pool.data(), values_.As<char>(slots[0] * kRowBytes), kRowBytes,
                          cudaMemcpyDefault));
  if (in_array != in_pool) Fail("MoveRows");
  // Within the device a byte is read and written.
  Line(kind, name, (is_host ? 2 : 4) * bytes, seconds,
       !is_host       ? "HBM"
       : is_into_pool ? "H2D"
                      : "D2H",
       !is_host       ? hbm_
       : is_into_pool ? h2d_
                      : d2h_);
}

// PackStrided of the keys in a fused projection's output.
void Bench::PackTensor(int tokens, bool is_host) {
  constexpr int kDim = 128;
  constexpr int64_t kTokenStride = (32 + 2 * kKvHeads) * kDim;
  const std::string name = std::to_string(tokens) + " tokens of 8 heads, strided, to " +
                           (is_host ? "pinned memory" : "device memory");
  if (!IsChosen("pack", name)) return;
  const size_t bytes = size_t{2} * tokens * kKvHeads * kDim;
  const size_t source_bytes = static_cast<size_t>(tokens) * kTokenStride * 2;
  const size_t variants = std::min(kPoolBytes / source_bytes, kHostBytes / bytes);
  const double seconds = timer_.Median([&](int number) {
    const size_t variant = number % variants;
    Must("PackStrided",
         kernels::cuda::PackStrided(
             keys_.As<void>(variant * source_bytes), kTokenStride, kDim, tokens, kKvHeads, kDim,
             is_host ? host_.As<void>(variant * bytes) : values_.As<void>(variant * bytes),
             stream_));
  });
  Line("pack", name, (is_host ? 1 : 2) * bytes, seconds, is_host ? "D2H" : "HBM",
       is_host ? d2h_ : hbm_);
}

void Run(bool is_quick, const std::string& filter, const std::string& json_path) {
  Bench bench(filter);
  bench.MeasureCopies();
  const std::vector<int> batches = is_quick ? std::vector<int>{16} : std::vector<int>{1, 16, 64};
  for (const int page_tokens : {16, 64, 1, 0}) {
    for (const int batch : batches) {
      for (const int rows : {512, 4096, 16384}) bench.Attend({page_tokens, batch, rows});
    }
  }
  bench.Attend({16, 1, 640});
  for (const int group : {1, 8, 16}) bench.Attend({16, 16, 4096, group});
  for (const int dim : {64, 256}) bench.Attend({16, 16, 4096, 4, dim});
  bench.Attend({16, 16, 4096, 4, 128, DType::kFp16});
  bench.Attend({16, 16, 4096, 4, 128, DType::kBf16, 4});
  for (const int states : {2, 3, 8}) bench.Merge(states, 65536, DType::kFp32);
  bench.Merge(3, 65536, DType::kBf16);
  bench.Merge(3, 32, DType::kBf16);
  for (const bool is_into_pool : {true, false}) {
    for (const int rows : {16, 512, 4096, 32768}) bench.MoveRows(rows, is_into_pool, true);
    bench.MoveRows(262144, is_into_pool, false);
  }
  for (const int tokens : {16, 2048}) bench.PackTensor(tokens, true);
  bench.PackTensor(16384, false);
  if (!json_path.empty()) {
    std::ofstream file(json_path);
    file << bench.report().dump(1) << "\n";
    if (!file) Fail("cannot write " + json_path);
  }
}

}  // namespace
}  // namespace kvseek::bench

int main(int argc, char** argv) {
  CLI::App app("The GPU kernels against the bandwidth of the same machine");
  bool is_quick = false;
  std::string filter;
  std::string json_path;
  app.add_flag("--quick", is_quick, "fewer shapes");
  app.add_option("--filter", filter, "only lines whose kind and name match REGEX (ECMAScript)")
      ->check([](const std::string& text) -> std::string {
        try {
          return std::regex(text), "";
        } catch (const std::regex_error& error) {
          return error.what();
        }
      });
  app.add_option("--json", json_path, "also write all numbers to FILE");
  CLI11_PARSE(app, argc, argv);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: no CUDA device");
    return 0;
  }
  kvseek::bench::Run(is_quick, filter, json_path);
  return 0;
}
