// Data and flags from the device to a host thread, and the other way round.
#include "kernels/cuda/publish.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "tests/kernels/cuda/cuda_fixture.h"

namespace kvseek::kernels::cuda {
namespace {

class PublishTest : public CudaTest {};

TEST_F(PublishTest, AllIsThereWhenTheFlagsAre) {
  const DeviceArray<uint32_t> flags(std::vector<uint32_t>(kPublishFlags), Place::kPinnedHost);
  for (uint32_t number = 1; number <= 300; ++number) {
    const size_t words = 4 * static_cast<size_t>(Below(number % 7 == 0 ? 300000 : 3000));
    std::vector<uint32_t> data(words);
    for (uint32_t& word : data) word = static_cast<uint32_t>(random_());
    const DeviceArray<uint32_t> device(data);
    const DeviceArray<uint32_t> out(words, Place::kPinnedHost);
    const size_t bytes = words * sizeof(uint32_t);
    ASSERT_CUDA(Publish(device.get(), bytes, out.get(), flags.get(), number, stream_));
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!IsPublished(flags.get(), bytes, number)) {
      ASSERT_LT(std::chrono::steady_clock::now(), late) << bytes << " bytes";
    }
    // Before the stream is known to be done.
    ASSERT_TRUE(std::equal(data.begin(), data.end(), out.get())) << bytes << " bytes";
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
  }
}

TEST_F(PublishTest, NothingRunsBeforeThePermitAndThenSeesTheHostsData) {
  constexpr size_t kWords = 4096;
  const DeviceArray<uint32_t> flags(std::vector<uint32_t>(kPublishFlags), Place::kPinnedHost);
  const DeviceArray<uint32_t> permit(std::vector<uint32_t>(1), Place::kPinnedHost);
  const DeviceArray<uint32_t> input(kWords, Place::kPinnedHost);
  const DeviceArray<uint32_t> out(kWords, Place::kPinnedHost);
  const size_t bytes = kWords * sizeof(uint32_t);
  ASSERT_CUDA(Publish(input.get(), bytes, out.get(), flags.get(), 1, stream_));  // loads the code
  ASSERT_CUDA(AwaitPermit(permit.get(), 0, stream_));
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  for (uint32_t number = 2; number <= 100; ++number) {
    ASSERT_CUDA(AwaitPermit(permit.get(), number, stream_));
    const cudaError_t launched =
        Publish(input.get(), bytes, out.get(), flags.get(), number, stream_);
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
    bool early = false;
    while (std::chrono::steady_clock::now() < until) {
      early = early || IsPublished(flags.get(), bytes, number);
    }
    std::vector<uint32_t> data(kWords);
    for (uint32_t& word : data) word = static_cast<uint32_t>(random_());
    std::copy(data.begin(), data.end(), input.get());
    Permit(permit.get(), number);
    ASSERT_CUDA(launched);
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ASSERT_FALSE(early) << number;
    ASSERT_TRUE(std::equal(data.begin(), data.end(), out.get())) << number;
  }
}

TEST(PublishArgumentsTest, Refuses) {
  alignas(16) uint32_t memory[8] = {};
  const auto refused = cudaErrorInvalidValue;
  EXPECT_EQ(Publish(memory, 8, memory, memory, 1, nullptr), refused);
  EXPECT_EQ(Publish(memory, 16, memory, nullptr, 1, nullptr), refused);
  EXPECT_EQ(Publish(nullptr, 16, memory, memory, 1, nullptr), refused);
  EXPECT_EQ(Publish(memory, 16, nullptr, memory, 1, nullptr), refused);
  EXPECT_EQ(Publish(memory + 1, 16, memory, memory, 1, nullptr), refused);
  EXPECT_EQ(AwaitPermit(nullptr, 1, nullptr), refused);
}

TEST(PublishBlocksTest, AreBounded) {
  EXPECT_EQ(PublishBlocks(0), 1U);
  EXPECT_EQ(PublishBlocks(kPublishBlockBytes + 1), 2U);
  EXPECT_EQ(PublishBlocks(size_t{1} << 40), kPublishFlags);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
