// Memory, streams and events of a decoder, each freed by its owner; CUDA errors as absl::Status.
#ifndef KVSEEK_CLIENT_DECODER_GPU_MEMORY_H_
#define KVSEEK_CLIENT_DECODER_GPU_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace kvseek::client {

/// OK, or internal (resource_exhausted for memory) with what was being done.
inline absl::Status CudaStatus(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const auto code = error == cudaErrorMemoryAllocation ? absl::StatusCode::kResourceExhausted
                                                       : absl::StatusCode::kInternal;
  return {code, absl::StrCat(what, ": ", cudaGetErrorString(error))};
}

enum class MemoryKind { kDevice, kPinned };

/// An array of `T` in device memory, or in host memory that the device can address. Zeroed.
template <typename T, MemoryKind kind>
class GpuArray {
 public:
  GpuArray() = default;
  ~GpuArray() { Free(); }
  GpuArray(GpuArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  GpuArray& operator=(GpuArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  GpuArray(const GpuArray&) = delete;
  GpuArray& operator=(const GpuArray&) = delete;

  /// Once. `total` grows by the bytes taken.
  absl::Status Allocate(size_t count, size_t& total) {
    if (count == 0) return absl::OkStatus();
    void* data = nullptr;
    const size_t bytes = count * sizeof(T);
    absl::Status status;
    if constexpr (kind == MemoryKind::kDevice) {
      status = CudaStatus(cudaMalloc(&data, bytes), "device memory");
      if (status.ok()) status = CudaStatus(cudaMemset(data, 0, bytes), "device memory");
    } else {
      status = CudaStatus(cudaHostAlloc(&data, bytes, cudaHostAllocPortable), "pinned memory");
      if (status.ok()) std::memset(data, 0, bytes);
    }
    data_ = static_cast<T*>(data);
    count_ = count;
    if (status.ok()) total += bytes;
    return status;
  }

  T* get() const { return data_; }
  size_t count() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  void Free() {
    if constexpr (kind == MemoryKind::kDevice) {
      cudaFree(data_);
    } else {
      cudaFreeHost(data_);
    }
  }

  T* data_ = nullptr;
  size_t count_ = 0;
};

template <typename T>
using DeviceArray = GpuArray<T, MemoryKind::kDevice>;
template <typename T>
using PinnedArray = GpuArray<T, MemoryKind::kPinned>;

class GpuEvent {
 public:
  GpuEvent() = default;
  ~GpuEvent() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  GpuEvent(GpuEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  GpuEvent& operator=(GpuEvent&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  GpuEvent(const GpuEvent&) = delete;
  GpuEvent& operator=(const GpuEvent&) = delete;

  /// Once; flags of cudaEventCreateWithFlags.
  absl::Status Create(unsigned flags) {
    return CudaStatus(cudaEventCreateWithFlags(&event_, flags), "event");
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class GpuStream {
 public:
  GpuStream() = default;
  ~GpuStream() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  GpuStream(const GpuStream&) = delete;
  GpuStream& operator=(const GpuStream&) = delete;

  /// Once.
  absl::Status Create() {
    return CudaStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_GPU_MEMORY_H_
