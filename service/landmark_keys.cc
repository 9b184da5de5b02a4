#include "service/landmark_keys.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace kvseek::service {
namespace {

constexpr char kGivenField[] = "landmark_positions";
constexpr char kCutField[] = "tokens";

}  // namespace

uint64_t LandmarkKeys::PageBytes(size_t block_elements) {
  return sizeof(Page) + uint64_t{kPageBlocks} * block_elements * sizeof(uint16_t);
}

uint64_t LandmarkKeys::ListBytes(size_t pages) {
  return sizeof(LandmarkKeys) + pages * sizeof(Pages::value_type);
}

absl::StatusOr<std::shared_ptr<LandmarkKeys::Page>> LandmarkKeys::CopyPage(
    const Page* page, MemoryBudget& budget, absl::string_view field) const {
  auto memory = budget.Reserve(PageBytes(block_elements_), field);
  if (!memory.ok()) return memory.status();
  auto copy = std::make_shared<Page>(kPageBlocks * block_elements_, *std::move(memory));
  if (page != nullptr) {
    copy->known = page->known;
    copy->rows = page->rows;
  }
  return copy;
}

absl::StatusOr<std::shared_ptr<const LandmarkKeys>> LandmarkKeys::Make(
    Pages pages, MemoryBudget& budget, absl::string_view field) const {
  auto memory = budget.Reserve(ListBytes(pages.size()), field);
  if (!memory.ok()) return memory.status();
  auto made = std::make_shared<LandmarkKeys>(block_, block_elements_);
  made->pages_ = std::move(pages);
  made->memory_ = *std::move(memory);
  return made;
}

bool LandmarkKeys::Knows(int64_t block) const {
  const auto page = static_cast<size_t>(block / kPageBlocks);
  return page < pages_.size() && pages_[page] != nullptr &&
         (pages_[page]->known >> static_cast<uint32_t>(block % kPageBlocks) & 1U) != 0;
}

absl::StatusOr<std::shared_ptr<const LandmarkKeys>> LandmarkKeys::With(
    const std::shared_ptr<const LandmarkKeys>& keys, const GivenLandmarks& more,
    size_t block_elements, MemoryBudget& budget) {
  const LandmarkKeys none(more.block, block_elements);
  const LandmarkKeys& before = keys == nullptr ? none : *keys;
  Pages pages;  // of `before`, once one is to change
  std::shared_ptr<Page> open;
  size_t open_page = 0;
  for (size_t i = 0; i < more.positions.size(); ++i) {
    const auto block = static_cast<int64_t>(more.positions[i]) / more.block;
    if (before.Knows(block)) continue;
    const auto page = static_cast<size_t>(block / kPageBlocks);
    if (open == nullptr || open_page != page) {
      if (open == nullptr) pages = before.pages_;
      pages.resize(std::max(pages.size(), page + 1));
      auto copy = before.CopyPage(pages[page].get(), budget, kGivenField);
      if (!copy.ok()) return copy.status();
      open = *std::move(copy);
      open_page = page;
      pages[page] = open;
    }
    const auto slot = static_cast<size_t>(block % kPageBlocks);
    const uint16_t* const row = more.rows + i * block_elements;
    std::copy(row, row + block_elements,
              open->rows.begin() + static_cast<ptrdiff_t>(slot * block_elements));
    open->known |= 1U << slot;
  }
  if (open == nullptr) return keys;
  return before.Make(std::move(pages), budget, kGivenField);
}

absl::StatusOr<std::shared_ptr<const LandmarkKeys>> LandmarkKeys::Below(
    const std::shared_ptr<const LandmarkKeys>& keys, int64_t tokens, MemoryBudget& budget) {
  if (keys == nullptr) return keys;
  const auto whole = static_cast<size_t>(tokens / keys->block_ / kPageBlocks);
  const auto left = static_cast<uint32_t>(tokens / keys->block_ % kPageBlocks);
  const uint32_t kept = (1U << left) - 1U;
  const auto known = [&](size_t page) {
    return page < keys->pages_.size() && keys->pages_[page] != nullptr ? keys->pages_[page]->known
                                                                       : 0U;
  };
  bool cut = (known(whole) & ~kept) != 0;
  for (size_t page = whole + 1; page < keys->pages_.size(); ++page) cut = cut || known(page) != 0;
  if (!cut) return keys;
  Pages pages(keys->pages_.begin(),
              keys->pages_.begin() + static_cast<ptrdiff_t>(std::min(whole, keys->pages_.size())));
  if ((known(whole) & kept) != 0) {
    auto copy = keys->CopyPage(keys->pages_[whole].get(), budget, kCutField);
    if (!copy.ok()) return copy.status();
    (*copy)->known &= kept;
    pages.push_back(*std::move(copy));
  }
  return keys->Make(std::move(pages), budget, kCutField);
}

template <typename Visitor>
void LandmarkKeys::Visit(const Visitor& visit) const {
  for (size_t page = 0; page < pages_.size(); ++page) {
    if (pages_[page] == nullptr) continue;
    for (uint32_t left = pages_[page]->known; left != 0; left &= left - 1) {
      const auto slot = static_cast<size_t>(std::countr_zero(left));
      visit(static_cast<int64_t>(page * kPageBlocks + slot),
            pages_[page]->rows.data() + slot * block_elements_);
    }
  }
}

int64_t LandmarkKeys::Count(int64_t tokens) const {
  const auto blocks = static_cast<size_t>(tokens / block_);
  int64_t count = 0;
  for (size_t page = 0; page < pages_.size() && page * kPageBlocks < blocks; ++page) {
    if (pages_[page] == nullptr) continue;
    const size_t here = std::min<size_t>(blocks - page * kPageBlocks, kPageBlocks);
    count += std::popcount(pages_[page]->known & ((1U << here) - 1U));
  }
  return count;
}

std::vector<int64_t> LandmarkKeys::Positions() const {
  std::vector<int64_t> positions;
  Visit([&](int64_t block, const uint16_t*) { positions.push_back(block * block_); });
  return positions;
}

std::vector<float> LandmarkKeys::OfHead(size_t kv_head, size_t key_dim,
                                        kernels::DType dtype) const {
  std::vector<float> rows;
  Visit([&](int64_t, const uint16_t* heads) {
    for (size_t d = 0; d < key_dim; ++d) {
      rows.push_back(kernels::LoadElement(heads + kv_head * key_dim, dtype, d));
    }
  });
  return rows;
}

uint64_t LandmarkKeys::Bytes() const {
  const auto pages =
      std::count_if(pages_.begin(), pages_.end(), [](const auto& page) { return page != nullptr; });
  return ListBytes(pages_.size()) + static_cast<uint64_t>(pages) * PageBytes(block_elements_);
}

uint64_t LandmarkKeys::Bytes(int64_t tokens, int block, size_t block_elements) {
  const auto pages = static_cast<size_t>((tokens / block + kPageBlocks - 1) / kPageBlocks);
  return pages == 0 ? 0 : ListBytes(pages) + pages * PageBytes(block_elements);
}

}  // namespace kvseek::service
