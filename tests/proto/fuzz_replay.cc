// Main of a fuzzer in the ordinary test run: gives LLVMFuzzerTestOneInput every file of the folders
// named, then mutations of them made from a fixed seed.
//
//   NAME_fuzz [--mutations=N] [--seed=S] FOLDER...
//
// A failing mutation is written to the file named by KVSEEK_FUZZ_ARTIFACT, if set, before it runs.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

std::vector<Input> ReadInputs(const std::vector<std::string>& folders) {
  std::vector<std::filesystem::path> paths;
  for (const std::string& folder : folders) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      if (entry.is_regular_file()) paths.push_back(entry.path());
    }
  }
  std::sort(paths.begin(), paths.end());  // mutations depend on the order
  std::vector<Input> inputs;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return inputs;
}

// Bare modulo: std distributions may differ between libraries, and a seed should mean one input.
class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  Input Mutate(const std::vector<Input>& inputs) {
    Input input = inputs[Below(inputs.size())];
    for (size_t steps = 1 + Below(4); steps > 0; --steps) Step(inputs, input);
    return input;
  }

 private:
  size_t Below(size_t limit) { return static_cast<size_t>(random_() % std::max<size_t>(limit, 1)); }

  void Step(const std::vector<Input>& inputs, Input& input) {
    if (input.empty()) input.push_back(static_cast<uint8_t>(random_()));
    const size_t at = Below(input.size());
    const auto position = input.begin() + static_cast<ptrdiff_t>(at);
    switch (Below(7)) {
      case 0:
        input[at] ^= static_cast<uint8_t>(1U << Below(8));
        break;
      case 1:
        input[at] = static_cast<uint8_t>(random_());
        break;
      case 2:
        input[at] = kInteresting[Below(std::size(kInteresting))];
        break;
      case 3:
        input.resize(at);
        break;
      case 4:
        input.insert(position, 1 + Below(16), static_cast<uint8_t>(random_()));
        break;
      case 5:
        input.erase(position, position + static_cast<ptrdiff_t>(
                                             1 + Below(std::min<size_t>(16, input.size() - at))));
        break;
      default:
        Splice(inputs[Below(inputs.size())], at, input);
    }
  }

  void Splice(const Input& other, size_t at, Input& input) {
    const size_t from = Below(other.size() + 1);
    input.resize(at);
    input.insert(input.end(), other.begin() + static_cast<ptrdiff_t>(from), other.end());
  }

  static constexpr uint8_t kInteresting[] = {0, 1, 0x7f, 0x80, 0xc0, 0xf8, 0xff};
  std::mt19937_64 random_;
};

void Run(const Input& input, const char* artifact) {
  if (artifact != nullptr) {
    std::ofstream(artifact, std::ios::binary)
        .write(reinterpret_cast<const char*>(input.data()),
               static_cast<std::streamsize>(input.size()));
  }
  LLVMFuzzerTestOneInput(input.data(), input.size());
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t mutations = 20000;
  uint64_t seed = 1;
  std::vector<std::string> folders;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--mutations=", 0) == 0) {
      mutations = std::strtoull(argv[i] + 12, nullptr, 10);
    } else if (argument.rfind("--seed=", 0) == 0) {
      seed = std::strtoull(argv[i] + 7, nullptr, 10);
    } else {
      folders.push_back(argument);
    }
  }
  const std::vector<Input> inputs = ReadInputs(folders);
  if (inputs.empty()) {
    std::fprintf(stderr, "no inputs in the folders named\n");
    return 1;
  }
  const char* artifact = std::getenv("KVSEEK_FUZZ_ARTIFACT");
  for (const Input& input : inputs) Run(input, artifact);
  Mutator mutator(seed);
  for (uint64_t i = 0; i < mutations; ++i) Run(mutator.Mutate(inputs), artifact);
  std::printf("%zu inputs, %llu mutations\n", inputs.size(),
              static_cast<unsigned long long>(mutations));
  return 0;
}
