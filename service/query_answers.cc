#include "service/query_answers.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory_resource>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/convert.h"
#include "proto/field_writer.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "service/query_operations.h"

namespace kvseek::service {
namespace {

using index::SearchResult;
using proto::WriteBytes;
using proto::WriteFloats;
using proto::WriteNumber;
using proto::WriteNumbers;

/// Bytes that are worth the hand-over to another worker.
constexpr size_t kBytesPerPart = size_t{256} << 10;

/// A payload laid out part by part, then allocated with zeros between the parts.
class PayloadBuilder {
 public:
  explicit PayloadBuilder(index::Scratch& memory) : gaps_(&memory) {}

  size_t Add(size_t bytes) {
    const size_t end = layout_.bytes();
    const size_t offset = layout_.Add(bytes);
    if (offset > end) gaps_.push_back({end, offset - end});
    return offset;
  }
  size_t bytes() const { return layout_.bytes(); }
  Payload Allocate() const {
    Payload payload = MakePayload(bytes());
    for (const auto& [offset, length] : gaps_) std::memset(payload.data.get() + offset, 0, length);
    return payload;
  }

 private:
  proto::PayloadLayout layout_;
  std::pmr::vector<std::pair<size_t, size_t>> gaps_;
};

/// Where the parts of an answer to Attend or TopK stand (proto/kvseek.proto).
struct AnswerLayout {
  struct Item {
    size_t keys = 0;
    size_t values = 0;
    size_t out = 0;
    size_t lse = 0;
  };
  size_t positions = 0;
  std::pmr::vector<Item> items;
  PayloadBuilder payload;
};

/// Where one result goes.
struct Place {
  size_t item = 0;
  size_t token = 0;
  size_t head = 0;              ///< index into the item's kv_heads
  size_t positions = 0;         ///< how many the result has
  size_t rows = 0;              ///< and how many of their rows travel
  size_t positions_before = 0;  ///< of all results
  size_t rows_before = 0;       ///< of the results of its item
};

/// Places of all results, whose sizes are not known yet.
std::pmr::vector<Place> MakePlaces(const CheckedSearch& search) {
  std::pmr::vector<Place> places(search.memory.get());
  places.reserve(search.Results());
  for (size_t i = 0; i < search.items.size(); ++i) {
    for (size_t t = 0; t < search.items[i].tokens; ++t) {
      for (size_t h = 0; h < search.items[i].kv_heads.size(); ++h) {
        places.push_back({.item = i, .token = t, .head = h});
      }
    }
  }
  return places;
}

/// Lays out results of these sizes, and finds what stands before each.
AnswerLayout LayOut(const CheckedSearch& search, absl::Span<Place> places) {
  index::Scratch& memory = *search.memory;
  AnswerLayout layout = {0, std::pmr::vector<AnswerLayout::Item>(search.items.size(), &memory),
                         PayloadBuilder(memory)};
  size_t positions = 0;
  std::pmr::vector<size_t> rows(search.items.size(), &memory);
  for (Place& place : places) {
    place.positions_before = positions;
    place.rows_before = rows[place.item];
    positions += place.positions;
    rows[place.item] += place.rows;
  }
  const auto add_positions = [&] {
    layout.positions = layout.payload.Add(positions * sizeof(int64_t));
  };
  const auto add_rows = [&](size_t AnswerLayout::Item::*part, auto row_bytes) {
    for (size_t i = 0; i < search.items.size(); ++i) {
      const size_t bytes = (search.items[i].settings().kv.*row_bytes)();
      layout.items[i].*part = layout.payload.Add(rows[i] * bytes);
    }
  };
  if (search.topk()) {
    add_positions();
    if (search.with_rows) {
      add_rows(&AnswerLayout::Item::keys, &index::KvShape::KeyRowBytes);
      add_rows(&AnswerLayout::Item::values, &index::KvShape::ValueRowBytes);
    }
  }
  for (size_t i = 0; i < search.items.size() && search.with_state; ++i) {
    const CheckedItem& item = search.items[i];
    const size_t heads = item.tokens * item.QueryHeads();
    const auto value_dim = static_cast<size_t>(item.settings().kv.value_dim);
    layout.items[i].out =
        layout.payload.Add(heads * value_dim * kernels::DTypeBytes(search.state_dtype));
    layout.items[i].lse = layout.payload.Add(heads * sizeof(float));
  }
  if (!search.topk()) add_positions();
  return layout;
}

/// Upper bound of the bytes of a result of this group in the answer's message.
constexpr size_t ResultBytes(bool audits, int group) {
  // Counts as numbers, index, reused, tag, position count.
  constexpr size_t kNumbers = 4 * 11 + 2 + 2 + 4 + 5;
  const size_t group_floats = 5 + sizeof(float) * static_cast<size_t>(group);
  return kNumbers + (audits ? 3 : 1) * group_floats;
}
constexpr size_t kReportBytesMax = ResultBytes(true, index::kMaxGroup);

/// Upper bound of the answer's message.
size_t MetadataBytes(const CheckedSearch& search) {
  size_t bytes = 8 + 6;  // compute_us and state_dtype, and what is before the position counts
  for (const CheckedItem& item : search.items) {
    bytes +=
        item.Results() * ResultBytes(search.options.audit_samples > 0, item.settings().Group());
  }
  return bytes;
}

absl::Status TooLarge(absl::string_view field, absl::string_view what, size_t bytes, size_t limit) {
  return proto::FieldError(
      absl::StatusCode::kResourceExhausted, field,
      absl::StrCat("the answer's ", what, " may have ", bytes, " bytes; the limit is ", limit));
}

void CopyRows(const HeadCache& cache, absl::Span<const int64_t> positions, uint8_t* keys,
              uint8_t* values) {
  const size_t key_bytes = cache.shape().KeyRowBytes();
  const size_t value_bytes = cache.shape().ValueRowBytes();
  constexpr size_t kAhead = 8;
  for (size_t i = 0; i < positions.size(); ++i, keys += key_bytes, values += value_bytes) {
    if (i + kAhead < positions.size()) {
      __builtin_prefetch(cache.KeyRow(positions[i + kAhead]));
      __builtin_prefetch(cache.ValueRow(positions[i + kAhead]));
    }
    std::memcpy(keys, cache.KeyRow(positions[i]), key_bytes);
    std::memcpy(values, cache.ValueRow(positions[i]), value_bytes);
  }
}

void PlaceResult(const CheckedSearch& search, const AnswerLayout& layout, const Place& place,
                 const SearchResult& result, absl::Span<const int64_t> rows, uint8_t* payload) {
  const CheckedItem& item = search.items[place.item];
  const AnswerLayout::Item& parts = layout.items[place.item];
  const SessionSettings& settings = item.settings();
  if (!result.positions.empty() && (search.topk() || search.options.list_read)) {
    std::memcpy(payload + layout.positions + place.positions_before * sizeof(int64_t),
                result.positions.data(), result.positions.size() * sizeof(int64_t));
  }
  if (search.with_rows) {
    CopyRows(item.layer->Head(item.kv_heads[place.head]), rows,
             payload + parts.keys + place.rows_before * settings.kv.KeyRowBytes(),
             payload + parts.values + place.rows_before * settings.kv.ValueRowBytes());
  }
  if (search.with_state) {
    const auto group = static_cast<size_t>(settings.Group());
    const auto value_dim = static_cast<size_t>(settings.kv.value_dim);
    const size_t first_head = place.token * item.QueryHeads() + place.head * group;
    const size_t elements = group * value_dim;
    if (search.state_dtype == kernels::DType::kFp16) {
      auto* const out = reinterpret_cast<uint16_t*>(payload + parts.out) + first_head * value_dim;
      kernels::ConvertToFp16(result.out.data(), elements, out);
    } else {
      std::memcpy(payload + parts.out + first_head * value_dim * sizeof(float), result.out.data(),
                  elements * sizeof(float));
    }
    std::memcpy(payload + parts.lse + first_head * sizeof(float), result.lse.data(),
                group * sizeof(float));
  }
}

/// At least 1: 0 means that a daemon does not say.
uint32_t MicrosSince(TimePoint begin) {
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(
      std::chrono::steady_clock::now() - begin);
  return static_cast<uint32_t>(
      std::clamp<int64_t>(micros.count(), 1, std::numeric_limits<uint32_t>::max()));
}

/// Writes what a search reports as the fields of a proto::Report; returns the end.
uint8_t* WriteReport(const CheckedSearch& search, const CheckedItem& item, const Place& place,
                     const index::SearchReport& from, uint8_t* to) {
  using Fields = proto::Report;
  to = WriteNumber(Fields::kKeysScannedFieldNumber, static_cast<uint64_t>(from.keys_scanned), to);
  to = WriteNumber(Fields::kKeysFineFieldNumber, static_cast<uint64_t>(from.keys_fine), to);
  to = WriteNumber(Fields::kKeysExactFieldNumber, static_cast<uint64_t>(from.keys_exact), to);
  to = WriteNumber(Fields::kBytesTouchedFieldNumber, static_cast<uint64_t>(from.bytes_touched), to);
  to = WriteFloats(Fields::kMissedMassFieldNumber, from.missed_mass, to);
  if (search.options.audit_samples > 0) {
    to = WriteFloats(Fields::kMissedLowFieldNumber, from.missed_low, to);
    to = WriteFloats(Fields::kMissedHighFieldNumber, from.missed_high, to);
  }
  const proto::IndexKind kind = ChooseIndex(item, place.head, item.ends[place.token] - item.begin);
  to = WriteNumber(Fields::kIndexFieldNumber, static_cast<uint64_t>(kind), to);
  return WriteNumber(Fields::kReusedFieldNumber, from.reused ? 1 : 0, to);
}

constexpr bool Same(int attend_field, int topk_field) { return attend_field == topk_field; }
using AttendFields = proto::AttendResponse;
using TopKFields = proto::TopKResponse;
static_assert(Same(AttendFields::kReportsFieldNumber, TopKFields::kReportsFieldNumber) &&
              Same(AttendFields::kPositionCountsFieldNumber,
                   TopKFields::kPositionCountsFieldNumber) &&
              Same(AttendFields::kComputeUsFieldNumber, TopKFields::kComputeUsFieldNumber) &&
              Same(AttendFields::kStateDtypeFieldNumber, TopKFields::kStateDtypeFieldNumber));

/// An AttendResponse or a TopKResponse, whose fields are the same.
std::string MakeMetadata(const CheckedSearch& search, absl::Span<const Place> places,
                         absl::Span<const SearchResult> results, uint32_t compute_us) {
  using Fields = AttendFields;
  std::string message(MetadataBytes(search), '\0');
  auto* const begin = reinterpret_cast<uint8_t*>(message.data());
  uint8_t* to = begin;
  for (size_t r = 0; r < results.size(); ++r) {
    const CheckedItem& item = search.items[places[r].item];
    uint8_t report[kReportBytesMax];
    uint8_t* const end = WriteReport(search, item, places[r], results[r].report, report);
    to = WriteBytes(Fields::kReportsFieldNumber, absl::MakeConstSpan(&report[0], end), to);
  }
  if (search.topk() || search.options.list_read) {
    std::pmr::vector<uint32_t> counts(search.memory.get());
    counts.reserve(results.size());
    for (const SearchResult& result : results) {
      counts.push_back(static_cast<uint32_t>(result.positions.size()));
    }
    to = WriteNumbers(Fields::kPositionCountsFieldNumber, counts, to);
  }
  to = WriteNumber(Fields::kComputeUsFieldNumber, compute_us, to);
  const proto::DType dtype =
      search.state_dtype == kernels::DType::kFp16 ? proto::DTYPE_FP16 : proto::DTYPE_UNSPECIFIED;
  to = WriteNumber(Fields::kStateDtypeFieldNumber, static_cast<uint64_t>(dtype), to);
  const auto bytes = static_cast<size_t>(to - begin);
  assert(bytes <= message.size());
  message.resize(bytes);
  return message;
}

/// Calls work(begin, end) for stripes of 0 .. count - 1, in several threads where `bytes` are many.
template <typename Work>
void ForStripes(size_t count, size_t bytes, Worker worker, const Work& work) {
  const size_t parts = std::clamp<size_t>(bytes / kBytesPerPart, 1, std::max<size_t>(count, 1));
  worker.pool.ForEach(
      static_cast<int>(parts),
      [&](int part, index::Scratch&) {
        const auto p = static_cast<size_t>(part);
        work(count * p / parts, count * (p + 1) / parts);
      },
      worker.scratch);
}

/// Positions of each result without those whose rows the client holds; empty if it holds none.
std::vector<std::vector<int64_t>> NotHeld(const CheckedSearch& search,
                                          absl::Span<const Place> places,
                                          absl::Span<const SearchResult> results, Worker worker) {
  size_t held = 0;
  for (const CheckedItem& item : search.items) {
    for (const auto& list : item.held) held += list.size();
  }
  if (held == 0 || !search.with_rows) return {};
  std::vector<std::vector<int64_t>> left(results.size());
  ForStripes(results.size(), held * sizeof(uint32_t), worker, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const CheckedItem& item = search.items[places[r].item];
      const std::vector<int64_t>& positions = results[r].positions;
      absl::Span<const uint32_t> list;
      if (!item.held.empty()) {
        list = item.held[places[r].token * item.kv_heads.size() + places[r].head];
      }
      left[r].reserve(positions.size());
      std::set_difference(positions.begin(), positions.end(), list.begin(), list.end(),
                          std::back_inserter(left[r]));
    }
  });
  return left;
}

}  // namespace

absl::Status CheckAnswerFits(const CheckedSearch& search, const DaemonOptions& options) {
  const size_t metadata_bytes = MetadataBytes(search);
  if (metadata_bytes > options.metadata_bytes_max) {
    return TooLarge("items", "metadata", metadata_bytes, options.metadata_bytes_max);
  }
  auto places = MakePlaces(search);
  for (Place& place : places) {
    const CheckedItem& item = search.items[place.item];
    const int64_t range = item.ends[place.token] - item.begin;
    const int64_t count = search.topk() ? std::min<int64_t>(search.options.k, range) : 0;
    place.positions = place.rows = static_cast<size_t>(count);
  }
  const size_t bytes = LayOut(search, absl::MakeSpan(places)).payload.bytes();
  if (bytes <= options.payload_bytes_max) return absl::OkStatus();
  for (Place& place : places) place.positions = place.rows = 0;
  const size_t without = LayOut(search, absl::MakeSpan(places)).payload.bytes();
  return TooLarge(without <= options.payload_bytes_max ? "k" : "items", "payload", bytes,
                  options.payload_bytes_max);
}

absl::StatusOr<Response> MakeAnswer(const CheckedSearch& search,
                                    absl::Span<const SearchResult> results,
                                    std::optional<TimePoint> arrived, const DaemonOptions& options,
                                    Worker worker) {
  auto places = MakePlaces(search);
  const std::vector<std::vector<int64_t>> not_held = NotHeld(search, places, results, worker);
  const auto rows = [&](size_t r) -> absl::Span<const int64_t> {
    return not_held.empty() ? results[r].positions : not_held[r];
  };
  for (size_t r = 0; r < results.size(); ++r) {
    places[r].positions = results[r].positions.size();
    places[r].rows = rows(r).size();
  }
  const AnswerLayout layout = LayOut(search, absl::MakeSpan(places));
  const size_t bytes = layout.payload.bytes();
  if (bytes > options.payload_bytes_max) {
    return TooLarge("options.list_read", "payload", bytes, options.payload_bytes_max);
  }
  Response response;
  response.payload = layout.payload.Allocate();
  ForStripes(results.size(), bytes, worker, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      PlaceResult(search, layout, places[r], results[r], rows(r), response.payload.data.get());
    }
  });
  if (!arrived.has_value()) return response;
  response.metadata = MakeMetadata(search, places, results, MicrosSince(*arrived));
  return response;
}

absl::StatusOr<Response> FetchRows(const CheckedFetch& fetch, const DaemonOptions& options,
                                   Worker worker) {
  const HeadCache& cache = fetch.layer->Head(fetch.kv_head);
  const size_t count = fetch.positions.size();
  const index::SearchMemory memory = index::TakeSearchMemory();
  PayloadBuilder payload(*memory);
  const size_t keys = payload.Add(count * cache.shape().KeyRowBytes());
  const size_t values = payload.Add(count * cache.shape().ValueRowBytes());
  if (payload.bytes() > options.payload_bytes_max) {
    return TooLarge("count", "payload", payload.bytes(), options.payload_bytes_max);
  }
  Response response;
  response.payload = payload.Allocate();
  ForStripes(count, payload.bytes(), worker, [&](size_t begin, size_t end) {
    uint8_t* data = response.payload.data.get();
    CopyRows(cache, fetch.positions.subspan(begin, end - begin),
             data + keys + begin * cache.shape().KeyRowBytes(),
             data + values + begin * cache.shape().ValueRowBytes());
  });
  response.metadata = proto::FetchRowsResponse().SerializeAsString();
  return response;
}

}  // namespace kvseek::service
