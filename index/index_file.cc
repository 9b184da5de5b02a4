#include "index/index_file.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "index/file_bytes.h"
#include "index/graph_index.h"
#include "index/parts_index.h"
#include "index/product_file.h"
#include "kernels/dtype.h"

namespace kvseek::index {
namespace {

constexpr absl::string_view kMagic = "kvsindex";
constexpr uint32_t kVersion = 2;

void AppendHeader(BuiltKind kind, uint8_t rank, int64_t covered, const KvShape& shape,
                  std::string& to) {
  AppendBytes(kMagic.data(), kMagic.size(), to);
  AppendNumber(kVersion, to);
  AppendNumber(kind, to);
  AppendNumber(rank, to);
  AppendNumber(shape.dtype, to);
  AppendNumber(uint8_t{0}, to);
  AppendNumber(static_cast<uint32_t>(shape.key_dim), to);
  AppendNumber(static_cast<uint32_t>(shape.value_dim), to);
  AppendNumber(static_cast<uint64_t>(covered), to);
  AppendNumber(shape.softmax_scale, to);
}

bool IsVariance(uint16_t bf16) { return IsFinite(bf16) && !(kernels::Bf16ToFloat(bf16) < 0.0F); }
bool IsDistance(uint16_t bf16) { return IsFinite(bf16) && kernels::Bf16ToFloat(bf16) > 0.0F; }

struct Header {
  BuiltKind kind = BuiltKind::kLandmark;
  uint8_t rank = 0;
  int64_t covered = 0;
};

bool ReadHeader(const KvShape& shape, Reader& reader, Header& header) {
  char magic[8] = {};
  uint32_t version = 0;
  uint8_t kind = 0;
  uint8_t dtype = 0;
  uint8_t zero = 0;
  uint32_t key_dim = 0;
  uint32_t value_dim = 0;
  uint64_t covered = 0;
  float scale = 0.0F;
  if (!reader.Number("magic", magic) ||
      !reader.Check(absl::string_view(magic, sizeof(magic)) == kMagic, "magic",
                    "not a saved index") ||
      !reader.Number("version", version) ||
      !reader.Check(version == kVersion, "version",
                    absl::StrCat(version, ", this program knows ", kVersion)) ||
      !reader.Number("kind", kind) || !reader.Check(kind < kBuiltKinds, "kind", "unknown") ||
      !reader.Number("rank", header.rank) || !reader.Number("dtype", dtype) ||
      !reader.Number("header", zero) || !reader.Check(zero == 0, "header", "byte 15 is not 0") ||
      !reader.Number("key_dim", key_dim) || !reader.Number("value_dim", value_dim) ||
      !reader.Number("covered", covered) || !reader.Number("softmax_scale", scale)) {
    return false;
  }
  header.kind = static_cast<BuiltKind>(kind);
  header.covered = static_cast<int64_t>(covered);
  const auto spread = static_cast<uint8_t>(PartRank::kSpread);
  const bool rank_fits = header.kind == BuiltKind::kLandmark  ? header.rank <= 2
                         : header.kind == BuiltKind::kCluster ? header.rank == spread
                                                              : header.rank == 0;
  const bool shape_fits = key_dim == static_cast<uint32_t>(shape.key_dim) &&
                          value_dim == static_cast<uint32_t>(shape.value_dim) &&
                          dtype == static_cast<uint8_t>(shape.dtype) &&
                          scale == shape.softmax_scale;
  const bool covered_fits = header.covered > 0 && covered % kSegmentTokens == 0;
  return reader.Check(rank_fits, "rank", "not one of this kind") &&
         reader.Check(shape_fits, "shape", "not that of the keys") &&
         reader.Check(covered_fits, "covered", absl::StrCat("impossible: ", covered));
}

std::shared_ptr<const CholeskyFactor> ReadFactor(absl::string_view section, int dim,
                                                 Reader& reader) {
  const auto n = static_cast<size_t>(dim);
  std::vector<float> columns;
  if (!reader.Numbers(section, n * n, columns)) return nullptr;
  bool is_factor = true;
  for (size_t j = 0; j < n; ++j) {
    for (size_t i = 0; i < j; ++i) is_factor = is_factor && columns[j * n + i] == 0.0F;
    is_factor = is_factor && columns[j * n + j] > 0.0F;
  }
  if (!reader.Check(is_factor, section, "not the factor of a matrix")) return nullptr;
  return std::make_shared<const CholeskyFactor>(std::move(columns), dim);
}

}  // namespace

/// The arrays of KeyParts. Members are saved as the part of each key, by those who cannot tell it
/// otherwise.
struct KeyPartsFile {
  static std::vector<uint16_t> PartOf(const KeyParts& parts) {
    std::vector<uint16_t> part_of(parts.members_.size());
    for (int p = 0; p < parts.count(); ++p) {
      for (const uint16_t member : parts.Members(p)) part_of[member] = static_cast<uint16_t>(p);
    }
    return part_of;
  }

  static void AppendSummaries(const KeyParts& parts, std::string& to) {
    AppendArray(parts.mean_keys_, to);
    AppendArray(parts.key_variances_, to);
    if (parts.has_bounds()) {
      AppendArray(parts.lower_, to);
      AppendArray(parts.upper_, to);
    }
    AppendArray(parts.mean_values_, to);
  }

  /// Null if they cannot be read. REQUIRES: no part of `part_of` is empty.
  static std::shared_ptr<const KeyParts> ReadSummaries(const KvShape& shape, int64_t begin,
                                                       absl::Span<const uint16_t> part_of,
                                                       bool bounds,
                                                       std::shared_ptr<const CholeskyFactor> basis,
                                                       Reader& reader) {
    std::shared_ptr<KeyParts> parts(new KeyParts);
    parts->key_dim_ = shape.key_dim;
    parts->begin_ = begin;
    parts->basis_ = std::move(basis);
    parts->SetMembers(part_of, *std::max_element(part_of.begin(), part_of.end()) + 1);
    const auto count = static_cast<size_t>(parts->count());
    const size_t elements = count * static_cast<size_t>(shape.key_dim);
    if (!reader.Numbers("mean keys", elements, parts->mean_keys_) ||
        !reader.Array("key variances", elements, parts->key_variances_) ||
        !reader.Check(
            std::all_of(parts->key_variances_.begin(), parts->key_variances_.end(), IsVariance),
            "key variances", "not finite, or negative") ||
        (bounds && !ReadBounds(elements, *parts, reader)) ||
        !reader.Numbers("mean values", count * static_cast<size_t>(shape.value_dim),
                        parts->mean_values_)) {
      return nullptr;
    }
    return parts;
  }

  static bool ReadBounds(size_t elements, KeyParts& parts, Reader& reader) {
    if (!reader.Numbers("lower bounds", elements, parts.lower_) ||
        !reader.Numbers("upper bounds", elements, parts.upper_)) {
      return false;
    }
    parts.SetLargest();
    return reader.Check(std::equal(parts.lower_.begin(), parts.lower_.end(), parts.upper_.begin(),
                                   [](uint16_t low, uint16_t high) {
                                     return kernels::Bf16ToFloat(low) <= kernels::Bf16ToFloat(high);
                                   }),
                        "upper bounds", "below the lower ones");
  }
};

namespace {

std::string SaveParts(const PartsIndex& index, const KvShape& shape) {
  std::string bytes;
  AppendHeader(index.name() == "cluster" ? BuiltKind::kCluster : BuiltKind::kLandmark,
               static_cast<uint8_t>(index.rank()), index.covered(), shape, bytes);
  AppendArray(std::vector<double>{index.build_core_seconds()}, bytes);
  AppendArray(index.runs().front()->parts->basis()->columns(), bytes);
  for (const auto& run : index.runs()) {
    AppendArray(KeyPartsFile::PartOf(*run->parts), bytes);
    KeyPartsFile::AppendSummaries(*run->parts, bytes);
    if (run->nodes != nullptr) KeyPartsFile::AppendSummaries(*run->nodes, bytes);
    if (index.rank() == PartRank::kLandmark) AppendArray(run->landmarks, bytes);
  }
  return bytes;
}

/// No part up to the last one is empty.
bool PartsAreUsed(absl::Span<const uint16_t> part_of) {
  std::vector<bool> used(*std::max_element(part_of.begin(), part_of.end()) + size_t{1});
  for (const uint16_t part : part_of) used[part] = true;
  return std::all_of(used.begin(), used.end(), [](bool is_used) { return is_used; });
}

std::shared_ptr<const PartsRun> ReadRun(const KvShape& shape, PartRank rank, int64_t begin,
                                        int64_t end, std::shared_ptr<const CholeskyFactor> basis,
                                        Reader& reader) {
  const bool bounds = rank == PartRank::kBound;
  std::vector<uint16_t> part_of;
  if (!reader.Array("part of key", static_cast<size_t>(end - begin), part_of) ||
      !reader.Check(PartsAreUsed(part_of), "part of key", "a part has no keys")) {
    return nullptr;
  }
  auto run = std::make_shared<PartsRun>();
  run->parts = KeyPartsFile::ReadSummaries(shape, begin, part_of, bounds, basis, reader);
  if (run->parts == nullptr) return nullptr;
  if (bounds) {
    for (uint16_t& part : part_of) part /= kNodeParts;
    run->nodes = KeyPartsFile::ReadSummaries(shape, begin, part_of, bounds, basis, reader);
    if (run->nodes == nullptr) return nullptr;
  }
  const size_t elements = static_cast<size_t>(run->parts->count()) * shape.key_dim;
  if (rank == PartRank::kLandmark && !reader.Numbers("landmarks", elements, run->landmarks)) {
    return nullptr;
  }
  return run;
}

std::shared_ptr<const BuiltIndex> ReadParts(const Header& header, const KvShape& shape,
                                            Reader& reader) {
  const auto rank = static_cast<PartRank>(header.rank);
  std::vector<double> seconds;
  if (!ReadSeconds(1, reader, seconds)) return nullptr;
  const auto basis = ReadFactor("basis", shape.key_dim, reader);
  if (basis == nullptr) return nullptr;
  std::vector<std::shared_ptr<const PartsRun>> runs;
  for (int64_t begin = 0; begin < header.covered; begin += kRunTokens) {
    reader.SetPlace(absl::StrCat("run ", runs.size(), ", "));
    runs.push_back(
        ReadRun(shape, rank, begin, std::min(begin + kRunTokens, header.covered), basis, reader));
    if (runs.back() == nullptr) return nullptr;
  }
  reader.SetPlace("");
  return std::make_shared<const PartsIndex>(
      header.kind == BuiltKind::kCluster ? "cluster" : "landmark", rank, std::move(runs),
      seconds[0]);
}

std::string SaveGraph(const GraphIndex& index, const KvShape& shape) {
  std::string bytes;
  const KeyGraph& graph = index.graph();
  const GraphBuildTimes& times = index.times();
  AppendHeader(BuiltKind::kGraph, 0, index.covered(), shape, bytes);
  AppendArray(std::vector<double>{times.queries, times.neighbours, times.edges, times.parts},
              bytes);
  AppendArray(index.parts().front()->basis()->columns(), bytes);
  for (const auto& parts : index.parts()) KeyPartsFile::AppendSummaries(*parts, bytes);
  AppendArray(graph.query_factor->columns(), bytes);
  AppendArray(graph.starts, bytes);
  AppendArray(graph.neighbours, bytes);
  AppendArray(graph.distances, bytes);
  AppendArray(graph.entries, bytes);
  AppendArray(graph.part_entries, bytes);
  AppendArray(graph.deviations, bytes);
  return bytes;
}

bool ReadEdges(size_t keys, Reader& reader, KeyGraph& graph) {
  const auto are_keys = [&](const std::vector<uint32_t>& ids) {
    return std::all_of(ids.begin(), ids.end(), [&](uint32_t id) { return id < keys; });
  };
  const auto are_distances = [](const std::vector<uint16_t>& squares) {
    return std::all_of(squares.begin(), squares.end(), IsDistance);
  };
  const auto in_their_parts = [](const std::vector<uint32_t>& ids) {
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] / kGraphPartTokens != i / kGraphPartEntries) return false;
    }
    return true;
  };
  return reader.Array("starts", keys + 1, graph.starts) &&
         reader.Check(
             graph.starts.front() == 0 && std::is_sorted(graph.starts.begin(), graph.starts.end()),
             "starts", "not ascending from 0") &&
         reader.Array("neighbours", graph.starts.back(), graph.neighbours) &&
         reader.Check(are_keys(graph.neighbours), "neighbours", "a key that is not there") &&
         reader.Array("distances", graph.neighbours.size(), graph.distances) &&
         reader.Check(are_distances(graph.distances), "distances", "not finite and positive") &&
         reader.Array("entries", kGraphEntries, graph.entries) &&
         reader.Check(are_keys(graph.entries), "entries", "a key that is not there") &&
         reader.Array("part entries", keys / kGraphPartTokens * kGraphPartEntries,
                      graph.part_entries) &&
         reader.Check(in_their_parts(graph.part_entries), "part entries", "not of the part") &&
         reader.Array("deviations", keys, graph.deviations) &&
         reader.Check(are_distances(graph.deviations), "deviations", "not finite and positive");
}

std::shared_ptr<const BuiltIndex> ReadGraph(const Header& header, const KvShape& shape,
                                            Reader& reader) {
  std::vector<double> seconds;
  if (!ReadSeconds(4, reader, seconds)) return nullptr;
  const auto basis = ReadFactor("basis", shape.key_dim, reader);
  if (basis == nullptr) return nullptr;
  std::vector<std::shared_ptr<const KeyParts>> parts;
  for (int64_t begin = 0; begin < header.covered; begin += kMaxPartsTokens) {
    reader.SetPlace(absl::StrCat("keys from ", begin, ", "));
    const int64_t tokens = std::min(header.covered - begin, kMaxPartsTokens);
    parts.push_back(KeyPartsFile::ReadSummaries(shape, begin, GraphStretches(tokens),
                                                /*bounds=*/false, basis, reader));
    if (parts.back() == nullptr) return nullptr;
  }
  reader.SetPlace("");
  KeyGraph graph;
  graph.query_factor = ReadFactor("query factor", shape.key_dim, reader);
  if (graph.query_factor == nullptr ||
      !ReadEdges(static_cast<size_t>(header.covered), reader, graph)) {
    return nullptr;
  }
  return std::make_shared<const GraphIndex>(
      std::move(graph), std::move(parts),
      GraphBuildTimes{seconds[0], seconds[1], seconds[2], seconds[3]});
}

}  // namespace

std::string SaveIndex(const BuiltIndex& index, const KvShape& shape) {
  if (const auto* const graph = dynamic_cast<const GraphIndex*>(&index)) {
    return SaveGraph(*graph, shape);
  }
  if (const auto* const product = dynamic_cast<const ProductIndex*>(&index)) {
    std::string bytes;
    AppendHeader(BuiltKind::kProduct, 0, index.covered(), shape, bytes);
    AppendProduct(*product, bytes);
    return bytes;
  }
  return SaveParts(dynamic_cast<const PartsIndex&>(index), shape);
}

absl::StatusOr<std::shared_ptr<const BuiltIndex>> LoadIndex(absl::string_view bytes,
                                                            const KvShape& shape) {
  Reader reader(bytes);
  Header header;
  if (!ReadHeader(shape, reader, header)) return reader.status();
  const std::shared_ptr<const BuiltIndex> index =
      header.kind == BuiltKind::kProduct ? ReadProduct(header.covered, shape, reader)
      : header.kind == BuiltKind::kGraph ? ReadGraph(header, shape, reader)
                                         : ReadParts(header, shape, reader);
  if (index == nullptr || !reader.Check(reader.left() == 0, "end", "more bytes follow")) {
    return reader.status();
  }
  return index;
}

}  // namespace kvseek::index
