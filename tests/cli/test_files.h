// Files for the tests of the tool: a temporary directory, and .safetensors written from memory.
#ifndef KVSEEK_TESTS_CLI_TEST_FILES_H_
#define KVSEEK_TESTS_CLI_TEST_FILES_H_

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/dtype.h"

namespace kvseek::cli {

/// Deletes itself.
class TempDir {
 public:
  TempDir() {
    std::random_device random;
    path_ = std::filesystem::temp_directory_path() /
            ("kvseek-test-" + std::to_string(random()) + std::to_string(random()));
    std::filesystem::create_directories(path_);
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  std::string File(const std::string& name) const { return (path_ / name).string(); }
  std::string Write(const std::string& name, const std::string& content) const {
    std::ofstream(File(name), std::ios::binary) << content;
    return File(name);
  }

 private:
  std::filesystem::path path_;
};

struct TensorData {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  std::string bytes;
};

inline std::string LittleEndian64(uint64_t value) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(value >> (8 * i) & 0xffU);
  return bytes;
}

/// A file of a given header text, valid or not, and data.
inline std::string RawFile(const std::string& header, const std::string& data) {
  return LittleEndian64(header.size()) + header + data;
}

inline std::string SafeTensorsFile(const std::vector<TensorData>& tensors) {
  std::string header = R"({"__metadata__":{"format":"test"})";
  std::string data;
  for (const TensorData& tensor : tensors) {
    absl::StrAppend(&header, ",\"", tensor.name, R"(":{"dtype":")", tensor.dtype, R"(","shape":[)",
                    absl::StrJoin(tensor.shape, ","), R"(],"data_offsets":[)", data.size(), ",",
                    data.size() + tensor.bytes.size(), "]}");
    data += tensor.bytes;
  }
  return RawFile(header + "}", data);
}

/// Elements as F32, BF16 or F16 bytes.
inline TensorData MakeTensor(const std::string& name, const std::string& dtype,
                             const std::vector<uint64_t>& shape, const std::vector<float>& values) {
  TensorData tensor{name, dtype, shape, {}};
  for (const float value : values) {
    if (dtype == "F32") {
      char bytes[4];
      std::memcpy(bytes, &value, 4);
      tensor.bytes.append(bytes, 4);
    } else {
      const uint16_t bits =
          dtype == "BF16" ? kernels::FloatToBf16(value) : kernels::FloatToFp16(value);
      char bytes[2];
      std::memcpy(bytes, &bits, 2);
      tensor.bytes.append(bytes, 2);
    }
  }
  return tensor;
}

inline std::vector<float> RandomValues(size_t count, unsigned seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace kvseek::cli

#endif  // KVSEEK_TESTS_CLI_TEST_FILES_H_
