#include "client/decoder/doorbell_path.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "transport/doorbell_memory.h"

namespace kvseek::client {
namespace {

using kernels::cuda::DoorbellFaults;
using kernels::cuda::DoorbellStep;
using transport::DoorbellAnswer;
using transport::DoorbellItem;
using transport::DoorbellLayout;
using transport::DoorbellQuestion;

size_t QuestionBytes(size_t items) {
  return sizeof(DoorbellQuestion) + items * sizeof(DoorbellItem);
}

}  // namespace

DoorbellPath::~DoorbellPath() {
  if (!registered_) return;
  cudaDeviceSynchronize();
  cudaHostUnregister(doorbell_->memory());
}

absl::Status DoorbellPath::Open(const ClientOptions& daemon, size_t& device_bytes,
                                size_t& pinned_bytes) {
  const ModelShape& shape = options_.shape;
  DoorbellOptions opening;
  opening.shape = shape;
  opening.items_max = options_.sequences_max;
  opening.tokens_max = options_.query_tokens_max;
  opening.query_dtype = shape.dtype;
  opening.search = options_.search;
  opening.deadline = options_.layer_deadline;
  auto doorbell = Doorbell::Open(daemon, opening);
  if (!doorbell.ok()) return doorbell.status();
  doorbell_ = *std::move(doorbell);

  const DoorbellLayout& layout = doorbell_->layout();
  absl::Status status =
      CudaStatus(cudaHostRegister(doorbell_->memory(), layout.bytes(),
                                  cudaHostRegisterPortable | cudaHostRegisterMapped),
                 "mapping the doorbell");
  if (!status.ok()) return status;
  registered_ = true;
  void* mapped = nullptr;
  status = CudaStatus(cudaHostGetDevicePointer(&mapped, doorbell_->memory(), 0), "the doorbell");
  const auto take = [&](auto& array, size_t count, size_t& total) {
    if (status.ok()) status = array.Allocate(count, total);
  };
  const size_t step_bytes = sizeof(DoorbellStep) + QuestionBytes(options_.sequences_max);
  take(slot_states_, shape.layers, device_bytes);
  take(step_, step_bytes, device_bytes);
  take(next_step_, step_bytes, pinned_bytes);
  take(faults_, 1, pinned_bytes);
  if (!status.ok()) return status;
  auto* const base = static_cast<uint8_t*>(mapped);
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    slots_.push_back({.asked = reinterpret_cast<uint64_t*>(base + layout.asked(layer)),
                      .question = base + layout.question(layer),
                      .queries = base + layout.queries(layer),
                      .answer = base + layout.answer(layer),
                      .lses = reinterpret_cast<const float*>(base + layout.lses(layer)),
                      .outs = base + layout.outs(layer),
                      .state = slot_states_.get() + layer});
  }
  return LoadKernels();
}

/// Code that is loaded later may wait for a stream that waits for the daemon. Nobody is asked here.
absl::Status DoorbellPath::LoadKernels() {
  const ModelShape& shape = options_.shape;
  const size_t elements = size_t{shape.query_heads} * std::max(shape.key_dim, shape.value_dim);
  size_t unused = 0;
  DeviceArray<float> some, lses, out;
  absl::Status status = some.Allocate(elements, unused);
  if (status.ok()) status = lses.Allocate(shape.query_heads, unused);
  if (status.ok()) status = out.Allocate(elements, unused);
  if (status.ok()) status = BeginStep({}, 1, nullptr);
  if (status.ok()) status = Ring(0, some.get(), nullptr);
  if (status.ok()) status = Await(0, {some.get(), lses.get(), 1}, out.get(), nullptr);
  if (!status.ok()) return status;
  return CudaStatus(cudaStreamSynchronize(nullptr), "loading kernels");
}

absl::Status DoorbellPath::BeginStep(absl::Span<const FarSequence> batch, uint32_t tokens,
                                     cudaStream_t stream) {
  items_ = batch.empty() ? 1 : static_cast<uint32_t>(batch.size());
  tokens_ = tokens;
  DoorbellStep step;
  step.deadline_ns = static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(options_.layer_deadline).count());
  const DoorbellQuestion question{.items = items_, .tokens = tokens_};
  uint8_t* const to = next_step_.get();
  std::memset(to, 0, next_step_.bytes());
  std::memcpy(to + sizeof(step), &question, sizeof(question));
  bool anything = false;  // to be asked for, and ...
  bool anybody = false;   // who could be asked
  for (size_t b = 0; b < batch.size(); ++b) {
    const FarSequence& sequence = batch[b];
    if (sequence.begin >= sequence.end) continue;
    anything = true;
    if (sequence.lost[0] != 0 || sequence.sessions[0].boot_id != doorbell_->boot_id()) continue;
    anybody = true;
    const DoorbellItem item{.session_id = sequence.sessions[0].session_id,
                            .begin = sequence.begin,
                            .end = sequence.end};
    std::memcpy(to + sizeof(step) + QuestionBytes(b), &item, sizeof(item));
  }
  if (!anything) {
    step.mode = DoorbellStep::kNobody;
  } else if (!anybody || !doorbell_->Connected()) {
    step.mode = DoorbellStep::kMissed;
  }
  std::memcpy(to, &step, sizeof(step));
  return CudaStatus(cudaMemcpyAsync(step_.get(), to, step_.bytes(), cudaMemcpyHostToDevice, stream),
                    "the step's question");
}

absl::Status DoorbellPath::Ring(uint32_t layer, const void* queries, cudaStream_t stream) {
  const size_t bytes = Heads() * options_.shape.key_dim * sizeof(uint16_t);
  const auto* const step = reinterpret_cast<const DoorbellStep*>(step_.get());
  return CudaStatus(kernels::cuda::RingDoorbell(slots_[layer], queries, bytes, step,
                                                QuestionBytes(items_), stream),
                    "RingDoorbell");
}

absl::Status DoorbellPath::Await(uint32_t layer, const kernels::cuda::StateList& local, void* out,
                                 cudaStream_t stream) {
  const ModelShape& shape = options_.shape;
  return CudaStatus(
      kernels::cuda::AwaitAndMerge(slots_[layer], reinterpret_cast<DoorbellStep*>(step_.get()),
                                   static_cast<int>(Heads()), static_cast<int>(shape.value_dim),
                                   local.outs, local.lses, out, shape.dtype, faults_.get(), stream),
      "AwaitAndMerge");
}

uint64_t DoorbellPath::DaemonNanoseconds(uint32_t layer) const {
  DoorbellAnswer answer;
  std::memcpy(&answer, doorbell_->memory() + doorbell_->layout().answer(layer), sizeof(answer));
  return answer.daemon_ns;
}

void DoorbellPath::AddTo(DecoderStats& stats) const {
  DoorbellFaults faults;
  std::memcpy(&faults, faults_.get(), sizeof(faults));
  stats.misses += faults.misses + faults.refusals;
  stats.misses_deadline += faults.waits;
  stats.misses_unavailable += faults.misses - faults.waits;
  stats.fallbacks += faults.misses + faults.refusals;
}

}  // namespace kvseek::client
