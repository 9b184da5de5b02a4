// What index_file.cc and product_file.cc write and read saved indexes with: numbers, arrays,
// checks.
#ifndef KVSEEK_INDEX_FILE_BYTES_H_
#define KVSEEK_INDEX_FILE_BYTES_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "index/built_index.h"
#include "kernels/dtype.h"

namespace kvseek::index {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they stand");

inline void AppendBytes(const void* from, size_t bytes, std::string& to) {
  to.append(static_cast<const char*>(from), bytes);
}

template <typename T>
void AppendNumber(T number, std::string& to) {
  AppendBytes(&number, sizeof(number), to);
}

template <typename T>
void AppendArray(const std::vector<T>& array, std::string& to) {
  AppendNumber(uint64_t{array.size() * sizeof(T)}, to);
  AppendBytes(array.data(), array.size() * sizeof(T), to);
}

inline bool IsFinite(float number) { return std::isfinite(number); }
inline bool IsFinite(uint16_t bf16) { return std::isfinite(kernels::Bf16ToFloat(bf16)); }
template <typename T>
bool AllFinite(const std::vector<T>& array) {
  return std::all_of(array.begin(), array.end(), [](T number) { return IsFinite(number); });
}

/// Takes bytes from the front. What fails says so by false; the first failure is the status.
class Reader {
 public:
  explicit Reader(absl::string_view bytes) : left_(bytes) {}

  /// Part of the names of the sections that follow.
  void SetPlace(std::string place) { place_ = std::move(place); }
  size_t left() const { return left_.size(); }
  const absl::Status& status() const { return status_; }

  bool Check(bool holds, absl::string_view section, absl::string_view wrong) {
    if (!holds && status_.ok()) {
      status_ = absl::DataLossError(absl::StrCat("saved index, ", place_, section, ": ", wrong));
    }
    return holds;
  }

  template <typename T>
  bool Number(absl::string_view section, T& to) {
    if (!Check(left_.size() >= sizeof(T), section, "cut off")) return false;
    std::memcpy(&to, left_.data(), sizeof(T));
    left_.remove_prefix(sizeof(T));
    return true;
  }

  template <typename T>
  bool Array(absl::string_view section, size_t count, std::vector<T>& to) {
    uint64_t bytes = 0;
    if (!Number(section, bytes) ||
        !Check(bytes == uint64_t{count} * sizeof(T), section,
               absl::StrCat("has ", bytes, " bytes, should have ", count * sizeof(T))) ||
        !Check(bytes <= left_.size(), section, "cut off")) {
      return false;
    }
    to.resize(count);
    if (count > 0) std::memcpy(to.data(), left_.data(), bytes);
    left_.remove_prefix(bytes);
    return true;
  }

  /// Of finite numbers.
  template <typename T>
  bool Numbers(absl::string_view section, size_t count, std::vector<T>& to) {
    return Array(section, count, to) && Check(AllFinite(to), section, "not finite");
  }

 private:
  absl::string_view left_;
  std::string place_;
  absl::Status status_;
};

inline bool ReadSeconds(size_t count, Reader& reader, std::vector<double>& seconds) {
  return reader.Array("build seconds", count, seconds) &&
         reader.Check(std::all_of(seconds.begin(), seconds.end(),
                                  [](double s) { return std::isfinite(s) && s >= 0.0; }),
                      "build seconds", "not a time");
}

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_FILE_BYTES_H_
