// What the tests of the GPU kernels share: memory, random numbers, comparison. KVSEEK_TEST_SEED
// repeats a run. Tests that need a GPU skip, and say so, where there is none.
#ifndef KVSEEK_TESTS_KERNELS_CUDA_CUDA_FIXTURE_H_
#define KVSEEK_TESTS_KERNELS_CUDA_CUDA_FIXTURE_H_

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/dtype.h"

namespace kvseek::kernels::cuda {

constexpr double kTolerance = 1e-3;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

#define EXPECT_CUDA(call) EXPECT_STREQ(cudaGetErrorName(call), "cudaSuccess") << #call
#define ASSERT_CUDA(call) ASSERT_STREQ(cudaGetErrorName(call), "cudaSuccess") << #call

enum class Place { kDevice, kPinnedHost };

/// An array that the device can address; its bytes are 0xff, which is NaN in every float type,
/// until something is written.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count, Place place = Place::kDevice)
      : bytes_(count * sizeof(T)), place_(place) {
    const size_t allocated = std::max<size_t>(bytes_, 16);
    if (place_ == Place::kDevice) {
      EXPECT_CUDA(cudaMalloc(&data_, allocated));
      EXPECT_CUDA(cudaMemset(data_, 0xff, allocated));
    } else {
      EXPECT_CUDA(cudaHostAlloc(&data_, allocated, cudaHostAllocDefault));
      std::memset(data_, 0xff, allocated);
    }
  }
  explicit DeviceArray(const std::vector<T>& host, Place place = Place::kDevice)
      : DeviceArray(host.size(), place) {
    EXPECT_CUDA(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyDefault));
  }
  ~DeviceArray() { EXPECT_CUDA(place_ == Place::kDevice ? cudaFree(data_) : cudaFreeHost(data_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> Download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    EXPECT_CUDA(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDefault));
    return host;
  }

 private:
  size_t bytes_;
  Place place_;
  void* data_ = nullptr;
};

struct States {
  std::vector<float> out;  // (heads, value_dim)
  std::vector<float> lse;  // (heads)
};

/// The same in double precision.
struct Expected {
  std::vector<double> out;
  std::vector<double> lse;
};

/// Compares head by head: elements relative to the head's largest, lse relative to the larger of
/// itself and 1.
inline void ExpectNear(const States& actual, const Expected& expected,
                       double tolerance = kTolerance) {
  ASSERT_EQ(actual.out.size(), expected.out.size());
  ASSERT_EQ(actual.lse.size(), expected.lse.size());
  const size_t heads = expected.lse.size();
  const size_t value_dim = heads == 0 ? 0 : expected.out.size() / heads;
  for (size_t head = 0; head < heads; ++head) {
    const double lse = expected.lse[head];
    if (std::isinf(lse)) {
      ASSERT_EQ(actual.lse[head], -kInfinity) << "head " << head;
    } else {
      ASSERT_LE(std::abs(actual.lse[head] - lse), tolerance * std::max(1.0, std::abs(lse)))
          << "head " << head << ": " << actual.lse[head] << " for " << lse;
    }
    double largest = 0.0;
    for (size_t i = head * value_dim; i < (head + 1) * value_dim; ++i) {
      largest = std::max(largest, std::abs(expected.out[i]));
    }
    for (size_t i = head * value_dim; i < (head + 1) * value_dim; ++i) {
      ASSERT_LE(std::abs(actual.out[i] - expected.out[i]), tolerance * largest)  // fails for a NaN
          << "head " << head << " element " << i - head * value_dim << ": " << actual.out[i]
          << " for " << expected.out[i];
    }
  }
}

inline uint64_t Seed() {
  const char* given = std::getenv("KVSEEK_TEST_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
}

inline uint16_t ToHalf(float value, DType dtype) {
  return dtype == DType::kBf16 ? FloatToBf16(value) : FloatToFp16(value);
}

/// A stream, and random numbers that are new in each run.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
    }
    ASSERT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_ == nullptr) return;
    EXPECT_CUDA(cudaGetLastError());
    EXPECT_CUDA(cudaStreamDestroy(stream_));
    if (HasFailure()) ADD_FAILURE() << "KVSEEK_TEST_SEED=" << seed_ << " repeats this";
  }

  float Normal() { return std::normal_distribution<float>()(random_); }
  int Below(int bound) { return std::uniform_int_distribution<int>(0, bound - 1)(random_); }

  const uint64_t seed_ = Seed();
  std::mt19937_64 random_{seed_};
  cudaStream_t stream_ = nullptr;
};

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_TESTS_KERNELS_CUDA_CUDA_FIXTURE_H_
