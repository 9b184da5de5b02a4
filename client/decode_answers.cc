#include "client/decode_answers.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "client/head_plan_message.h"
#include "client/shape_checks.h"
#include "google/protobuf/arena.h"
#include "kernels/cpu/convert.h"
#include "proto/head_plan_file.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"

namespace kvseek::client {
namespace {

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("malformed answer: ", what));
}

template <typename T>
absl::StatusOr<T> Parse(const Answer& answer) {
  T message;
  if (!message.ParseFromString(answer.metadata)) return Malformed("metadata");
  return message;
}

/// Memory of a search's metadata while it is taken apart: a message of many parts, of which the
/// usual number needs no allocation.
class MessageMemory {
 public:
  /// Owned by this.
  template <typename T>
  absl::StatusOr<const T*> Parse(const Answer& answer) {
    T* const message = google::protobuf::Arena::CreateMessage<T>(&arena_);
    if (!message->ParseFromString(answer.metadata)) return Malformed("metadata");
    return message;
  }

 private:
  alignas(std::max_align_t) char first_[4096];
  google::protobuf::Arena arena_{first_, sizeof(first_)};
};

/// Takes a payload apart, in the order in which it was laid out.
class PayloadReader {
 public:
  explicit PayloadReader(const Answer& answer)
      : data_(answer.payload.get()), bytes_(answer.payload_bytes) {}

  /// The next part, `count` elements of T, where it stands; false if the payload does not have so
  /// many. Parts begin at multiples of 64 bytes, and so does the payload.
  template <typename T>
  bool View(uint64_t count, absl::Span<const T>& part) {
    if (count > bytes_ / sizeof(T)) return false;
    const size_t offset = layout_.Add(count * sizeof(T));
    if (layout_.bytes() > bytes_) return false;
    part = {reinterpret_cast<const T*>(data_ + offset), count};
    return true;
  }
  /// The same, copied.
  template <typename T>
  bool Take(uint64_t count, std::vector<T>& out) {
    absl::Span<const T> part;
    if (!View(count, part)) return false;
    out.assign(part.begin(), part.end());
    return true;
  }
  bool AtEnd() const { return layout_.bytes() == bytes_; }

 private:
  const uint8_t* data_;
  size_t bytes_;
  proto::PayloadLayout layout_;
};

Session MakeSession(const proto::SessionRef& ref, const ModelShape& shape) {
  return {ref.boot_id(), ref.session_id(), shape};
}

std::chrono::milliseconds ToMilliseconds(uint64_t count) {
  constexpr uint64_t kMax = 1ULL << 53;
  return std::chrono::milliseconds(static_cast<int64_t>(std::min(count, kMax)));
}

/// kAuto for one that this client does not know.
IndexKind ToIndexKind(proto::IndexKind kind) {
  return proto::IndexKind_IsValid(kind) ? static_cast<IndexKind>(kind) : IndexKind::kAuto;
}

/// What a later daemon may call otherwise is read as bounds.
LandmarkSummary ToSummary(proto::LandmarkSummary summary) {
  const bool known = summary == proto::LANDMARK_MEAN || summary == proto::LANDMARK_GIVEN;
  return known ? static_cast<LandmarkSummary>(summary) : LandmarkSummary::kBounds;
}

// ---- searches

template <typename Request>
std::vector<SearchShape::Item> ItemsOf(const Request& request) {
  std::vector<SearchShape::Item> items;
  items.reserve(request.items.size());
  for (const QueryItem& item : request.items) {
    items.push_back({item.tokens, item.KvHeads(), item.session.shape, item.held, item.held_counts});
  }
  return items;
}

absl::StatusOr<Report> MakeReport(const proto::Report& from, uint32_t group) {
  const auto fits = [group](int size) { return size == 0 || static_cast<uint32_t>(size) == group; };
  if (!fits(from.missed_mass_size()) || !fits(from.missed_low_size()) ||
      !fits(from.missed_high_size())) {
    return Malformed("a report's heads");
  }
  Report report;
  report.keys_scanned = from.keys_scanned();
  report.keys_fine = from.keys_fine();
  report.keys_exact = from.keys_exact();
  report.bytes_touched = from.bytes_touched();
  report.missed_mass.assign(from.missed_mass().begin(), from.missed_mass().end());
  report.missed_low.assign(from.missed_low().begin(), from.missed_low().end());
  report.missed_high.assign(from.missed_high().begin(), from.missed_high().end());
  report.index = ToIndexKind(from.index());
  report.reused = from.reused();
  return report;
}

/// Takes over what an answer says as a whole, checks its counts and makes its items, with reports
/// and empty selections of the right sizes.
template <typename Proto>
absl::Status MakeItems(const SearchShape& shape, const Proto& message, SearchResponse& out) {
  uint64_t results = 0;
  for (const auto& item : shape.items) results += uint64_t{item.tokens} * item.kv_heads;
  if (static_cast<uint64_t>(message.reports_size()) != results) return Malformed("reports");
  if (static_cast<uint64_t>(message.position_counts_size()) !=
      (shape.with_positions ? results : 0)) {
    return Malformed("position_counts");
  }
  out.daemon_us = message.compute_us();
  int next = 0;
  out.items.reserve(shape.items.size());
  for (const auto& item : shape.items) {
    ItemResult& result = out.items.emplace_back();
    const uint64_t count = uint64_t{item.tokens} * item.kv_heads;
    result.reports.reserve(count);
    for (uint64_t i = 0; i < count; ++i, ++next) {
      auto report = MakeReport(message.reports(next), item.shape.Group());
      if (!report.ok()) return report.status();
      result.reports.push_back(*std::move(report));
      if (shape.k.has_value() && message.position_counts(next) > *shape.k) {
        return Malformed("more keys than asked for");
      }
    }
    if (shape.with_positions) result.selections.resize(count);
  }
  return absl::OkStatus();
}

bool TakeState(const SearchShape& shape, proto::DType dtype, PayloadReader& payload,
               SearchResponse& out) {
  if (dtype != proto::DTYPE_FP16 && dtype != proto::DTYPE_UNSPECIFIED) return false;
  std::vector<absl::Span<const uint16_t>> halves(shape.items.size());
  size_t elements = 0;
  for (size_t i = 0; i < shape.items.size(); ++i) {
    const SearchShape::Item& item = shape.items[i];
    const uint64_t heads = Product({item.tokens, item.kv_heads, item.shape.Group()});
    const uint64_t count = Product({heads, item.shape.value_dim});
    const bool there = dtype == proto::DTYPE_FP16 ? payload.View(count, halves[i])
                                                  : payload.View(count, out.items[i].out);
    if (!there || !payload.View(heads, out.items[i].lse)) return false;
    elements += halves[i].size();
  }
  if (elements == 0) return true;
  const std::shared_ptr<float[]> states(new float[elements]);
  float* next = states.get();
  for (size_t i = 0; i < halves.size(); ++i) {
    kernels::ConvertToFloat(halves[i].data(), DType::kFp16, halves[i].size(), next);
    out.items[i].out = {next, halves[i].size()};
    next += halves[i].size();
  }
  out.states = states;
  return true;
}

/// For each item and selection the number of positions that are not held.
std::vector<std::vector<size_t>> CountRows(const SearchShape& shape, const SearchResponse& out) {
  std::vector<std::vector<size_t>> rows(shape.items.size());
  for (size_t i = 0; i < shape.items.size(); ++i) {
    const SearchShape::Item& item = shape.items[i];
    const uint32_t* held = item.held.data();
    for (const Selection& selection : out.items[i].selections) {
      const absl::Span<const int64_t> positions = selection.positions;
      size_t common = 0;
      if (!item.held_counts.empty()) {
        const uint32_t* const end = held + item.held_counts[rows[i].size()];
        for (auto position = positions.begin(); position != positions.end() && held != end;) {
          if (*position == *held) ++common;
          if (*position < *held) {
            ++position;
          } else {
            ++held;
          }
        }
        held = end;
      }
      rows[i].push_back(positions.size() - common);
    }
  }
  return rows;
}

bool TakeRows(const SearchShape& shape, const std::vector<std::vector<size_t>>& rows,
              PayloadReader& payload, uint32_t ModelShape::*dim,
              absl::Span<const uint16_t> Selection::*member, SearchResponse& out) {
  for (size_t i = 0; i < shape.items.size(); ++i) {
    const uint32_t width = shape.items[i].shape.*dim;
    const uint64_t all = std::accumulate(rows[i].begin(), rows[i].end(), uint64_t{0});
    absl::Span<const uint16_t> part;
    if (!payload.View(Product({all, width}), part)) return false;
    for (size_t s = 0; s < rows[i].size(); ++s) {
      const size_t elements = rows[i][s] * width;
      out.items[i].selections[s].*member = part.first(elements);
      part.remove_prefix(elements);
    }
  }
  return true;
}

bool Ascending(absl::Span<const int64_t> positions) {
  return (positions.empty() || positions.front() >= 0) &&
         std::adjacent_find(positions.begin(), positions.end(), std::greater_equal<>()) ==
             positions.end();
}

template <typename Counts>
bool SumFits(const Counts& counts, const Answer& answer) {
  uint64_t sum = 0;
  for (const uint32_t count : counts) sum += count;
  return sum <= answer.payload_bytes / sizeof(int64_t);
}

/// Positions of all results, in one part.
template <typename Counts>
bool TakePositions(const Counts& counts, PayloadReader& payload, SearchResponse& out) {
  uint64_t sum = 0;
  for (const uint32_t count : counts) sum += count;
  absl::Span<const int64_t> all;
  if (!payload.View(sum, all)) return false;
  int next = 0;
  for (ItemResult& item : out.items) {
    for (Selection& selection : item.selections) {
      const uint32_t count = counts.Get(next++);
      selection.positions = all.first(count);
      all.remove_prefix(count);
      if (!Ascending(selection.positions)) return false;
    }
  }
  return true;
}

absl::StatusOr<SearchResponse> DecodeAttendAnswer(const SearchShape& shape, const Answer& answer) {
  MessageMemory memory;
  const auto message = memory.Parse<proto::AttendResponse>(answer);
  if (!message.ok()) return message.status();
  SearchResponse response;
  const absl::Status status = MakeItems(shape, **message, response);
  if (!status.ok()) return status;
  PayloadReader payload(answer);
  const auto& counts = (*message)->position_counts();
  if (!TakeState(shape, (*message)->state_dtype(), payload, response) || !SumFits(counts, answer) ||
      !TakePositions(counts, payload, response) || !payload.AtEnd()) {
    return Malformed("payload");
  }
  return response;
}

absl::StatusOr<SearchResponse> DecodeTopKAnswer(const SearchShape& shape, const Answer& answer) {
  MessageMemory memory;
  const auto message = memory.Parse<proto::TopKResponse>(answer);
  if (!message.ok()) return message.status();
  SearchResponse response;
  const absl::Status status = MakeItems(shape, **message, response);
  if (!status.ok()) return status;
  PayloadReader payload(answer);
  const auto& counts = (*message)->position_counts();
  bool whole = SumFits(counts, answer) && TakePositions(counts, payload, response);
  if (whole && shape.with_rows) {
    const std::vector<std::vector<size_t>> rows = CountRows(shape, response);
    whole = TakeRows(shape, rows, payload, &ModelShape::key_dim, &Selection::keys, response) &&
            TakeRows(shape, rows, payload, &ModelShape::value_dim, &Selection::values, response);
  }
  if (whole && shape.with_state) {
    whole = TakeState(shape, (*message)->state_dtype(), payload, response);
  }
  if (!whole || !payload.AtEnd()) return Malformed("payload");
  return response;
}

}  // namespace

absl::StatusOr<Session> DecodeOpen(const ModelShape& shape, const Answer& answer) {
  const auto message = Parse<proto::OpenSessionResponse>(answer);
  if (!message.ok()) return message.status();
  return MakeSession(message->session(), shape);
}

absl::StatusOr<uint64_t> DecodeAppend(const Answer& answer) {
  const auto message = Parse<proto::AppendResponse>(answer);
  if (!message.ok()) return message.status();
  return message->tokens_held();
}

SearchShape ShapeOf(const AttendRequest& request) {
  SearchShape shape;
  shape.items = ItemsOf(request);
  shape.with_positions = request.options.list_read;
  return shape;
}

SearchShape ShapeOf(const TopKRequest& request) {
  SearchShape shape;
  shape.items = ItemsOf(request);
  shape.k = request.k;
  shape.with_positions = true;
  shape.with_rows = request.with_rows;
  shape.with_state = request.with_state;
  return shape;
}

absl::StatusOr<SearchResponse> DecodeSearch(const SearchShape& shape, const Answer& answer) {
  absl::StatusOr<SearchResponse> response =
      shape.k.has_value() ? DecodeTopKAnswer(shape, answer) : DecodeAttendAnswer(shape, answer);
  if (response.ok()) {
    response->payload = answer.payload;
    response->bytes_sent = answer.bytes_sent;
    response->bytes_received = answer.bytes_received;
  }
  return response;
}

absl::StatusOr<Rows> DecodeFetchRows(const ModelShape& shape, size_t count, const Answer& answer) {
  const auto message = Parse<proto::FetchRowsResponse>(answer);
  if (!message.ok()) return message.status();
  Rows rows;
  PayloadReader payload(answer);
  if (!payload.Take(Product({count, shape.key_dim}), rows.keys) ||
      !payload.Take(Product({count, shape.value_dim}), rows.values) || !payload.AtEnd()) {
    return Malformed("payload");
  }
  return rows;
}

absl::StatusOr<Session> DecodeFork(const ModelShape& shape, const Answer& answer) {
  const auto message = Parse<proto::ForkResponse>(answer);
  if (!message.ok()) return message.status();
  return MakeSession(message->session(), shape);
}

absl::Status DecodeTruncate(const Answer& answer) {
  return Parse<proto::TruncateResponse>(answer).status();
}
absl::Status DecodeClose(const Answer& answer) {
  return Parse<proto::CloseSessionResponse>(answer).status();
}

absl::StatusOr<DaemonStats> DecodeStats(const Answer& answer) {
  const auto message = Parse<proto::StatsResponse>(answer);
  if (!message.ok()) return message.status();
  DaemonStats stats;
  stats.uptime = ToMilliseconds(message->uptime_ms());
  stats.memory_used_bytes = message->memory_used_bytes();
  stats.memory_limit_bytes = message->memory_limit_bytes();
  stats.sessions_open = message->sessions_open();
  stats.connections_open = message->connections_open();
  stats.queue_depth = message->queue_depth();
  stats.queue_limit = message->queue_limit();
  stats.workers = message->workers();
  stats.simd_level = message->simd_level();
  for (const proto::Counter& counter : message->counters()) {
    stats.counters[counter.name()] = counter.value();
  }
  for (const proto::SessionInfo& from : message->sessions()) {
    SessionStats& to = stats.sessions.emplace_back();
    ModelShape shape;
    shape.layers = from.shape().layers();
    shape.kv_heads = from.shape().kv_heads();
    shape.query_heads = from.shape().query_heads();
    shape.key_dim = from.shape().key_dim();
    shape.value_dim = from.shape().value_dim();
    shape.dtype = static_cast<DType>(from.shape().dtype());
    shape.softmax_scale = from.shape().softmax_scale();
    if (const absl::Status status = CheckShape(shape, "shape."); !status.ok()) {
      return Malformed(status.message());
    }
    to.session = MakeSession(from.session(), shape);
    to.name = from.name();
    to.tokens.assign(from.tokens().begin(), from.tokens().end());
    to.bytes = from.bytes();
    to.idle = ToMilliseconds(from.idle_ms());
    to.lease = ToMilliseconds(from.lease_ms());
    to.scan_bits = from.scan_bits();
    to.error_target = from.error_target();
    to.landmarks_given = from.landmarks_given();
    if (from.has_landmark()) {
      to.landmark = {.summary = ToSummary(from.landmark().summary()),
                     .block = from.landmark().block()};
    }
    to.model = from.model();
    to.planner_audits = from.planner_audits();
    for (const proto::BuiltIndexInfo& built : from.built()) {
      to.built.push_back({ToIndexKind(built.index()), built.tokens_covered(), built.bytes()});
    }
  }
  return stats;
}

absl::StatusOr<HeadPlan> DecodePlanOf(const Session& session, const Answer& answer) {
  const auto message = Parse<proto::StatsResponse>(answer);
  if (!message.ok()) return message.status();
  for (const proto::SessionInfo& info : message->sessions()) {
    if (info.session().boot_id() != session.boot_id ||
        info.session().session_id() != session.session_id) {
      continue;
    }
    if (!info.has_plan()) return HeadPlan();
    if (!proto::CheckHeadPlan(info.plan()).ok()) return Malformed("plan");
    return FromMessage(info.plan());
  }
  return proto::FieldError(absl::StatusCode::kNotFound, "session",
                           "the daemon lists no such session");
}

absl::Status DecodeHealth(const Answer& answer) {
  const auto message = Parse<proto::HealthResponse>(answer);
  if (!message.ok()) return message.status();
  return message->serving() ? absl::OkStatus() : absl::UnavailableError("the daemon is stopping");
}

}  // namespace kvseek::client
