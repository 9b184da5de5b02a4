#include "service/query_operations.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/cpu/convert.h"
#include "proto/frame.h"
#include "proto/status_code.h"
#include "service/message_memory.h"

namespace kvseek::service {
namespace {

using index::SearchResult;

/// Bytes that are worth the hand-over to another worker.
constexpr size_t kBytesPerPart = size_t{256} << 10;
/// Keys to be remembered for each candidate, if a request does not say how many.
constexpr int kKeepFactor = 3;

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

size_t Results(const CheckedSearch& search) {
  size_t results = 0;
  for (const CheckedItem& item : search.items) results += item.Results();
  return results;
}

/// Places of all results, whose sizes are not known yet.
std::pmr::vector<Place> MakePlaces(const CheckedSearch& search) {
  std::pmr::vector<Place> places(search.memory.get());
  places.reserve(Results(search));
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

/// Upper bound of a result's bytes in the answer's message.
size_t MetadataBytes(const CheckedSearch& search, const CheckedItem& item) {
  // Counts as varints, index, reused, tag, position count.
  constexpr size_t kNumbers = 4 * 11 + 2 + 2 + 4 + 5;
  const size_t group_floats = 5 + sizeof(float) * static_cast<size_t>(item.settings().Group());
  return kNumbers + (search.options.audit_samples > 0 ? 3 : 1) * group_floats;
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

/// The messages of both operations have the same fields.
template <typename Message>
std::string MakeMetadata(const CheckedSearch& search, absl::Span<const Place> places,
                         absl::Span<const SearchResult> results, uint32_t compute_us) {
  MessageMemory memory(*search.memory);
  auto& message = memory.New<Message>();
  message.set_compute_us(compute_us);
  if (search.state_dtype == kernels::DType::kFp16) message.set_state_dtype(proto::DTYPE_FP16);
  for (size_t r = 0; r < results.size(); ++r) {
    const index::SearchReport& from = results[r].report;
    const CheckedItem& item = search.items[places[r].item];
    proto::Report& report = *message.add_reports();
    report.set_keys_scanned(static_cast<uint64_t>(from.keys_scanned));
    report.set_keys_fine(static_cast<uint64_t>(from.keys_fine));
    report.set_keys_exact(static_cast<uint64_t>(from.keys_exact));
    report.set_bytes_touched(static_cast<uint64_t>(from.bytes_touched));
    report.set_reused(from.reused);
    report.mutable_missed_mass()->Add(from.missed_mass.begin(), from.missed_mass.end());
    if (search.options.audit_samples > 0) {
      report.mutable_missed_low()->Add(from.missed_low.begin(), from.missed_low.end());
      report.mutable_missed_high()->Add(from.missed_high.begin(), from.missed_high.end());
    }
    report.set_index(ChooseIndex(item, places[r].head, item.ends[places[r].token] - item.begin));
    if (search.topk() || search.options.list_read) {
      message.add_position_counts(static_cast<uint32_t>(results[r].positions.size()));
    }
  }
  return message.SerializeAsString();
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

proto::IndexKind ChooseIndex(const CheckedItem& item, size_t head, int64_t range) {
  const proto::IndexKind wanted = item.settings_of_heads[head].index;
  const bool named =
      wanted != proto::INDEX_AUTO && FindIndex(*item.layer, item.kv_heads[head], wanted) != nullptr;
  if (named) return wanted;
  if (range < index::kExactBelowTokens) return proto::INDEX_EXACT;
  const bool product =
      wanted == proto::INDEX_AUTO &&
      item.layer->Built(item.kv_heads[head], index::BuiltKind::kProduct) != nullptr;
  return product ? proto::INDEX_PRODUCT : proto::INDEX_LADDER;
}

const index::KeyIndex* FindIndex(const LayerState& layer, size_t kv_head, proto::IndexKind kind) {
  if (kind == proto::INDEX_EXACT) return &index::ExactIndex();
  if (kind == proto::INDEX_LADDER) return &index::LadderIndex();
  return layer.Built(kv_head, *BuiltKindOf(kind));
}

std::pmr::vector<SearchTask> MakeTasks(const CheckedSearch& search) {
  std::pmr::vector<SearchTask> tasks(search.memory.get());
  tasks.reserve(Results(search));
  for (const CheckedItem& item : search.items) {
    const SessionSettings& settings = item.settings();
    const int group = settings.Group();
    const size_t group_elements =
        static_cast<size_t>(group) * static_cast<size_t>(settings.kv.key_dim);
    const float* queries = item.queries;
    for (size_t t = 0; t < item.tokens; ++t) {
      for (size_t h = 0; h < item.kv_heads.size(); ++h) {
        tasks.push_back({FindIndex(*item.layer, item.kv_heads[h],
                                   ChooseIndex(item, h, item.ends[t] - item.begin)),
                         item.layer->View(item.kv_heads[h]),
                         {queries, group, item.begin, item.ends[t]},
                         search.options});
        SearchTask& task = tasks.back();
        task.options.candidates = static_cast<int>(item.settings_of_heads[h].candidates);
        task.options.threshold = item.settings_of_heads[h].threshold;
        queries += group_elements;
      }
    }
  }
  return tasks;
}

void AddReuse(const CheckedSearch& search, MemoryBudget& budget, absl::Span<SearchTask> tasks) {
  // A reused answer proves nothing of the best keys, and has the estimate of the rest in it.
  if (search.reuse.every == 0 || search.options.exact_top > 0 || !search.options.estimate_rest) {
    return;
  }
  auto task = tasks.begin();
  for (const CheckedItem& item : search.items) {
    task += static_cast<ptrdiff_t>(item.Results() - item.kv_heads.size());
    SelectionMemory& memory = item.session->Selections(item.layer_number);
    for (const uint32_t head : item.kv_heads) {
      task->last = memory.NextStep(head, search.reuse.every, *task->index, task->view);
      task->reuse = search.reuse;
      if (task->reuse.keep == 0) {
        task->reuse.keep = std::min(kKeepFactor * task->options.candidates, index::kMaxKeep);
      }
      task->options.keep = task->reuse.keep;
      task->remember = [&memory, &budget, head, index = task->index, view = task->view](auto last) {
        memory.Remember(head, *index, view, std::move(last), budget);
      };
      ++task;
    }
  }
}

std::optional<TrafficQueries::Batch> CollectQueries(const CheckedItem& item, MemoryBudget& budget) {
  const SessionSettings& settings = item.settings();
  const int64_t end = item.ends.back();
  if (!settings.Learns() || item.layer->queries_sent || end == item.begin) return std::nullopt;
  const auto key_dim = static_cast<size_t>(settings.kv.key_dim);
  const TrafficQueries::Token token{end - 1, item.kv_heads,
                                    item.queries + (item.tokens - 1) * item.QueryHeads() * key_dim};
  const TrafficQueries::Shape shape{settings.kv_heads, static_cast<size_t>(settings.Group()),
                                    key_dim, settings.kv.dtype};
  return item.session->Traffic(item.layer_number).Add(token, shape, budget);
}

absl::Status CheckAnswerFits(const CheckedSearch& search, const DaemonOptions& options) {
  size_t metadata_bytes = 8;  // compute_us and state_dtype
  for (const CheckedItem& item : search.items) {
    metadata_bytes += item.Results() * MetadataBytes(search, item);
  }
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
  const uint32_t micros = MicrosSince(*arrived);
  response.metadata = search.topk()
                          ? MakeMetadata<proto::TopKResponse>(search, places, results, micros)
                          : MakeMetadata<proto::AttendResponse>(search, places, results, micros);
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
