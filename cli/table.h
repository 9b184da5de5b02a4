// Plain text tables: columns as wide as their widest cell.
#ifndef KVSEEK_CLI_TABLE_H_
#define KVSEEK_CLI_TABLE_H_

#include <string>
#include <vector>

namespace kvseek::cli {

class Table {
 public:
  explicit Table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }
  /// REQUIRES: as many cells as the header has.
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  /// The first column stands left, the others right; each line ends with a newline.
  std::string Text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// 12.3k, 4.56M, ...: three digits and a unit, powers of 1000.
std::string Short(double value);
/// 12.3 KiB, 4.56 MiB, ...: powers of 1024.
std::string ShortBytes(double bytes);
/// Three significant digits.
std::string Digits(double value);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_TABLE_H_
