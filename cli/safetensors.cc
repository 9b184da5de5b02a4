#include "cli/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvseek::cli {
namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;

absl::Status Wrong(const std::string& path, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
}

uint64_t ElementBytes(const std::string& dtype) {
  static const std::map<std::string, uint64_t> bytes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
      {"U32", 4},  {"F32", 4}, {"F64", 8}, {"I64", 8},     {"U64", 8}};
  const auto found = bytes.find(dtype);
  return found == bytes.end() ? 0 : found->second;
}

bool IsCount(const json& value) { return value.is_number_unsigned(); }

/// Reads one tensor's entry; offsets are still counted from the data's first byte.
absl::StatusOr<TensorInfo> ParseEntry(const json& entry, uint64_t data_bytes) {
  if (!entry.is_object()) return absl::InvalidArgumentError("is not an object");
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) {
    return absl::InvalidArgumentError("dtype is missing or not a string");
  }
  TensorInfo info;
  info.dtype = dtype->get<std::string>();
  info.bytes = ElementBytes(info.dtype);
  if (info.bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat("dtype \"", info.dtype, "\" is not known"));
  }
  const auto shape = entry.find("shape");
  if (shape == entry.end() || !shape->is_array()) {
    return absl::InvalidArgumentError("shape is missing or not an array");
  }
  for (const json& dim : *shape) {
    if (!IsCount(dim)) return absl::InvalidArgumentError("shape has an element that is no count");
    info.shape.push_back(dim.get<uint64_t>());
    if (__builtin_mul_overflow(info.bytes, info.shape.back(), &info.bytes)) {
      return absl::InvalidArgumentError("shape overflows 64 bits");
    }
  }
  const auto offsets = entry.find("data_offsets");
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 ||
      !IsCount((*offsets)[0]) || !IsCount((*offsets)[1])) {
    return absl::InvalidArgumentError("data_offsets is missing or not two counts");
  }
  info.offset = (*offsets)[0].get<uint64_t>();
  const uint64_t end = (*offsets)[1].get<uint64_t>();
  if (end < info.offset) return absl::InvalidArgumentError("data_offsets end before they begin");
  if (end > data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "data_offsets end at ", end, ", but the file has ", data_bytes, " bytes of data"));
  }
  if (end - info.offset != info.bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "data_offsets span ", end - info.offset, " bytes, but dtype and shape need ", info.bytes));
  }
  return info;
}

/// Tensors must cover [0, data_bytes) exactly.
absl::Status CheckCover(const std::map<std::string, TensorInfo>& tensors, uint64_t data_bytes) {
  std::vector<std::pair<const std::string*, const TensorInfo*>> order;
  order.reserve(tensors.size());
  for (const auto& [name, info] : tensors) order.emplace_back(&name, &info);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->offset, a.second->bytes) <
           std::pair(b.second->offset, b.second->bytes);
  });
  uint64_t end = 0;
  const std::string* previous = nullptr;
  for (const auto& [name, info] : order) {
    if (info->offset < end) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor \"", *name, "\": data_offsets overlap tensor \"", *previous, "\""));
    }
    if (info->offset > end) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor \"", *name, "\": data_offsets leave a hole before it"));
    }
    end = info->offset + info->bytes;
    previous = name;
  }
  if (end != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(data_bytes - end, " bytes after the last tensor belong to none"));
  }
  return absl::OkStatus();
}

/// Parses the JSON text; a name given twice would hide a tensor, so it is refused.
absl::StatusOr<json> ParseHeader(const std::string& text) {
  std::set<std::string> names;
  std::string twice;
  const auto see = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::key && depth == 1) {
      const auto name = parsed.get<std::string>();
      if (!names.insert(name).second) twice = name;
    }
    return depth <= 4;  // deeper than any valid header; what is dropped fails its check
  };
  json header = json::parse(text, see, /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object()) {
    return absl::InvalidArgumentError("header is not a JSON object");
  }
  if (!twice.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor \"", twice, "\" is named twice"));
  }
  return header;
}

}  // namespace

absl::StatusOr<SafeTensors> SafeTensors::Open(const std::string& path) {
  SafeTensors result;
  result.path_ = path;
  result.file_.open(path, std::ios::binary | std::ios::ate);
  const auto size = result.file_.tellg();
  if (!result.file_ || size < 0) {
    return absl::UnavailableError(absl::StrCat(path, ": cannot be opened"));
  }
  const auto file_bytes = static_cast<uint64_t>(size);
  std::array<unsigned char, kLengthBytes> length{};
  result.file_.seekg(0);
  if (file_bytes < kLengthBytes ||
      !result.file_.read(reinterpret_cast<char*>(length.data()), kLengthBytes)) {
    return Wrong(path, "header length: the file is shorter than 8 bytes");
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) header_bytes |= uint64_t{length[i]} << (8 * i);
  if (header_bytes > file_bytes - kLengthBytes) {
    return Wrong(path, absl::StrCat("header length ", header_bytes, " goes beyond the file's ",
                                    file_bytes, " bytes"));
  }
  if (header_bytes > kSafeTensorsHeaderBytesMax) {
    return Wrong(path, absl::StrCat("header length ", header_bytes, " is over the limit of ",
                                    kSafeTensorsHeaderBytesMax));
  }
  std::string text(header_bytes, '\0');
  if (!result.file_.read(text.data(), static_cast<std::streamsize>(header_bytes))) {
    return absl::UnavailableError(absl::StrCat(path, ": cannot be read"));
  }
  const absl::StatusOr<json> header = ParseHeader(text);
  if (!header.ok()) return Wrong(path, std::string(header.status().message()));
  const uint64_t data_begin = kLengthBytes + header_bytes;
  const uint64_t data_bytes = file_bytes - data_begin;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") continue;
    absl::StatusOr<TensorInfo> info = ParseEntry(entry, data_bytes);
    if (!info.ok()) {
      return Wrong(path, absl::StrCat("tensor \"", name, "\": ", info.status().message()));
    }
    result.tensors_.emplace(name, *std::move(info));
  }
  if (const absl::Status cover = CheckCover(result.tensors_, data_bytes); !cover.ok()) {
    return Wrong(path, std::string(cover.message()));
  }
  for (auto& [name, info] : result.tensors_) info.offset += data_begin;
  return result;
}

absl::StatusOr<TensorInfo> SafeTensors::Find(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    return absl::NotFoundError(absl::StrCat(path_, ": tensor \"", name, "\" is not in the file"));
  }
  return found->second;
}

absl::StatusOr<std::vector<uint8_t>> SafeTensors::Read(const std::string& name) {
  const absl::StatusOr<TensorInfo> info = Find(name);
  if (!info.ok()) return info.status();
  std::vector<uint8_t> bytes(info->bytes);
  file_.clear();
  file_.seekg(static_cast<std::streamoff>(info->offset));
  if (!file_.read(reinterpret_cast<char*>(bytes.data()),
                  static_cast<std::streamsize>(info->bytes))) {
    return absl::UnavailableError(
        absl::StrCat(path_, ": tensor \"", name, "\": the file ended while it was read"));
  }
  return bytes;
}

}  // namespace kvseek::cli
