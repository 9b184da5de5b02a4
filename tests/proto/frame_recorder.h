// How recorded_frames.cc writes its frames: payloads, and the fields that many of them share.
#ifndef KVSEEK_TESTS_PROTO_FRAME_RECORDER_H_
#define KVSEEK_TESTS_PROTO_FRAME_RECORDER_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "tests/proto/messages.h"
#include "tests/proto/recorded_frames.h"

namespace kvseek::proto {

static_assert(std::endian::native == std::endian::little, "tensors are written as they lie");

inline constexpr uint64_t kBootId = 0x0123456789abcdefU;

// Model of all recorded frames: 2 KV heads of 2 query heads, key_dim 8, value_dim 16.
inline constexpr uint32_t kKvHeads = 2;
inline constexpr uint32_t kQueryHeads = 4;
inline constexpr uint32_t kGroup = kQueryHeads / kKvHeads;
inline constexpr uint32_t kKeyDim = 8;
inline constexpr uint32_t kValueDim = 16;

class PayloadWriter {
 public:
  template <typename T>
  PayloadWriter& Part(const std::vector<T>& tensor) {
    const size_t bytes = tensor.size() * sizeof(T);
    const size_t offset = layout_.Add(bytes);
    payload_.resize(layout_.bytes());
    const auto* begin = reinterpret_cast<const uint8_t*>(tensor.data());
    std::copy(begin, begin + bytes, payload_.begin() + static_cast<ptrdiff_t>(offset));
    return *this;
  }
  // Elements first, first + 1, ... as bf16: exact for these small numbers.
  PayloadWriter& Bf16(size_t count, int first) {
    std::vector<uint16_t> tensor;
    for (const float value : Ramp(count, first)) {
      tensor.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
    }
    return Part(tensor);
  }
  PayloadWriter& Fp32(size_t count, int first) { return Part(Ramp(count, first)); }
  std::vector<uint8_t> Take() { return std::move(payload_); }

 private:
  static std::vector<float> Ramp(size_t count, int first) {
    std::vector<float> tensor(count);
    for (size_t i = 0; i < count; ++i) tensor[i] = static_cast<float>(first + static_cast<int>(i));
    return tensor;
  }
  PayloadLayout layout_;
  std::vector<uint8_t> payload_;
};

class Recorder {
 public:
  template <typename M>
  RecordedFrame& Request(const char* name, Op op, M message, std::vector<uint8_t> payload = {}) {
    RecordedFrame& frame = Add(name, op, std::make_unique<M>(std::move(message)));
    frame.header.time_left_us = 250000;
    frame.payload = std::move(payload);
    return frame;
  }
  template <typename M>
  RecordedFrame& Response(const char* name, Op op, M message, std::vector<uint8_t> payload = {}) {
    RecordedFrame& frame = Add(name, op, std::make_unique<M>(std::move(message)));
    frame.header.flags = kFlagResponse;
    frame.payload = std::move(payload);
    return frame;
  }
  RecordedFrame& Add(const char* name, Op op, std::unique_ptr<google::protobuf::Message> message) {
    RecordedFrame& frame = frames_.emplace_back();
    frame.name = name;
    frame.header.op = op;
    frame.header.request_id = 0x0a00 + static_cast<uint64_t>(op);
    frame.message = std::move(message);
    return frame;
  }
  std::vector<RecordedFrame> Take() { return std::move(frames_); }

 private:
  std::vector<RecordedFrame> frames_;
};

inline void SetSession(uint64_t id, SessionRef* session) {
  session->set_boot_id(kBootId);
  session->set_session_id(id);
}

inline void SetShape(ModelShape* shape) {
  shape->set_layers(3);
  shape->set_kv_heads(kKvHeads);
  shape->set_query_heads(kQueryHeads);
  shape->set_key_dim(kKeyDim);
  shape->set_value_dim(kValueDim);
  shape->set_dtype(DTYPE_BF16);
  shape->set_softmax_scale(0.25F);
}

inline void SetPlan(HeadPlan* plan) {
  plan->set_version(1);
  plan->set_scan_bits(2);
  plan->set_error_target(0.125);
  PlannedHead& head = *plan->add_heads();
  head.set_layer(2);
  head.set_kv_head(1);
  head.set_mode("rows");
  head.set_index("cluster");
  head.set_candidates(512);
  head.set_k(256);
}

inline void SetOptions(SearchOptions* options) {
  options->set_index(INDEX_LADDER);
  options->set_candidates(2048);
  options->set_exact_rows(0);
  options->set_audit_samples(64);
  options->set_seed(0xfedcba9876543210U);
}

// Two sessions; the first asks with two tokens of different ends.
template <typename M>
void AddItems(M& request) {
  QueryItem* item = request.add_items();
  SetSession(7, item->mutable_session());
  item->set_layer(2);
  item->set_tokens(2);
  item->set_range_begin(16);
  item->add_range_end(70000);
  item->add_range_end(70001);
  item = request.add_items();
  SetSession(8, item->mutable_session());
  item->set_layer(2);
  item->set_tokens(1);
}

template <typename M>
void AddReport(uint64_t scanned, M& response) {
  Report* report = response.add_reports();
  report->set_keys_scanned(scanned);
  report->set_keys_fine(4096);
  report->set_keys_exact(640);
  report->set_bytes_touched(scanned * 34 + 1);
  for (const float missed : {0.125F, 0.0625F}) {
    report->add_missed_mass(missed);
    report->add_missed_low(missed / 2);
    report->add_missed_high(missed * 2);
  }
  report->set_index(INDEX_LADDER);
}

inline void SetError(const absl::Status& status, Error* error) { *error = ToError(status); }

}  // namespace kvseek::proto

#endif  // KVSEEK_TESTS_PROTO_FRAME_RECORDER_H_
