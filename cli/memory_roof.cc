#include "cli/memory_roof.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/prefetch.h"

namespace kvseek::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kThreadBytes = size_t{256} << 20;
constexpr size_t kAllBytesMax = size_t{2} << 30;
constexpr size_t kPageWords = 512;
constexpr size_t kLineWords = 8;
constexpr std::chrono::milliseconds kTime{150};

/// Reads a word of each cache line, page by page. `streams` pages are read side by side, and the
/// page that is `ahead` pages further is fetched meanwhile: which of these is fastest depends on
/// the machine.
uint64_t ReadAll(const std::vector<uint64_t>& data, size_t streams, size_t ahead) {
  uint64_t sum = 0;
  const size_t pages = data.size() / kPageWords / streams;
  for (size_t page = 0; page < pages; ++page) {
    for (size_t word = 0; word < kPageWords; word += kLineWords) {
      for (size_t stream = 0; stream < streams; ++stream) {
        const size_t at = (stream * pages + page) * kPageWords + word;
        if (ahead > 0 && page + ahead < pages) {
          kernels::PrefetchRange(&data[at + ahead * kPageWords], 1);
        }
        sum += data[at];
      }
    }
  }
  return sum;
}

struct Pattern {
  size_t streams;
  size_t ahead;
};
constexpr Pattern kPatterns[] = {{1, 0}, {1, 1}, {4, 0}, {4, 1}};

}  // namespace

double MeasureMemoryRoof(int threads) {
  const auto count = static_cast<size_t>(std::max(1, threads));
  const size_t words = std::min(kThreadBytes, kAllBytesMax / count) / sizeof(uint64_t);
  std::barrier start(static_cast<ptrdiff_t>(count));
  std::atomic<uint64_t> sum{0};
  std::vector<std::vector<double>> rates(std::size(kPatterns), std::vector<double>(count));
  const auto work = [&](size_t index) {
    const std::vector<uint64_t> data(words, index + 1);  // written by its reader: local on NUMA
    for (size_t p = 0; p < std::size(kPatterns); ++p) {
      start.arrive_and_wait();
      const Clock::time_point begin = Clock::now();
      uint64_t read = 0;
      do {
        sum.fetch_add(ReadAll(data, kPatterns[p].streams, kPatterns[p].ahead));
        read += words * sizeof(uint64_t);
      } while (Clock::now() - begin < kTime);
      rates[p][index] =
          static_cast<double>(read) / std::chrono::duration<double>(Clock::now() - begin).count();
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < count; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
  double best = 0.0;
  for (const std::vector<double>& pattern : rates) {
    double all = 0.0;
    for (const double rate : pattern) all += rate;
    best = std::max(best, all);
  }
  return sum.load() == 0 ? 0.0 : best;  // the sum keeps the reads
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
