// Reads .safetensors files: an 8-byte little-endian header length, a JSON header that names each
// tensor's dtype, shape and byte offsets, then the tensors' bytes.
//
// Files are not trusted. Open reads the header only and checks all of it against the file before
// anything is allocated for a tensor: the header's length, every shape for overflow, and that the
// tensors cover the data exactly, without overlap or hole. Errors name the tensor and field:
// invalid_argument for what is wrong in a file, not_found for a tensor that is not there,
// unavailable for a file that cannot be read.
#ifndef KVSEEK_CLI_SAFETENSORS_H_
#define KVSEEK_CLI_SAFETENSORS_H_

#include <cstdint>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace kvseek::cli {

inline constexpr uint64_t kSafeTensorsHeaderBytesMax = uint64_t{16} << 20;

/// One tensor's place in the file.
struct TensorInfo {
  std::string dtype;  ///< as the file spells it: "BF16", "F16", "F32", "I64", ...
  std::vector<uint64_t> shape;
  uint64_t offset = 0;  ///< from the file's first byte
  uint64_t bytes = 0;   ///< the product of the shape times the bytes of an element
};

/// An open file. Not thread-safe.
class SafeTensors {
 public:
  static absl::StatusOr<SafeTensors> Open(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  absl::StatusOr<TensorInfo> Find(const std::string& name) const;
  /// The tensor's bytes, row-major, as they stand in the file (little-endian).
  absl::StatusOr<std::vector<uint8_t>> Read(const std::string& name);

 private:
  std::string path_;
  std::ifstream file_;
  std::map<std::string, TensorInfo> tensors_;
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_SAFETENSORS_H_
