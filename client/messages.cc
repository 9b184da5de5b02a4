#include "client/messages.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"

namespace kvseek::client {
namespace {

using proto::Op;

constexpr uint64_t kPayloadMax = std::numeric_limits<uint32_t>::max();

absl::Status Invalid(absl::string_view field, absl::string_view message) {
  return proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
}
absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("malformed answer: ", what));
}

/// Saturates, so that a product of hostile sizes is too large and not small.
uint64_t Product(std::initializer_list<uint64_t> factors) {
  uint64_t product = 1;
  for (const uint64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      return std::numeric_limits<uint64_t>::max();
    }
  }
  return product;
}

template <typename T>
Message Serialise(Op op, const T& message) {
  Message out;
  out.op = op;
  out.metadata = message.SerializeAsString();
  return out;
}

template <typename T>
absl::StatusOr<T> Parse(const Answer& answer) {
  T message;
  if (!message.ParseFromString(answer.metadata)) return Malformed("metadata");
  return message;
}

/// Lays the parts out in message.payload. One part is sent from where it is; more are brought
/// together, since the payload's checksum runs over all of it.
absl::Status SetPayload(const std::vector<absl::Span<const uint8_t>>& parts, Message& message) {
  proto::PayloadLayout layout;
  std::vector<size_t> offsets;
  offsets.reserve(parts.size());
  for (const auto& part : parts) offsets.push_back(layout.Add(part.size()));
  if (layout.bytes() > kPayloadMax) {
    return Invalid("payload", absl::StrCat(layout.bytes(), " bytes in one request"));
  }
  if (parts.size() == 1) {
    message.payload = parts.front();
    return absl::OkStatus();
  }
  message.owned.reset(new uint8_t[layout.bytes()]);
  size_t end = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].empty()) continue;
    std::memset(message.owned.get() + end, 0, offsets[i] - end);
    std::memcpy(message.owned.get() + offsets[i], parts[i].data(), parts[i].size());
    end = offsets[i] + parts[i].size();
  }
  message.payload = {message.owned.get(), layout.bytes()};
  return absl::OkStatus();
}

/// Takes a payload apart, in the order in which it was laid out.
class PayloadReader {
 public:
  explicit PayloadReader(const Answer& answer)
      : data_(answer.payload.get()), bytes_(answer.payload_bytes) {}

  /// The next part, `count` elements of T; false if the payload does not have so many.
  template <typename T>
  bool Take(uint64_t count, std::vector<T>& out) {
    if (count > bytes_ / sizeof(T)) return false;
    const size_t offset = layout_.Add(count * sizeof(T));
    if (layout_.bytes() > bytes_) return false;
    out.resize(count);
    if (count != 0) std::memcpy(out.data(), data_ + offset, count * sizeof(T));
    return true;
  }
  bool AtEnd() const { return layout_.bytes() == bytes_; }

 private:
  const uint8_t* data_;
  size_t bytes_;
  proto::PayloadLayout layout_;
};

// ---- shapes and handles

absl::Status CheckShape(const ModelShape& shape, absl::string_view prefix) {
  const auto field = [prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (shape.layers == 0) return Invalid(field("layers"), "must not be 0");
  if (shape.kv_heads == 0) return Invalid(field("kv_heads"), "must not be 0");
  if (shape.query_heads == 0 || shape.query_heads % shape.kv_heads != 0) {
    return Invalid(field("query_heads"), "must be a multiple of kv_heads");
  }
  if (shape.key_dim == 0) return Invalid(field("key_dim"), "must not be 0");
  if (shape.value_dim == 0) return Invalid(field("value_dim"), "must not be 0");
  if (shape.dtype != DType::kBf16 && shape.dtype != DType::kFp16) {
    return Invalid(field("dtype"), "must be bf16 or fp16");
  }
  return absl::OkStatus();
}

absl::Status CheckLayer(const Session& session, uint32_t layer, absl::string_view prefix) {
  if (layer >= session.shape.layers) {
    return Invalid(absl::StrCat(prefix, "layer"),
                   absl::StrCat(layer, " of ", session.shape.layers));
  }
  return absl::OkStatus();
}

void SetSession(const Session& session, proto::SessionRef* ref) {
  ref->set_boot_id(session.boot_id);
  ref->set_session_id(session.session_id);
}

Session MakeSession(const proto::SessionRef& ref, const ModelShape& shape) {
  return {ref.boot_id(), ref.session_id(), shape};
}

uint64_t Milliseconds(std::chrono::milliseconds duration) {
  return static_cast<uint64_t>(std::max<int64_t>(0, duration.count()));
}

std::chrono::milliseconds ToMilliseconds(uint64_t count) {
  constexpr uint64_t kMax = 1ULL << 53;
  return std::chrono::milliseconds(static_cast<int64_t>(std::min(count, kMax)));
}

IndexKind ToIndexKind(proto::IndexKind kind) {
  switch (kind) {
    case proto::INDEX_EXACT:
      return IndexKind::kExact;
    case proto::INDEX_LADDER:
      return IndexKind::kLadder;
    default:
      return IndexKind::kAuto;
  }
}

// ---- searches

absl::Status CheckItem(const QueryItem& item, DType query_dtype, absl::string_view prefix) {
  absl::Status status = CheckShape(item.session.shape, absl::StrCat(prefix, "session.shape."));
  if (!status.ok()) return status;
  status = CheckLayer(item.session, item.layer, prefix);
  if (!status.ok()) return status;
  if (item.tokens == 0) return Invalid(absl::StrCat(prefix, "tokens"), "must not be 0");
  const uint64_t bytes = Product({item.tokens, item.session.shape.query_heads,
                                  item.session.shape.key_dim, kernels::DTypeBytes(query_dtype)});
  if (item.queries.size() != bytes) {
    return Invalid(absl::StrCat(prefix, "queries"),
                   absl::StrCat(item.queries.size(), " bytes, its shape has ", bytes));
  }
  if (item.range_end.size() > 1 && item.range_end.size() != item.tokens) {
    return Invalid(absl::StrCat(prefix, "range_end"), "must have none, one, or one a token");
  }
  for (const uint64_t end : item.range_end) {
    if (end < item.range_begin) {
      return Invalid(absl::StrCat(prefix, "range_end"), "is before range_begin");
    }
  }
  return absl::OkStatus();
}

/// Fills what AttendRequest and TopKRequest have in common.
template <typename Request, typename Proto>
absl::Status FillSearch(const Request& request, Proto& message, Message& out) {
  if (request.items.empty()) return Invalid("items", "must not be empty");
  if (kernels::DTypeBytes(request.query_dtype) == 0) return Invalid("query_dtype", "not a dtype");
  std::vector<absl::Span<const uint8_t>> parts;
  for (size_t i = 0; i < request.items.size(); ++i) {
    const QueryItem& item = request.items[i];
    absl::Status status = CheckItem(item, request.query_dtype, absl::StrCat("items[", i, "]."));
    if (!status.ok()) return status;
    proto::QueryItem& to = *message.add_items();
    SetSession(item.session, to.mutable_session());
    to.set_layer(item.layer);
    to.set_tokens(item.tokens);
    to.set_range_begin(item.range_begin);
    for (const uint64_t end : item.range_end) to.add_range_end(end);
    parts.push_back(item.queries);
  }
  message.set_query_dtype(static_cast<proto::DType>(request.query_dtype));
  const SearchOptions& options = request.options;
  proto::SearchOptions& to = *message.mutable_options();
  to.set_index(static_cast<proto::IndexKind>(options.index));
  if (options.candidates.has_value()) to.set_candidates(*options.candidates);
  if (options.exact_rows.has_value()) to.set_exact_rows(*options.exact_rows);
  to.set_audit_samples(options.audit_samples);
  to.set_seed(options.seed);
  to.set_list_read(options.list_read);
  return SetPayload(parts, out);
}

template <typename Request>
std::vector<SearchShape::Item> ItemsOf(const Request& request) {
  std::vector<SearchShape::Item> items;
  items.reserve(request.items.size());
  for (const QueryItem& item : request.items) items.push_back({item.tokens, item.session.shape});
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
  return report;
}

/// Checks the counts of an answer and makes its items, with reports and empty selections of the
/// right sizes.
template <typename Proto>
absl::Status MakeItems(const SearchShape& shape, const Proto& message, SearchResponse& out) {
  uint64_t results = 0;
  for (const auto& item : shape.items) results += uint64_t{item.tokens} * item.shape.kv_heads;
  if (static_cast<uint64_t>(message.reports_size()) != results) return Malformed("reports");
  if (static_cast<uint64_t>(message.position_counts_size()) !=
      (shape.with_positions ? results : 0)) {
    return Malformed("position_counts");
  }
  int next = 0;
  for (const auto& item : shape.items) {
    ItemResult& result = out.items.emplace_back();
    const uint64_t count = uint64_t{item.tokens} * item.shape.kv_heads;
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

bool TakeState(const SearchShape& shape, PayloadReader& payload, SearchResponse& out) {
  for (size_t i = 0; i < shape.items.size(); ++i) {
    const SearchShape::Item& item = shape.items[i];
    const uint64_t heads = Product({item.tokens, item.shape.query_heads});
    if (!payload.Take(Product({heads, item.shape.value_dim}), out.items[i].out)) return false;
    if (!payload.Take(heads, out.items[i].lse)) return false;
  }
  return true;
}

bool TakeRows(const SearchShape& shape, PayloadReader& payload, uint32_t ModelShape::*dim,
              std::vector<uint16_t> Selection::*member, SearchResponse& out) {
  std::vector<uint16_t> rows;
  for (size_t i = 0; i < shape.items.size(); ++i) {
    const uint32_t width = shape.items[i].shape.*dim;
    uint64_t positions = 0;
    for (const Selection& selection : out.items[i].selections) {
      positions += selection.positions.size();
    }
    if (!payload.Take(Product({positions, width}), rows)) return false;
    const uint16_t* from = rows.data();
    for (Selection& selection : out.items[i].selections) {
      const size_t count = selection.positions.size() * width;
      (selection.*member).assign(from, from + count);
      from += count;
    }
  }
  return true;
}

bool Ascending(const std::vector<int64_t>& positions) {
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
  std::vector<int64_t> all;
  if (!payload.Take(sum, all)) return false;
  const int64_t* from = all.data();
  int next = 0;
  for (ItemResult& item : out.items) {
    for (Selection& selection : item.selections) {
      const uint32_t count = counts.Get(next++);
      selection.positions.assign(from, from + count);
      from += count;
      if (!Ascending(selection.positions)) return false;
    }
  }
  return true;
}

absl::StatusOr<SearchResponse> DecodeAttendAnswer(const SearchShape& shape, const Answer& answer) {
  const auto message = Parse<proto::AttendResponse>(answer);
  if (!message.ok()) return message.status();
  SearchResponse response;
  const absl::Status status = MakeItems(shape, *message, response);
  if (!status.ok()) return status;
  PayloadReader payload(answer);
  if (!TakeState(shape, payload, response) || !SumFits(message->position_counts(), answer) ||
      !TakePositions(message->position_counts(), payload, response) || !payload.AtEnd()) {
    return Malformed("payload");
  }
  return response;
}

absl::StatusOr<SearchResponse> DecodeTopKAnswer(const SearchShape& shape, const Answer& answer) {
  const auto message = Parse<proto::TopKResponse>(answer);
  if (!message.ok()) return message.status();
  SearchResponse response;
  const absl::Status status = MakeItems(shape, *message, response);
  if (!status.ok()) return status;
  PayloadReader payload(answer);
  bool whole = SumFits(message->position_counts(), answer) &&
               TakePositions(message->position_counts(), payload, response);
  if (whole && shape.with_rows) {
    whole = TakeRows(shape, payload, &ModelShape::key_dim, &Selection::keys, response) &&
            TakeRows(shape, payload, &ModelShape::value_dim, &Selection::values, response);
  }
  if (whole && shape.with_state) whole = TakeState(shape, payload, response);
  if (!whole || !payload.AtEnd()) return Malformed("payload");
  return response;
}

}  // namespace

// ---- sessions

absl::StatusOr<Message> EncodeOpen(const ModelShape& shape, const OpenOptions& options) {
  const absl::Status status = CheckShape(shape, "shape.");
  if (!status.ok()) return status;
  proto::OpenSessionRequest request;
  proto::ModelShape& to = *request.mutable_shape();
  to.set_layers(shape.layers);
  to.set_kv_heads(shape.kv_heads);
  to.set_query_heads(shape.query_heads);
  to.set_key_dim(shape.key_dim);
  to.set_value_dim(shape.value_dim);
  to.set_dtype(static_cast<proto::DType>(shape.dtype));
  to.set_softmax_scale(shape.softmax_scale);
  request.set_lease_ms(Milliseconds(options.lease));
  request.set_scan_bits(options.scan_bits);
  request.set_tokens_expected(options.tokens_expected);
  request.set_name(options.name);
  return Serialise(Op::kOpenSession, request);
}

absl::StatusOr<Session> DecodeOpen(const ModelShape& shape, const Answer& answer) {
  const auto message = Parse<proto::OpenSessionResponse>(answer);
  if (!message.ok()) return message.status();
  return MakeSession(message->session(), shape);
}

absl::StatusOr<Message> EncodeAppend(const Session& session, uint32_t layer, uint64_t start,
                                     uint32_t tokens, absl::Span<const uint16_t> keys,
                                     absl::Span<const uint16_t> values) {
  const ModelShape& shape = session.shape;
  absl::Status status = CheckShape(shape, "session.shape.");
  if (!status.ok()) return status;
  status = CheckLayer(session, layer, "");
  if (!status.ok()) return status;
  const auto check = [&](absl::string_view field, size_t size, uint32_t dim) {
    const uint64_t expected = Product({tokens, shape.kv_heads, dim});
    if (size == expected) return absl::OkStatus();
    return Invalid(field, absl::StrCat(size, " elements, its shape has ", expected));
  };
  status = check("keys", keys.size(), shape.key_dim);
  if (!status.ok()) return status;
  status = check("values", values.size(), shape.value_dim);
  if (!status.ok()) return status;
  proto::AppendRequest request;
  SetSession(session, request.mutable_session());
  request.set_layer(layer);
  request.set_start(start);
  request.set_tokens(tokens);
  Message message = Serialise(Op::kAppend, request);
  status = SetPayload({AsBytes(keys), AsBytes(values)}, message);
  if (!status.ok()) return status;
  return message;
}

absl::StatusOr<uint64_t> DecodeAppend(const Answer& answer) {
  const auto message = Parse<proto::AppendResponse>(answer);
  if (!message.ok()) return message.status();
  return message->tokens_held();
}

absl::StatusOr<Message> EncodeFork(const Session& session, std::optional<uint64_t> tokens,
                                   const OpenOptions& options) {
  proto::ForkRequest request;
  SetSession(session, request.mutable_session());
  if (tokens.has_value()) request.set_tokens(*tokens);
  request.set_lease_ms(Milliseconds(options.lease));
  request.set_name(options.name);
  return Serialise(Op::kFork, request);
}

absl::StatusOr<Session> DecodeFork(const ModelShape& shape, const Answer& answer) {
  const auto message = Parse<proto::ForkResponse>(answer);
  if (!message.ok()) return message.status();
  return MakeSession(message->session(), shape);
}

Message EncodeTruncate(const Session& session, uint64_t tokens) {
  proto::TruncateRequest request;
  SetSession(session, request.mutable_session());
  request.set_tokens(tokens);
  return Serialise(Op::kTruncate, request);
}

Message EncodeClose(const Session& session) {
  proto::CloseSessionRequest request;
  SetSession(session, request.mutable_session());
  return Serialise(Op::kCloseSession, request);
}

absl::Status DecodeTruncate(const Answer& answer) {
  return Parse<proto::TruncateResponse>(answer).status();
}
absl::Status DecodeClose(const Answer& answer) {
  return Parse<proto::CloseSessionResponse>(answer).status();
}

// ---- searches and rows

absl::StatusOr<Message> EncodeAttend(const AttendRequest& request) {
  proto::AttendRequest message;
  Message out;
  const absl::Status status = FillSearch(request, message, out);
  if (!status.ok()) return status;
  out.op = Op::kAttend;
  out.metadata = message.SerializeAsString();
  return out;
}

absl::StatusOr<Message> EncodeTopK(const TopKRequest& request) {
  proto::TopKRequest message;
  Message out;
  const absl::Status status = FillSearch(request, message, out);
  if (!status.ok()) return status;
  message.set_k(request.k);
  message.set_with_rows(request.with_rows);
  message.set_with_state(request.with_state);
  out.op = Op::kTopK;
  out.metadata = message.SerializeAsString();
  return out;
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
    response->bytes_sent = answer.bytes_sent;
    response->bytes_received = answer.bytes_received;
  }
  return response;
}

absl::StatusOr<Message> EncodeFetchRows(const Session& session, uint32_t layer, uint32_t kv_head,
                                        absl::Span<const int64_t> positions) {
  absl::Status status = CheckShape(session.shape, "session.shape.");
  if (!status.ok()) return status;
  status = CheckLayer(session, layer, "");
  if (!status.ok()) return status;
  if (kv_head >= session.shape.kv_heads) {
    return Invalid("kv_head", absl::StrCat(kv_head, " of ", session.shape.kv_heads));
  }
  proto::FetchRowsRequest request;
  SetSession(session, request.mutable_session());
  request.set_layer(layer);
  request.set_kv_head(kv_head);
  request.set_count(static_cast<uint32_t>(positions.size()));
  Message message = Serialise(Op::kFetchRows, request);
  status = SetPayload({AsBytes(positions)}, message);
  if (!status.ok()) return status;
  return message;
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

// ---- the daemon

Message EncodeStats(bool with_sessions) {
  proto::StatsRequest request;
  request.set_with_sessions(with_sessions);
  return Serialise(Op::kStats, request);
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
  }
  return stats;
}

Message EncodeHealth() { return Serialise(Op::kHealth, proto::HealthRequest()); }

absl::Status DecodeHealth(const Answer& answer) {
  const auto message = Parse<proto::HealthResponse>(answer);
  if (!message.ok()) return message.status();
  return message->serving() ? absl::OkStatus() : absl::UnavailableError("the daemon is stopping");
}

}  // namespace kvseek::client
