// The ladder's codes and kernels from their definitions (kernels/cpu/ladder_codes.h), bit by bit
// and in double precision, and the real keys that the tests encode. They serve tests and benches.
#ifndef KVSEEK_TESTS_KERNELS_LADDER_REFERENCE_H_
#define KVSEEK_TESTS_KERNELS_LADDER_REFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cpu/ladder_codes.h"
#include "kernels/cpu/ladder_fine.h"
#include "kernels/cpu/ladder_scan.h"
#include "kernels/cpu/ladder_select.h"

namespace kvseek::reference {

/// The grid point of one residual (padded_dim), and what its key stores of it.
struct Code {
  std::vector<double> point;
  std::vector<bool> doubtful;  ///< dimensions so near to a boundary that rounding decides
  double gain = 0.0;
  double noise = 0.0;
};
Code ScanCode(const float* residual, int padded_dim, int planes);
Code FineCode(const float* residual, int padded_dim);

/// The grid point that stands in the bytes: of one key of a scan block, of one fine record.
std::vector<double> StoredScanPoint(const uint8_t* block, int padded_dim, int planes, int key);
std::vector<double> StoredFinePoint(const uint8_t* record, int padded_dim);

/// Rows (count, dim), bf16 or fp16, with what could be encoded differently by two machines: tenfold
/// outliers, rows equal to the one before, rows of zeros of both signs, of subnormals, and of zeros
/// among positive or negative elements. The same for the same seed.
std::vector<uint16_t> HardRows(uint32_t seed, int count, int dim, kernels::DType dtype);

/// Gain of one key of a scan block.
double StoredGain(const uint8_t* block, int symbols, int planes, int key);

/// The symbol of group `g` in one plane of one key.
int StoredSymbol(const uint8_t* block, int symbols, int plane, int g, int key);

/// (heads, blocks * 64) sums of table entries.
std::vector<int16_t> ScanSums(const uint8_t* codes, int blocks, int symbols, int planes,
                              const int8_t* tables, int heads);

/// Estimate and weight of one key for one head.
double Estimate(const kernels::ScanHead& head, double gain, int sum);
double Weight(const kernels::ScanHead& head, double gain, double estimate);

/// A bf16 tensor of a safetensors file under tests/data, given the repository's folder.
struct Tensor {
  std::vector<size_t> shape;
  std::vector<uint16_t> data;
};
Tensor LoadTensor(const std::string& source_dir, const std::string& file, const std::string& name);

}  // namespace kvseek::reference

#endif  // KVSEEK_TESTS_KERNELS_LADDER_REFERENCE_H_
