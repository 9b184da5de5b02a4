#include "service/request_validation.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "index/key_index.h"
#include "kernels/dtype.h"
#include "proto/frame.h"
#include "proto/head_plan_file.h"
#include "service/field_checks.h"

namespace kvseek::service {
namespace {

using kernels::DType;

constexpr uint32_t kDimMax = 512;
constexpr uint32_t kDimUnit = 8;
constexpr float kScaleMax = 65504.0F;

absl::Status CheckDim(absl::string_view field, uint32_t dim) {
  if (dim >= kDimUnit && dim <= kDimMax && dim % kDimUnit == 0) return absl::OkStatus();
  return Invalid(
      field, absl::StrCat("must be a multiple of ", kDimUnit, " up to ", kDimMax, ", not ", dim));
}

/// The built indexes that a plan's heads ask for, as SessionSettings::build.
uint32_t BuildsOf(const proto::HeadPlan& plan) {
  uint32_t builds = 0;
  for (const proto::PlannedHead& head : plan.heads()) {
    if (head.mode() == proto::kHeadModeNames[1]) continue;  // local: asks for nothing
    const auto kind = BuiltKindOf(static_cast<proto::IndexKind>(proto::IndexNumber(head)));
    if (kind.has_value()) builds |= 1U << static_cast<uint32_t>(*kind);
  }
  return builds;
}

/// Positions of sampled queries: ascending, among those of the tokens that come with them.
absl::Status CheckQueryPositions(const proto::AppendRequest& message) {
  uint64_t least = message.start();
  const uint64_t end = message.start() + message.tokens();
  for (int i = 0; i < message.query_positions_size(); ++i) {
    const uint64_t position = message.query_positions(i);
    if (position < least || position >= end) {
      return Invalid(absl::StrCat("query_positions[", i, "]"),
                     absl::StrCat("must be more than the one before and one of [", message.start(),
                                  ", ", end, "), not ", position));
    }
    least = position + 1;
  }
  return absl::OkStatus();
}

/// Fills settings.landmark. REQUIRES: settings.build is filled.
absl::Status CheckLandmark(const proto::OpenSessionRequest& message, SessionSettings& settings) {
  if (!message.has_landmark()) return absl::OkStatus();
  if (!settings.Builds(index::BuiltKind::kLandmark)) {
    return Invalid("landmark", "is for sessions that build the landmark index");
  }
  switch (message.landmark().summary()) {
    case proto::LANDMARK_UNSPECIFIED:
    case proto::LANDMARK_BOUNDS:
      break;
    case proto::LANDMARK_MEAN:
      settings.landmark.summary = index::LandmarkSummary::kMean;
      break;
    case proto::LANDMARK_GIVEN:
      settings.landmark.summary = index::LandmarkSummary::kGiven;
      break;
    default:
      return Invalid("landmark.summary",
                     absl::StrCat("there is no summary ", message.landmark().summary()));
  }
  const uint32_t block = message.landmark().block();
  if (block == 0) return absl::OkStatus();
  if (block < index::kLandmarkBlockMin || block > index::kLandmarkBlockMax ||
      !std::has_single_bit(block)) {
    return Invalid("landmark.block",
                   absl::StrCat("must be a power of two between ", index::kLandmarkBlockMin,
                                " and ", index::kLandmarkBlockMax, ", or 0, not ", block));
  }
  settings.landmark.block = static_cast<int>(block);
  return absl::OkStatus();
}

/// First positions of blocks whose landmarks come: ascending, and their ends among the tokens that
/// come with them.
absl::Status CheckLandmarkPositions(const proto::AppendRequest& message,
                                    const SessionSettings& settings) {
  if (message.landmark_positions().empty()) return absl::OkStatus();
  if (!settings.TakesLandmarks()) {
    return proto::FieldError(absl::StatusCode::kFailedPrecondition, "landmark_positions",
                             "the session was not opened for landmarks of the client's");
  }
  const auto block = static_cast<uint64_t>(settings.landmark.block);
  const uint64_t end = message.start() + message.tokens();
  uint64_t least = 0;
  for (int i = 0; i < message.landmark_positions_size(); ++i) {
    const uint64_t position = message.landmark_positions(i);
    const bool inside =
        position <= end && position + block > message.start() && position + block <= end;
    if (position % block != 0 || position < least || !inside) {
      return Invalid(absl::StrCat("landmark_positions[", i, "]"),
                     absl::StrCat("must be more than the one before and begin a block of ", block,
                                  " tokens whose last is one of [", message.start(), ", ", end,
                                  "), not ", position));
    }
    least = position + block;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ParseMetadata(const std::string& metadata, google::protobuf::MessageLite& message) {
  if (message.ParseFromString(metadata)) return absl::OkStatus();
  return Invalid("metadata", "is not the message that the operation asks for");
}

absl::StatusOr<std::shared_ptr<Session>> RequestValidator::TakeSession(
    const proto::CloseSessionRequest& message, TimePoint now) const {
  if (!message.has_session()) return Invalid("session", "is missing");
  const proto::SessionRef& session = message.session();
  return store_.Close(session.boot_id(), session.session_id(), "session", now);
}

absl::Status RequestValidator::CheckNoPayload(size_t payload_bytes) {
  return CheckPayloadBytes(payload_bytes, 0);
}

absl::Status RequestValidator::CheckName(const std::string& name) {
  if (name.size() <= kSessionNameBytesMax) return absl::OkStatus();
  return Invalid("name", absl::StrCat("is longer than ", kSessionNameBytesMax, " bytes"));
}

std::chrono::milliseconds RequestValidator::Lease(uint64_t lease_ms) {
  using Count = std::chrono::milliseconds::rep;
  return std::chrono::milliseconds(
      static_cast<Count>(std::min<uint64_t>(lease_ms, std::numeric_limits<int32_t>::max())));
}

absl::StatusOr<std::shared_ptr<const proto::HeadPlan>> RequestValidator::CheckPlan(
    const proto::OpenSessionRequest& message) const {
  const proto::ModelShape& shape = message.shape();
  const auto same_bits = [&](const proto::HeadPlan& plan) {
    return plan.scan_bits() == 0 || message.scan_bits() == 0 ||
           plan.scan_bits() == message.scan_bits();
  };
  if (!message.has_plan()) {
    const bool fits =
        options_.plan != nullptr && same_bits(*options_.plan) &&
        proto::CheckHeadPlanFits(*options_.plan, shape.layers(), shape.kv_heads()).ok();
    return fits ? options_.plan : nullptr;
  }
  absl::Status status = proto::CheckHeadPlan(message.plan(), "plan.");
  if (status.ok()) {
    status = proto::CheckHeadPlanFits(message.plan(), shape.layers(), shape.kv_heads(), "plan.");
  }
  if (!status.ok()) return status;
  if (!same_bits(message.plan())) {
    return Invalid("plan.scan_bits", absl::StrCat("must be the session's ", message.scan_bits(),
                                                  ", or 0, not ", message.plan().scan_bits()));
  }
  return std::make_shared<const proto::HeadPlan>(message.plan());
}

absl::Status RequestValidator::CheckErrorTarget(float target) const {
  if (!(target >= 0.0F) || std::isinf(target)) {
    return Invalid("error_target", "must be a number, 0 or more");
  }
  if (target > 0.0F && options_.audit_share <= 0.0) {
    return proto::FieldError(absl::StatusCode::kFailedPrecondition, "error_target",
                             "the daemon audits nothing (--audit-share)");
  }
  return absl::OkStatus();
}

absl::Status RequestValidator::CheckShape(const proto::ModelShape& shape) const {
  absl::Status status = CheckBetween("shape.layers", shape.layers(), 1, options_.layers_max);
  status.Update(CheckBetween("shape.kv_heads", shape.kv_heads(), 1, options_.kv_heads_max));
  if (!status.ok()) return status;
  if (shape.query_heads() == 0 || shape.query_heads() % shape.kv_heads() != 0 ||
      shape.query_heads() / shape.kv_heads() > static_cast<uint32_t>(index::kMaxGroup)) {
    return Invalid("shape.query_heads",
                   absl::StrCat("must be 1 to ", index::kMaxGroup, " times the ", shape.kv_heads(),
                                " KV heads, not ", shape.query_heads()));
  }
  status.Update(CheckDim("shape.key_dim", shape.key_dim()));
  status.Update(CheckDim("shape.value_dim", shape.value_dim()));
  return status;
}

absl::StatusOr<SessionSettings> RequestValidator::Check(
    const proto::OpenSessionRequest& message) const {
  if (!message.has_shape()) return Invalid("shape", "is missing");
  const proto::ModelShape& shape = message.shape();
  absl::Status status = CheckShape(shape);
  if (!status.ok()) return status;
  if (shape.dtype() != proto::DTYPE_BF16 && shape.dtype() != proto::DTYPE_FP16) {
    return Invalid("shape.dtype", "must be bf16 or fp16");
  }
  const float scale = shape.softmax_scale();
  if (!(scale >= 0.0F && scale <= kScaleMax)) {
    return Invalid("shape.softmax_scale", absl::StrCat("must be between 0 and ", kScaleMax));
  }
  if (message.scan_bits() > 2) return Invalid("scan_bits", "must be 1 or 2, or 0 for the default");
  status.Update(CheckBetween("tokens_expected", message.tokens_expected(), 0, options_.tokens_max));
  status.Update(CheckName(message.name()));
  if (message.model().size() > kSessionNameBytesMax) {
    status.Update(
        Invalid("model", absl::StrCat("is longer than ", kSessionNameBytesMax, " bytes")));
  }
  status.Update(CheckErrorTarget(message.error_target()));
  if (!status.ok()) return status;
  auto plan = CheckPlan(message);
  if (!plan.ok()) return plan.status();

  SessionSettings settings;
  settings.layers = shape.layers();
  settings.kv_heads = shape.kv_heads();
  settings.query_heads = shape.query_heads();
  settings.kv.key_dim = static_cast<int>(shape.key_dim());
  settings.kv.value_dim = static_cast<int>(shape.value_dim());
  settings.kv.dtype = shape.dtype() == proto::DTYPE_BF16 ? DType::kBf16 : DType::kFp16;
  settings.kv.softmax_scale =
      scale > 0.0F ? scale : 1.0F / std::sqrt(static_cast<float>(shape.key_dim()));
  const uint32_t planned_bits = *plan == nullptr ? 0 : (*plan)->scan_bits();
  const uint32_t scan_bits = message.scan_bits() != 0 ? message.scan_bits() : planned_bits;
  settings.kv.scan_bits = static_cast<int>(scan_bits != 0 ? scan_bits : options_.scan_bits);
  settings.name = message.name();
  settings.model = message.model();
  settings.lease = Lease(message.lease_ms());
  for (int i = 0; i < message.build_size(); ++i) {
    const auto kind = BuiltKindOf(message.build(i));
    if (!kind.has_value()) {
      return Invalid(absl::StrCat("build[", i, "]"), "is no index that is built");
    }
    settings.build |= 1U << static_cast<uint32_t>(*kind);
  }
  settings.error_target =
      message.error_target() > 0.0F ? message.error_target() : options_.error_target;
  settings.plan = *std::move(plan);
  settings.own_plan = message.has_plan();
  if (settings.plan != nullptr) settings.build |= BuildsOf(*settings.plan);
  if (status = CheckLandmark(message, settings); !status.ok()) return status;
  return settings;
}

absl::StatusOr<CheckedAppend> RequestValidator::Check(const proto::AppendRequest& message,
                                                      absl::Span<const uint8_t> payload,
                                                      TimePoint now) const {
  auto session = FindSession(store_, message, now);
  if (!session.ok()) return session.status();
  const SessionSettings& settings = (*session)->settings();
  absl::Status status = CheckBetween("layer", message.layer(), 0, settings.layers - 1);
  status.Update(CheckBetween("start", message.start(), 0, options_.tokens_max));
  if (!status.ok()) return status;
  status.Update(CheckBetween("layers", message.layers(), 0, settings.layers - message.layer()));
  status.Update(CheckBetween("tokens", message.tokens(), 0, options_.tokens_max - message.start()));
  if (!status.ok()) return status;

  const size_t rows = size_t{message.tokens()} * settings.kv_heads;
  const auto sampled = static_cast<size_t>(message.query_positions_size());
  const auto given = static_cast<size_t>(message.landmark_positions_size());
  // Layers have parts of the same sizes, which begin at aligned offsets.
  proto::PayloadLayout layout;
  const size_t keys = layout.Add(rows * settings.kv.KeyRowBytes());
  const size_t values = layout.Add(rows * settings.kv.ValueRowBytes());
  const size_t queries = layout.Add(sampled * settings.query_heads * settings.kv.KeyRowBytes());
  const size_t landmarks = layout.Add(given * settings.kv_heads * settings.kv.KeyRowBytes());
  CheckedAppend append;
  append.layer = message.layer();
  append.layers = std::max(1U, message.layers());
  append.layer_stride = proto::AlignUp(layout.bytes());
  status.Update(CheckQueryPositions(message));
  status.Update(CheckLandmarkPositions(message, settings));
  status.Update(CheckPayloadBytes(payload.size(),
                                  (append.layers - 1) * append.layer_stride + layout.bytes()));
  if (!status.ok()) return status;
  const auto at = [&](size_t offset) {
    return reinterpret_cast<const uint16_t*>(payload.data() + offset);
  };
  append.rows = {static_cast<int64_t>(message.start()),
                 message.tokens(),
                 at(keys),
                 at(values),
                 {absl::MakeConstSpan(message.query_positions().data(), sampled), at(queries)},
                 settings.query_heads,
                 {absl::MakeConstSpan(message.landmark_positions().data(), given), at(landmarks),
                  settings.landmark.block}};
  append.session = *std::move(session);
  return append;
}

LayerRows CheckedAppend::Rows(uint32_t i) const {
  LayerRows of_layer = rows;
  const size_t elements = i * (layer_stride / sizeof(uint16_t));
  of_layer.keys += elements;
  of_layer.values += elements;
  of_layer.queries.rows += elements;
  of_layer.landmarks.rows += elements;
  return of_layer;
}

absl::StatusOr<CheckedFetch> RequestValidator::Check(const proto::FetchRowsRequest& message,
                                                     absl::Span<const uint8_t> payload,
                                                     TimePoint now) const {
  auto session = FindSession(store_, message, now);
  if (!session.ok()) return session.status();
  const SessionSettings& settings = (*session)->settings();
  absl::Status status = CheckBetween("layer", message.layer(), 0, settings.layers - 1);
  status.Update(CheckBetween("kv_head", message.kv_head(), 0, settings.kv_heads - 1));
  status.Update(CheckPayloadBytes(payload.size(), message.count() * sizeof(int64_t)));
  if (!status.ok()) return status;
  CheckedFetch fetch;
  fetch.layer = (*session)->State(message.layer());
  fetch.session = *std::move(session);
  fetch.kv_head = message.kv_head();
  fetch.positions = {reinterpret_cast<const int64_t*>(payload.data()), message.count()};
  for (size_t i = 0; i < fetch.positions.size(); ++i) {
    const int64_t position = fetch.positions[i];
    if (position >= 0 && position < fetch.layer->tokens) continue;
    return Invalid(
        absl::StrCat("positions[", i, "]"),
        absl::StrCat(position, " is not one of the ", fetch.layer->tokens, " tokens held"));
  }
  return fetch;
}

}  // namespace kvseek::service
