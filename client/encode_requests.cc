#include "client/encode_requests.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "client/head_plan_message.h"
#include "client/shape_checks.h"
#include "proto/head_plan_file.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"

namespace kvseek::client {
namespace {

using proto::Op;

constexpr uint64_t kPayloadMax = std::numeric_limits<uint32_t>::max();

absl::Status Invalid(absl::string_view field, absl::string_view message) {
  return proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
}

template <typename T>
Message Serialise(Op op, const T& message) {
  Message out;
  out.op = op;
  out.metadata = message.SerializeAsString();
  return out;
}

/// Whether the parts stand in memory as they stand in the payload, without a byte between them.
bool AreInPlace(const std::vector<Message::Part>& parts) {
  size_t end = 0;
  for (const Message::Part& part : parts) {
    if (part.offset != end || part.bytes.data() != parts.front().bytes.data() + end) return false;
    end += part.bytes.size();
  }
  return true;
}

/// When the parts of a payload are read.
enum class Reading {
  kAtStart,  ///< copied by Start
  kAsSent,   ///< until the request's answer; saves the copy
};

/// Lays the parts out in message.payload. What stands in memory as it is to stand there, as one
/// part always does, is sent from where it is.
absl::Status SetPayload(const std::vector<absl::Span<const uint8_t>>& parts, Reading reading,
                        Message& message) {
  proto::PayloadLayout layout;
  message.parts.reserve(parts.size());
  for (const auto& part : parts) {
    const size_t offset = layout.Add(part.size());
    if (!part.empty()) message.parts.push_back({part, offset});
  }
  if (layout.bytes() > kPayloadMax) {
    return Invalid("payload", absl::StrCat(layout.bytes(), " bytes in one request"));
  }
  if (AreInPlace(message.parts)) {
    if (!message.parts.empty()) {
      message.payload = {message.parts.front().bytes.data(), layout.bytes()};
    }
    message.parts.clear();
    return absl::OkStatus();
  }
  message.payload = {static_cast<const uint8_t*>(nullptr), layout.bytes()};
  if (reading == Reading::kAtStart) message.MakeOwned();
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

uint64_t Milliseconds(std::chrono::milliseconds duration) {
  return static_cast<uint64_t>(std::max<int64_t>(0, duration.count()));
}

absl::Status CheckHeads(const QueryItem& item, absl::string_view prefix) {
  uint32_t lowest = 0;
  for (size_t i = 0; i < item.kv_heads.size(); ++i) {
    const uint32_t head = item.kv_heads[i];
    if (head < lowest || head >= item.session.shape.kv_heads) {
      return Invalid(absl::StrCat(prefix, "kv_heads[", i, "]"),
                     absl::StrCat("must be more than the one before and one of the ",
                                  item.session.shape.kv_heads, " KV heads, not ", head));
    }
    lowest = head + 1;
  }
  return absl::OkStatus();
}

/// Lengths only; what stands in the lists, the daemon checks.
absl::Status CheckHeld(const QueryItem& item, absl::string_view prefix) {
  const uint64_t lists = Product({item.tokens, item.KvHeads()});
  if (!item.held_counts.empty() && item.held_counts.size() != lists) {
    return Invalid(absl::StrCat(prefix, "held_counts"),
                   absl::StrCat("must have none or ", lists, ", one for each (token, KV head)"));
  }
  const uint64_t sum =
      std::accumulate(item.held_counts.begin(), item.held_counts.end(), uint64_t{0});
  if (item.held.size() == sum) return absl::OkStatus();
  return Invalid(absl::StrCat(prefix, "held"),
                 absl::StrCat(item.held.size(), " positions, held_counts has ", sum));
}

absl::Status CheckRange(const QueryItem& item, absl::string_view prefix) {
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

absl::Status CheckItem(const QueryItem& item, DType query_dtype, absl::string_view prefix) {
  absl::Status status = CheckShape(item.session.shape, absl::StrCat(prefix, "session.shape."));
  if (!status.ok()) return status;
  status = CheckLayer(item.session, item.layer, prefix);
  if (!status.ok()) return status;
  if (item.tokens == 0) return Invalid(absl::StrCat(prefix, "tokens"), "must not be 0");
  status = CheckHeads(item, prefix);
  if (!status.ok()) return status;
  const uint64_t bytes = Product({item.tokens, item.QueryHeads(), item.session.shape.key_dim,
                                  kernels::DTypeBytes(query_dtype)});
  if (item.queries.size() != bytes) {
    return Invalid(absl::StrCat(prefix, "queries"),
                   absl::StrCat(item.queries.size(), " bytes, its shape has ", bytes));
  }
  status = CheckRange(item, prefix);
  status.Update(CheckHeld(item, prefix));
  return status;
}

void FillShape(const ModelShape& shape, proto::ModelShape& to) {
  to.set_layers(shape.layers);
  to.set_kv_heads(shape.kv_heads);
  to.set_query_heads(shape.query_heads);
  to.set_key_dim(shape.key_dim);
  to.set_value_dim(shape.value_dim);
  to.set_dtype(static_cast<proto::DType>(shape.dtype));
  to.set_softmax_scale(shape.softmax_scale);
}

void FillOptions(const SearchOptions& options, proto::SearchOptions& to) {
  to.set_index(static_cast<proto::IndexKind>(options.index));
  if (options.candidates.has_value()) to.set_candidates(*options.candidates);
  if (options.exact_rows.has_value()) to.set_exact_rows(*options.exact_rows);
  to.set_audit_samples(options.audit_samples);
  to.set_seed(options.seed);
  to.set_list_read(options.list_read);
  to.set_leave_rest_out(options.leave_rest_out);
  to.set_exact_top(options.exact_top);
  to.set_mass(options.mass);
  to.set_beta(options.beta);
  if (options.threshold.has_value()) to.set_threshold(*options.threshold);
  if (options.vote.has_value()) to.set_vote(static_cast<proto::Vote>(*options.vote));
  to.set_reuse_steps(options.reuse_steps);
  to.set_reuse_keep(options.reuse_keep);
  to.set_search_time_us(static_cast<uint32_t>(
      std::clamp<int64_t>(options.search_time.count(), 0, std::numeric_limits<uint32_t>::max())));
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
    to.mutable_range_end()->Add(item.range_end.begin(), item.range_end.end());
    to.mutable_kv_heads()->Add(item.kv_heads.begin(), item.kv_heads.end());
    to.mutable_held_counts()->Add(item.held_counts.begin(), item.held_counts.end());
    parts.push_back(item.queries);
    if (!item.held.empty()) parts.push_back(AsBytes(item.held));
  }
  if (request.state_dtype == DType::kBf16) return Invalid("state_dtype", "must be fp32 or fp16");
  message.set_query_dtype(static_cast<proto::DType>(request.query_dtype));
  if (request.state_dtype == DType::kFp16) message.set_state_dtype(proto::DTYPE_FP16);
  FillOptions(request.options, *message.mutable_options());
  return SetPayload(parts, Reading::kAtStart, out);
}

}  // namespace

absl::StatusOr<Message> EncodeOpen(const ModelShape& shape, const OpenOptions& options) {
  const absl::Status status = CheckShape(shape, "shape.");
  if (!status.ok()) return status;
  proto::OpenSessionRequest request;
  FillShape(shape, *request.mutable_shape());
  request.set_lease_ms(Milliseconds(options.lease));
  request.set_scan_bits(options.scan_bits);
  request.set_tokens_expected(options.tokens_expected);
  request.set_name(options.name);
  for (const IndexKind kind : options.build) {
    request.add_build(static_cast<proto::IndexKind>(kind));
  }
  if (options.plan.has_value()) {
    *request.mutable_plan() = ToMessage(*options.plan);
    absl::Status good = proto::CheckHeadPlan(request.plan(), "plan.");
    good.Update(proto::CheckHeadPlanFits(request.plan(), shape.layers, shape.kv_heads, "plan."));
    if (!good.ok()) return good;
  }
  request.set_error_target(options.error_target);
  if (options.landmark.has_value()) {
    proto::LandmarkOptions& landmark = *request.mutable_landmark();
    landmark.set_summary(static_cast<proto::LandmarkSummary>(options.landmark->summary));
    landmark.set_block(options.landmark->block);
  }
  request.set_model(options.model);
  return Serialise(Op::kOpenSession, request);
}

absl::StatusOr<Message> EncodeAppend(const Session& session, uint32_t layer, uint64_t start,
                                     uint32_t tokens, absl::Span<const LayerTensors> layers,
                                     const SampledQueries& queries, const LandmarkKeys& landmarks) {
  const ModelShape& shape = session.shape;
  absl::Status status = CheckShape(shape, "session.shape.");
  if (!status.ok()) return status;
  status = CheckLayer(session, layer, "");
  if (!status.ok()) return status;
  if (layers.empty() || layers.size() > shape.layers - layer) {
    return Invalid("layers",
                   absl::StrCat(layers.size(), " from layer ", layer, " of ", shape.layers, " on"));
  }
  const auto check = [&](const std::string& field, size_t size, uint64_t expected) {
    if (size == expected) return absl::OkStatus();
    return Invalid(field, absl::StrCat(size, " elements, its shape has ", expected));
  };
  const auto name = [&](size_t i, const char* tensor) {
    return layers.size() == 1 ? tensor : absl::StrCat("layers[", i, "].", tensor);
  };
  std::vector<absl::Span<const uint8_t>> parts;
  parts.reserve(2 * layers.size() + 1);
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerTensors& rows = layers[i];
    status =
        check(name(i, "keys"), rows.keys.size(), Product({tokens, shape.kv_heads, shape.key_dim}));
    status.Update(check(name(i, "values"), rows.values.size(),
                        Product({tokens, shape.kv_heads, shape.value_dim})));
    if (!status.ok()) return status;
    parts.push_back(AsBytes(rows.keys));
    parts.push_back(AsBytes(rows.values));
  }
  status = check("queries.rows", queries.rows.size(),
                 Product({queries.positions.size(), shape.query_heads, shape.key_dim}));
  status.Update(check("landmarks.rows", landmarks.rows.size(),
                      Product({landmarks.positions.size(), shape.kv_heads, shape.key_dim})));
  if (!status.ok()) return status;
  parts.push_back(AsBytes(queries.rows));
  parts.push_back(AsBytes(landmarks.rows));
  proto::AppendRequest request;
  SetSession(session, request.mutable_session());
  request.set_layer(layer);
  request.set_start(start);
  request.set_tokens(tokens);
  request.mutable_query_positions()->Add(queries.positions.begin(), queries.positions.end());
  request.mutable_landmark_positions()->Add(landmarks.positions.begin(), landmarks.positions.end());
  if (layers.size() > 1) request.set_layers(static_cast<uint32_t>(layers.size()));
  Message message = Serialise(Op::kAppend, request);
  status = SetPayload(parts, Reading::kAsSent, message);
  if (!status.ok()) return status;
  return message;
}

absl::StatusOr<Message> EncodeAttend(const AttendRequest& request) {
  for (size_t i = 0; i < request.items.size(); ++i) {
    if (request.items[i].held_counts.empty()) continue;
    return Invalid(absl::StrCat("items[", i, "].held_counts"), "is for TopK only");
  }
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
  status = SetPayload({AsBytes(positions)}, Reading::kAtStart, message);
  if (!status.ok()) return status;
  return message;
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

Message EncodeStats(bool with_sessions) {
  proto::StatsRequest request;
  request.set_with_sessions(with_sessions);
  return Serialise(Op::kStats, request);
}

Message EncodePlanOf(const Session& session) {
  proto::StatsRequest request;
  request.set_with_sessions(true);
  request.set_with_plans(true);
  request.set_session_id(session.session_id);
  return Serialise(Op::kStats, request);
}

Message EncodeHealth() { return Serialise(Op::kHealth, proto::HealthRequest()); }

absl::StatusOr<Message> EncodeOpenDoorbell(const DoorbellOptions& options) {
  absl::Status status = CheckShape(options.shape, "shape.");
  if (!status.ok()) return status;
  if (kernels::DTypeBytes(options.query_dtype) == 0) return Invalid("query_dtype", "not a dtype");
  proto::OpenDoorbellRequest request;
  FillShape(options.shape, *request.mutable_shape());
  request.mutable_kv_heads()->Add(options.kv_heads.begin(), options.kv_heads.end());
  request.set_items_max(options.items_max);
  request.set_tokens_max(options.tokens_max);
  request.set_query_dtype(static_cast<proto::DType>(options.query_dtype));
  FillOptions(options.search, *request.mutable_options());
  request.set_deadline_us(static_cast<uint32_t>(
      std::clamp<int64_t>(options.deadline.count(), 0, std::numeric_limits<uint32_t>::max())));
  return Serialise(Op::kOpenDoorbell, request);
}

}  // namespace kvseek::client
