#include "cli/trace.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/safetensors.h"
#include "kernels/cpu/attention.h"

namespace kvseek::cli {
namespace {

using kernels::DType;

constexpr char kDecodeSuffix[] = ".q_decode";
constexpr char kPrefillSuffix[] = ".q_prefill";
constexpr char kPrefillPositions[] = "prefill_positions";
constexpr uint64_t kTokensMax = uint64_t{1} << 24;
constexpr uint64_t kStepsMax = uint64_t{1} << 20;
constexpr uint64_t kDimMax = 512;

struct Tensor {
  DType dtype = DType::kBf16;
  std::vector<uint64_t> shape;
  std::vector<uint8_t> bytes;
};

absl::Status WrongTensor(const SafeTensors& file, const std::string& name,
                         const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(file.path(), ": tensor \"", name, "\": ", what));
}

/// Reads a floating-point tensor of `rank` dimensions, `layout` says which; its last one is a
/// head_dim.
absl::StatusOr<Tensor> ReadTensor(SafeTensors& file, const std::string& name, size_t rank,
                                  const char* layout) {
  const absl::StatusOr<TensorInfo> info = file.Find(name);
  if (!info.ok()) return info.status();
  Tensor tensor;
  if (info->dtype == "BF16") {
    tensor.dtype = DType::kBf16;
  } else if (info->dtype == "F16") {
    tensor.dtype = DType::kFp16;
  } else if (info->dtype == "F32") {
    tensor.dtype = DType::kFp32;
  } else {
    return WrongTensor(file, name, absl::StrCat("dtype ", info->dtype, ", not BF16, F16 or F32"));
  }
  tensor.shape = info->shape;
  if (tensor.shape.size() != rank) {
    return WrongTensor(
        file, name,
        absl::StrCat("shape [", absl::StrJoin(tensor.shape, ", "), "] is not ", layout));
  }
  if (std::find(tensor.shape.begin(), tensor.shape.end(), 0U) != tensor.shape.end()) {
    return WrongTensor(file, name,
                       absl::StrCat("shape [", absl::StrJoin(tensor.shape, ", "), "] is empty"));
  }
  const uint64_t dim = tensor.shape.back();
  if (dim % 8 != 0 || dim > kDimMax) {
    return WrongTensor(file, name,
                       absl::StrCat("head_dim ", dim, " is not a multiple of 8 up to ", kDimMax));
  }
  absl::StatusOr<std::vector<uint8_t>> bytes = file.Read(name);
  if (!bytes.ok()) return bytes.status();
  tensor.bytes = *std::move(bytes);
  const auto count = static_cast<int64_t>(tensor.bytes.size() / DTypeBytes(tensor.dtype));
  const int64_t bad = kernels::FindBadElement(tensor.bytes.data(), tensor.dtype, count);
  if (bad >= 0) {
    return WrongTensor(file, name,
                       absl::StrCat("element ", bad, " is not finite or is larger than 65504"));
  }
  return tensor;
}

/// Rows as stored: bf16 and fp16 as they are, fp32 rounded to bf16.
std::vector<uint16_t> StoredRows(const Tensor& tensor) {
  const size_t count = tensor.bytes.size() / DTypeBytes(tensor.dtype);
  std::vector<uint16_t> rows(count);
  if (tensor.dtype != DType::kFp32) {
    std::memcpy(rows.data(), tensor.bytes.data(), tensor.bytes.size());
    return rows;
  }
  for (size_t i = 0; i < count; ++i) {
    rows[i] = kernels::FloatToBf16(kernels::LoadElement(tensor.bytes.data(), DType::kFp32, i));
  }
  return rows;
}

absl::Status LoadKeysAndValues(SafeTensors& file, HeadTrace& trace) {
  absl::StatusOr<Tensor> k = ReadTensor(file, "k", 2, "[tokens, head_dim]");
  if (!k.ok()) return k.status();
  absl::StatusOr<Tensor> v = ReadTensor(file, "v", 2, "[tokens, head_dim]");
  if (!v.ok()) return v.status();
  if (k->shape[0] > kTokensMax) {
    return WrongTensor(file, "k", absl::StrCat("more than ", kTokensMax, " tokens"));
  }
  if (v->shape[0] != k->shape[0]) {
    return WrongTensor(file, "v", absl::StrCat(v->shape[0], " tokens, but k has ", k->shape[0]));
  }
  if (v->dtype != k->dtype) return WrongTensor(file, "v", "dtype differs from k's");
  trace.rounded = k->dtype == DType::kFp32;
  trace.dtype = trace.rounded ? DType::kBf16 : k->dtype;
  trace.tokens = static_cast<int64_t>(k->shape[0]);
  trace.key_dim = static_cast<int>(k->shape[1]);
  trace.value_dim = static_cast<int>(v->shape[1]);
  trace.keys = StoredRows(*k);
  trace.values = StoredRows(*v);
  return absl::OkStatus();
}

/// Reads queries (count, group, key_dim) of a head whose keys are known.
absl::StatusOr<Tensor> ReadQueries(SafeTensors& file, const std::string& name,
                                   const HeadTrace& trace) {
  absl::StatusOr<Tensor> q = ReadTensor(file, name, 3, "[steps, group, head_dim]");
  if (!q.ok()) return q;
  if (q->shape[0] > kStepsMax) {
    return WrongTensor(file, name, absl::StrCat("more than ", kStepsMax, " steps"));
  }
  if (q->shape[1] > static_cast<uint64_t>(index::kMaxGroup)) {
    return WrongTensor(file, name,
                       absl::StrCat("group ", q->shape[1], " is over ", index::kMaxGroup));
  }
  if (q->shape[2] != static_cast<uint64_t>(trace.key_dim)) {
    return WrongTensor(file, name,
                       absl::StrCat("head_dim ", q->shape[2], ", but k has ", trace.key_dim));
  }
  return q;
}

std::vector<float> FloatElements(const Tensor& tensor) {
  std::vector<float> elements(tensor.bytes.size() / DTypeBytes(tensor.dtype));
  for (size_t i = 0; i < elements.size(); ++i) {
    elements[i] = kernels::LoadElement(tensor.bytes.data(), tensor.dtype, i);
  }
  return elements;
}

absl::Status LoadDecodeQueries(SafeTensors& file, HeadTrace& trace) {
  const absl::StatusOr<Tensor> q = ReadQueries(file, trace.name + kDecodeSuffix, trace);
  if (!q.ok()) return q.status();
  trace.steps = static_cast<int>(q->shape[0]);
  trace.group = static_cast<int>(q->shape[1]);
  trace.queries = FloatElements(*q);
  return absl::OkStatus();
}

absl::Status LoadPrefillPositions(SafeTensors& file, uint64_t count, HeadTrace& trace) {
  const absl::StatusOr<TensorInfo> info = file.Find(kPrefillPositions);
  if (!info.ok()) return info.status();
  if (info->dtype != "I64" || info->shape != std::vector<uint64_t>{count}) {
    return WrongTensor(file, kPrefillPositions, absl::StrCat("not I64 [", count, "]"));
  }
  const absl::StatusOr<std::vector<uint8_t>> bytes = file.Read(kPrefillPositions);
  if (!bytes.ok()) return bytes.status();
  trace.prefill_positions.resize(count);
  std::memcpy(trace.prefill_positions.data(), bytes->data(), bytes->size());
  for (const int64_t position : trace.prefill_positions) {
    if (position < 0 || position >= trace.tokens) {
      return WrongTensor(file, kPrefillPositions,
                         absl::StrCat("position ", position, " is not stored"));
    }
  }
  return absl::OkStatus();
}

/// A head without prefill queries is fine.
absl::Status LoadPrefillQueries(SafeTensors& file, HeadTrace& trace) {
  const std::string name = trace.name + kPrefillSuffix;
  if (absl::IsNotFound(file.Find(name).status())) return absl::OkStatus();
  const absl::StatusOr<Tensor> q = ReadQueries(file, name, trace);
  if (!q.ok()) return q.status();
  if (q->shape[1] != static_cast<uint64_t>(trace.group)) {
    return WrongTensor(file, name,
                       absl::StrCat("group ", q->shape[1], ", but decode has ", trace.group));
  }
  trace.prefill_queries = FloatElements(*q);
  return LoadPrefillPositions(file, q->shape[0], trace);
}

}  // namespace

absl::StatusOr<HeadTrace> LoadHeadTrace(const std::string& kv_path, const std::string& queries_path,
                                        const std::string& head) {
  HeadTrace trace;
  trace.name = head;
  absl::StatusOr<SafeTensors> kv = SafeTensors::Open(kv_path);
  if (!kv.ok()) return kv.status();
  absl::StatusOr<SafeTensors> queries = SafeTensors::Open(queries_path);
  if (!queries.ok()) return queries.status();
  if (absl::Status status = LoadKeysAndValues(*kv, trace); !status.ok()) return status;
  if (absl::Status status = LoadDecodeQueries(*queries, trace); !status.ok()) return status;
  if (absl::Status status = LoadPrefillQueries(*queries, trace); !status.ok()) return status;
  trace.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(trace.key_dim)));
  return trace;
}

absl::StatusOr<std::vector<std::string>> ListHeads(const std::string& queries_path) {
  const absl::StatusOr<SafeTensors> file = SafeTensors::Open(queries_path);
  if (!file.ok()) return file.status();
  std::vector<std::string> heads;
  const std::string suffix = kDecodeSuffix;
  for (const auto& [name, info] : file->tensors()) {
    if (name.size() > suffix.size() && name.ends_with(suffix)) {
      heads.push_back(name.substr(0, name.size() - suffix.size()));
    }
  }
  return heads;
}

HeadTrace OneQueryHead(const HeadTrace& trace, int head) {
  HeadTrace one = trace;
  absl::StrAppend(&one.name, ".q", head);
  one.group = 1;
  one.queries.clear();
  for (int step = 0; step < trace.steps; ++step) {
    const float* const query =
        trace.StepQueries(step) + static_cast<ptrdiff_t>(head) * trace.key_dim;
    one.queries.insert(one.queries.end(), query, query + trace.key_dim);
  }
  one.prefill_positions.clear();
  for (const int64_t position : trace.prefill_positions) {
    one.prefill_positions.insert(one.prefill_positions.end(), static_cast<size_t>(trace.group),
                                 position);
  }
  return one;
}

std::vector<int> SpreadSteps(int steps, int count) {
  if (count <= 0 || count > steps) count = steps;
  std::vector<int> chosen(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    chosen[static_cast<size_t>(i)] = static_cast<int>(static_cast<int64_t>(i) * steps / count);
  }
  return chosen;
}

StoredHead::StoredHead(const HeadTrace& trace, int scan_bits)
    : shape_{.key_dim = trace.key_dim,
             .value_dim = trace.value_dim,
             .dtype = trace.dtype,
             .softmax_scale = trace.softmax_scale,
             .scan_bits = scan_bits} {
  int64_t at = 0;
  const auto keys_at = [&] { return trace.keys.data() + at * trace.key_dim; };
  const auto values_at = [&] { return trace.values.data() + at * trace.value_dim; };
  for (; at + index::kSegmentTokens <= trace.tokens; at += index::kSegmentTokens) {
    segments_.push_back(index::Segment::Build(shape_, keys_at(), values_at()));
  }
  tail_tokens_ = trace.tokens - at;
  for (; at < trace.tokens; at += index::kTailChunkTokens) {
    tail_.push_back({keys_at(), values_at()});
  }
}

index::KvView StoredHead::view() const { return {shape_, segments_, tail_, tail_tokens_}; }

}  // namespace kvseek::cli
