#include "cli/memory_roof.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace kvseek::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kThreadBytes = size_t{128} << 20;
constexpr size_t kAllBytesMax = size_t{512} << 20;
constexpr std::chrono::milliseconds kTime{400};

}  // namespace

double MeasureMemoryRoof(int threads) {
  const auto count = static_cast<size_t>(std::max(1, threads));
  const size_t words = std::min(kThreadBytes, kAllBytesMax / count) / sizeof(uint64_t);
  std::atomic<size_t> ready{0};
  std::atomic<uint64_t> sum{0};
  std::atomic<uint64_t> bytes{0};
  std::vector<double> seconds(count, 0.0);
  const auto work = [&](size_t index) {
    const std::vector<uint64_t> data(words, index + 1);  // written by its reader: local on NUMA
    ready.fetch_add(1);
    while (ready.load() < count) std::this_thread::yield();
    const Clock::time_point begin = Clock::now();
    uint64_t mine = 0;
    uint64_t read = 0;
    do {
      mine += std::accumulate(data.begin(), data.end(), uint64_t{0});
      read += words * sizeof(uint64_t);
    } while (Clock::now() - begin < kTime);
    seconds[index] = std::chrono::duration<double>(Clock::now() - begin).count();
    sum.fetch_add(mine);  // or the reads would be optimised away
    bytes.fetch_add(read);
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < count; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
  const double longest = *std::max_element(seconds.begin(), seconds.end());
  return sum.load() == 0 ? 0.0 : static_cast<double>(bytes.load()) / longest;
}

uint64_t AvailableMemoryBytes() {
  std::ifstream file("/proc/meminfo");
  std::string word;
  while (file >> word) {
    if (word != "MemAvailable:") continue;
    uint64_t kib = 0;
    return file >> kib ? kib * 1024 : 0;
  }
  return 0;
}

}  // namespace kvseek::cli
