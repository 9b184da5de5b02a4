#include "index/product_file.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace kvseek::index {
namespace {

using kernels::kCentroids;
using kernels::kSketchDim;

template <typename T>
std::vector<T> CopyOf(const T* elements, size_t count) {
  return {elements, elements + count};
}

bool ReadLayout(const KvShape& shape, Reader& reader, kernels::ProductLayout& layout) {
  std::vector<uint32_t> numbers;
  if (!reader.Array("layout", 2, numbers) ||
      !reader.Check(numbers[0] >= 1 && numbers[0] <= kernels::kSubspacesMax && numbers[1] <= 1 &&
                        (numbers[1] == 0 || shape.value_dim >= kSketchDim),
                    "layout", "impossible")) {
    return false;
  }
  layout = {static_cast<int>(numbers[0]), numbers[1] == 1};
  return true;
}

std::shared_ptr<const ProductCodebook> ReadCodebook(const KvShape& shape,
                                                    const kernels::ProductLayout& layout,
                                                    uint32_t trained, Reader& reader) {
  const auto dim = static_cast<size_t>(shape.key_dim);
  auto book = std::make_shared<ProductCodebook>();
  book->layout = layout;
  book->trained_segments = static_cast<int>(trained);
  const auto are_starts = [&](const std::vector<uint32_t>& starts) {
    return starts.front() == 0 && starts.back() == dim &&
           std::is_sorted(starts.begin(), starts.end());
  };
  const auto are_errors = [](const std::vector<float>& errors) {
    return errors.front() > 0.0F && std::is_sorted(errors.begin(), errors.end());
  };
  if (!reader.Array("starts", static_cast<size_t>(layout.subspaces) + 1, book->starts) ||
      !reader.Check(are_starts(book->starts), "starts", "not ascending from 0 to key_dim") ||
      !reader.Numbers("key map", dim * dim, book->key_map) ||
      !reader.Numbers("query map", dim * dim, book->query_map) ||
      !reader.Numbers("centroids", dim * kCentroids, book->centroids) ||
      !reader.Numbers("errors", kCentroids, book->errors) ||
      !reader.Check(are_errors(book->errors), "errors", "not ascending from above 0")) {
    return nullptr;
  }
  if (!layout.sketch) {
    book->SetSearchRows();
    return book;
  }
  const auto are_steps = [](const std::vector<float>& steps) {
    return std::all_of(steps.begin(), steps.end(), [](float step) { return step >= 0.0F; });
  };
  const size_t elements = size_t{kSketchDim} * static_cast<size_t>(shape.value_dim);
  if (!reader.Numbers("components", elements, book->components) ||
      !reader.Numbers("steps", kSketchDim, book->steps) ||
      !reader.Check(are_steps(book->steps), "steps", "negative")) {
    return nullptr;
  }
  book->SetSearchRows();
  return reader.Check(AllFinite(book->sketch_rows), "components", "too large") ? book : nullptr;
}

/// `before`: the codebook of the stretch before, or null.
std::shared_ptr<const ProductStretch> ReadStretch(
    const KvShape& shape, const kernels::ProductLayout& layout, int segments,
    const std::shared_ptr<const ProductCodebook>& before, Reader& reader) {
  std::vector<uint32_t> trained;
  if (!reader.Array("trained", 1, trained) ||
      !reader.Check(trained[0] <= kStretchSegments && (trained[0] > 0 || before != nullptr),
                    "trained", "impossible")) {
    return nullptr;
  }
  const auto book = trained[0] == 0 ? before : ReadCodebook(shape, layout, trained[0], reader);
  if (book == nullptr) return nullptr;
  const auto count = static_cast<size_t>(segments);
  std::vector<uint8_t> codes;
  std::vector<uint8_t> sketches;
  std::vector<uint16_t> means;
  if (!reader.Array("codes", count * CodeBytes(layout), codes) ||
      (layout.sketch &&
       (!reader.Array("sketches", count * SketchBytes(layout), sketches) ||
        !reader.Numbers("value means", count * static_cast<size_t>(shape.value_dim), means)))) {
    return nullptr;
  }
  auto stretch = std::make_shared<ProductStretch>(book, segments, shape.value_dim);
  std::copy_n(codes.data(), codes.size(), stretch->codes);
  if (!layout.sketch) return stretch;
  std::copy_n(sketches.data(), sketches.size(), stretch->sketches);
  std::copy_n(means.data(), means.size(), stretch->value_means.get());
  return stretch;
}

}  // namespace

void AppendProduct(const ProductIndex& index, std::string& to) {
  const kernels::ProductLayout& layout = index.layout();
  AppendArray(std::vector<double>{index.build_core_seconds()}, to);
  AppendArray(std::vector<uint32_t>{static_cast<uint32_t>(layout.subspaces), layout.sketch}, to);
  const ProductCodebook* before = nullptr;
  for (const auto& stretch : index.stretches()) {
    const ProductCodebook& book = *stretch->codebook;
    const bool borrowed = &book == before;
    AppendArray(std::vector<uint32_t>{borrowed ? 0 : static_cast<uint32_t>(book.trained_segments)},
                to);
    if (!borrowed) {
      AppendArray(book.starts, to);
      AppendArray(book.key_map, to);
      AppendArray(book.query_map, to);
      AppendArray(book.centroids, to);
      AppendArray(book.errors, to);
      if (layout.sketch) {
        AppendArray(book.components, to);
        AppendArray(book.steps, to);
      }
    }
    const auto count = static_cast<size_t>(stretch->segments);
    AppendArray(CopyOf(stretch->Block(0), count * CodeBytes(layout)), to);
    if (layout.sketch) {
      AppendArray(CopyOf(stretch->Sketches(0), count * SketchBytes(layout)), to);
      const size_t means = count * static_cast<size_t>(index.value_dim());
      AppendArray(CopyOf(stretch->value_means.get(), means), to);
    }
    before = &book;
  }
}

std::shared_ptr<const ProductIndex> ReadProduct(int64_t covered, const KvShape& shape,
                                                Reader& reader) {
  std::vector<double> seconds;
  kernels::ProductLayout layout;
  if (!ReadSeconds(1, reader, seconds) || !ReadLayout(shape, reader, layout)) return nullptr;
  std::vector<std::shared_ptr<const ProductStretch>> stretches;
  std::shared_ptr<const ProductCodebook> book;
  for (int64_t left = covered / kSegmentTokens; left > 0; left -= kStretchSegments) {
    reader.SetPlace(absl::StrCat("stretch ", stretches.size(), ", "));
    const auto segments = static_cast<int>(std::min<int64_t>(left, kStretchSegments));
    stretches.push_back(ReadStretch(shape, layout, segments, book, reader));
    if (stretches.back() == nullptr) return nullptr;
    book = stretches.back()->codebook;
  }
  reader.SetPlace("");
  return std::make_shared<const ProductIndex>(std::move(stretches), shape.value_dim, seconds[0]);
}

}  // namespace kvseek::index
