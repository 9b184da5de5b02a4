#include "cli/table.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvseek::cli {
namespace {

std::string ThreeDigits(double value) {
  const double magnitude = std::fabs(value);
  if (magnitude >= 99.95 || magnitude == 0.0) return absl::StrFormat("%.0f", value);
  if (magnitude >= 9.995) return absl::StrFormat("%.1f", value);
  return absl::StrFormat("%.2f", value);
}

template <size_t N>
std::string WithUnit(double value, double step, const std::array<const char*, N>& units) {
  size_t unit = 0;
  while (unit + 1 < N && std::fabs(value) >= step * 0.9995) {
    value /= step;
    ++unit;
  }
  return absl::StrCat(ThreeDigits(value), units[unit]);
}

}  // namespace

std::string Table::Text() const {
  std::vector<size_t> widths(rows_[0].size(), 0);
  for (const auto& row : rows_) {
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  std::string text;
  for (const auto& row : rows_) {
    for (size_t c = 0; c < row.size(); ++c) {
      const std::string padding(widths[c] - row[c].size(), ' ');
      absl::StrAppend(&text, c == 0 ? "" : "  ", c == 0 ? row[c] + padding : padding + row[c]);
    }
    text += '\n';
  }
  return text;
}

std::string Short(double value) {
  return WithUnit(value, 1000.0, std::array{"", "k", "M", "G", "T"});
}

std::string ShortBytes(double bytes) {
  return WithUnit(bytes, 1024.0, std::array{" B", " KiB", " MiB", " GiB", " TiB"});
}

std::string Digits(double value) {
  const double magnitude = std::fabs(value);
  if (magnitude != 0.0 && (magnitude < 1e-3 || magnitude >= 1e6)) {
    return absl::StrFormat("%.2e", value);
  }
  if (magnitude < 1.0) return absl::StrFormat("%.4f", value);
  return ThreeDigits(value);
}

}  // namespace kvseek::cli
