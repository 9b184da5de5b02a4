#include "tests/proto/recorded_frames.h"

#include <algorithm>
#include <bit>
#include <fstream>
#include <iterator>
#include <limits>
#include <utility>

#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "tests/proto/frame_recorder.h"
#include "tests/proto/messages.h"

namespace kvseek::proto {
namespace {

void RecordHello(Recorder& recorder) {
  HelloRequest request;
  request.set_version_min(1);
  request.set_version_max(3);
  request.add_features("rows");
  request.set_token("s3cret");
  request.set_client("kvseek/0.1.0");
  recorder.Request("hello_request", Op::kHello, request);

  HelloResponse response;
  response.set_version(1);
  response.set_boot_id(kBootId);
  response.set_server("kvseekd/0.1.0");
  response.set_simd_level("avx3_dl");
  Limits* limits = response.mutable_limits();
  limits->set_metadata_bytes_max(1U << 20);
  limits->set_payload_bytes_max(256U << 20);
  limits->set_batch_items_max(256);
  limits->set_inflight_requests_max(256);
  limits->set_lease_ms_max(86400000);
  recorder.Response("hello_response", Op::kHello, response);

  request.add_features(kUncheckedPayloads);
  recorder.Request("unchecked_hello_request", Op::kHello, request);
  response.add_features(kUncheckedPayloads);
  recorder.Response("unchecked_hello_response", Op::kHello, response);
}

void RecordSessions(Recorder& recorder) {
  OpenSessionRequest open;
  SetShape(open.mutable_shape());
  open.set_lease_ms(60000);
  open.set_scan_bits(2);
  open.set_tokens_expected(131072);
  open.set_name("caf\xc3\xa9");
  recorder.Request("open_session_request", Op::kOpenSession, open);
  SetPlan(open.mutable_plan());
  open.set_error_target(0.0625F);
  recorder.Request("open_session_with_plan_request", Op::kOpenSession, open);
  open.clear_plan();
  open.add_build(INDEX_LANDMARK);
  open.mutable_landmark()->set_summary(LANDMARK_GIVEN);
  open.mutable_landmark()->set_block(32);
  recorder.Request("open_session_with_landmarks_request", Op::kOpenSession, open);
  open.clear_build();
  open.clear_landmark();
  open.set_model("org/a-model-8b@1, kv_heads 0..3");
  recorder.Request("open_session_of_model_request", Op::kOpenSession, open);
  OpenSessionResponse opened;
  SetSession(7, opened.mutable_session());
  opened.set_lease_ms(60000);
  recorder.Response("open_session_response", Op::kOpenSession, opened);

  ForkRequest fork;
  SetSession(7, fork.mutable_session());
  fork.set_tokens(0);
  fork.set_lease_ms(1000);
  fork.set_name("branch");
  recorder.Request("fork_request", Op::kFork, fork);
  ForkResponse forked;
  SetSession(9, forked.mutable_session());
  forked.set_lease_ms(1000);
  recorder.Response("fork_response", Op::kFork, forked);

  TruncateRequest truncate;
  SetSession(7, truncate.mutable_session());
  truncate.set_tokens(1024);
  recorder.Request("truncate_request", Op::kTruncate, truncate);
  recorder.Response("truncate_response", Op::kTruncate, TruncateResponse());

  CloseSessionRequest close;
  SetSession(7, close.mutable_session());
  recorder.Request("close_session_request", Op::kCloseSession, close);
  recorder.Response("close_session_response", Op::kCloseSession, CloseSessionResponse());
}

void RecordAppend(Recorder& recorder) {
  AppendRequest request;
  SetSession(7, request.mutable_session());
  request.set_layer(1);
  request.set_start(4096);
  request.set_tokens(3);
  recorder.Request("append_request", Op::kAppend, request,
                   PayloadWriter()
                       .Bf16(size_t{3} * kKvHeads * kKeyDim, 1)
                       .Bf16(size_t{3} * kKvHeads * kValueDim, -96)
                       .Take());
  request.set_layer(0);
  request.set_layers(2);
  PayloadWriter both;
  for (const int first : {1, 3}) {
    both.Bf16(size_t{3} * kKvHeads * kKeyDim, first).Bf16(size_t{3} * kKvHeads * kValueDim, -96);
  }
  recorder.Request("append_layers_request", Op::kAppend, request, both.Take());
  request.set_layer(1);
  request.clear_layers();
  // Two blocks of 32 end in [4090, 4160), and the queries of one token come along.
  request.set_start(4090);
  request.set_tokens(70);
  request.add_query_positions(4100);
  request.add_landmark_positions(4064);
  request.add_landmark_positions(4128);
  recorder.Request("append_with_landmarks_request", Op::kAppend, request,
                   PayloadWriter()
                       .Bf16(size_t{70} * kKvHeads * kKeyDim, 1)
                       .Bf16(size_t{70} * kKvHeads * kValueDim, -96)
                       .Bf16(size_t{1} * kQueryHeads * kKeyDim, 7)
                       .Bf16(size_t{2} * kKvHeads * kKeyDim, -32)
                       .Take());
  AppendResponse response;
  response.set_tokens_held(4099);
  recorder.Response("append_response", Op::kAppend, response);
}

void RecordAttend(Recorder& recorder) {
  AttendRequest request;
  AddItems(request);
  SetOptions(request.mutable_options());
  request.mutable_options()->set_list_read(true);
  request.set_query_dtype(DTYPE_FP32);
  recorder.Request("attend_request", Op::kAttend, request,
                   PayloadWriter()
                       .Fp32(size_t{2} * kQueryHeads * kKeyDim, 1)
                       .Fp32(size_t{1} * kQueryHeads * kKeyDim, 1000)
                       .Take());

  // (item 0, token 0), (item 0, token 1), (item 1, token 0), each with two KV heads.
  AttendResponse response;
  for (const uint32_t count : {2, 0, 1, 3, 0, 0}) {
    AddReport(70000 + count, response);
    response.add_position_counts(count);
  }
  recorder.Response("attend_response", Op::kAttend, response,
                    PayloadWriter()
                        .Fp32(size_t{2} * kQueryHeads * kValueDim, -64)
                        .Part(std::vector<float>{0.5F, 1.5F, -2.0F, 3.0F, 4.0F, 5.0F, 6.0F, 7.0F})
                        .Fp32(size_t{1} * kQueryHeads * kValueDim, 500)
                        .Part(std::vector<float>(4, -std::numeric_limits<float>::infinity()))
                        .Part(std::vector<int64_t>{16, 99, 17, 18, 20, 70000})
                        .Take());
}

// One token of one session, of which one KV head's answer is an earlier step's selection.
void RecordReuse(Recorder& recorder) {
  AttendRequest request;
  QueryItem* item = request.add_items();
  SetSession(7, item->mutable_session());
  item->set_tokens(1);
  SetOptions(request.mutable_options());
  request.mutable_options()->set_vote(VOTE_MAX);
  request.mutable_options()->set_reuse_steps(3);
  request.mutable_options()->set_reuse_keep(6000);
  request.set_query_dtype(DTYPE_BF16);
  recorder.Request("reuse_attend_request", Op::kAttend, request,
                   PayloadWriter().Bf16(size_t{kQueryHeads} * kKeyDim, 1).Take());
  AttendResponse response;
  AddReport(70000, response);
  AddReport(70001, response);
  response.mutable_reports(1)->set_reused(true);
  recorder.Response(
      "reuse_attend_response", Op::kAttend, response,
      PayloadWriter().Fp32(size_t{kQueryHeads} * kValueDim, -64).Fp32(kQueryHeads, 0).Take());
}

void RecordTopK(Recorder& recorder) {
  TopKRequest request;
  AddItems(request);
  SetOptions(request.mutable_options());
  request.set_query_dtype(DTYPE_BF16);
  request.set_k(2);
  request.set_with_rows(true);
  request.set_with_state(true);
  recorder.Request("top_k_request", Op::kTopK, request,
                   PayloadWriter()
                       .Bf16(size_t{2} * kQueryHeads * kKeyDim, 1)
                       .Bf16(size_t{1} * kQueryHeads * kKeyDim, 64)
                       .Take());

  TopKResponse response;
  for (const uint32_t count : {2, 2, 2, 2, 1, 1}) {
    AddReport(70000, response);
    response.add_position_counts(count);
  }
  recorder.Response("top_k_response", Op::kTopK, response,
                    PayloadWriter()
                        .Part(std::vector<int64_t>{16, 17, 40, 69999, 20, 21, 22, 70000, 0, 0})
                        .Bf16(size_t{8} * kKeyDim, 1)
                        .Bf16(size_t{2} * kKeyDim, 100)
                        .Bf16(size_t{8} * kValueDim, -128)
                        .Bf16(size_t{2} * kValueDim, 200)
                        .Fp32(size_t{2} * kQueryHeads * kValueDim, -64)
                        .Fp32(size_t{2} * kQueryHeads, 0)
                        .Fp32(size_t{1} * kQueryHeads * kValueDim, 300)
                        .Fp32(size_t{1} * kQueryHeads, 10)
                        .Take());
}

// The same two sessions, asked for their second KV head only; rows of five positions are held.
void RecordTopKOfSome(Recorder& recorder) {
  TopKRequest request;
  AddItems(request);
  for (QueryItem& item : *request.mutable_items()) item.add_kv_heads(1);
  request.mutable_items(0)->add_held_counts(3);
  request.mutable_items(0)->add_held_counts(0);
  request.mutable_items(1)->add_held_counts(2);
  SetOptions(request.mutable_options());
  request.set_query_dtype(DTYPE_FP16);
  request.set_k(3);
  request.set_with_rows(true);
  recorder.Request("top_k_of_some_request", Op::kTopK, request,
                   PayloadWriter()
                       .Part(std::vector<uint16_t>(size_t{2} * kGroup * kKeyDim, 0x3c00))
                       .Part(std::vector<uint32_t>{16, 70, 69999})
                       .Part(std::vector<uint16_t>(size_t{1} * kGroup * kKeyDim, 0x4000))
                       .Part(std::vector<uint32_t>{0, 4})
                       .Take());

  // Chosen: {16, 17, 70}, {5000} and {0, 4}, so that one row of each token of the first item comes.
  TopKResponse response;
  for (const uint32_t count : {3, 1, 2}) {
    AddReport(70000 + count, response);
    response.add_position_counts(count);
  }
  response.set_compute_us(415);
  recorder.Response("top_k_of_some_response", Op::kTopK, response,
                    PayloadWriter()
                        .Part(std::vector<int64_t>{16, 17, 70, 5000, 0, 4})
                        .Bf16(size_t{2} * kKeyDim, 1)
                        .Bf16(size_t{2} * kValueDim, 32)
                        .Take());
}

void RecordFetchRows(Recorder& recorder) {
  FetchRowsRequest request;
  SetSession(7, request.mutable_session());
  request.set_layer(2);
  request.set_kv_head(1);
  request.set_count(2);
  recorder.Request("fetch_rows_request", Op::kFetchRows, request,
                   PayloadWriter().Part(std::vector<int64_t>{5, 70000}).Take());
  recorder
      .Request("unchecked_fetch_rows_request", Op::kFetchRows, request,
               PayloadWriter().Part(std::vector<int64_t>{5, 70000}).Take())
      .checked = false;
  recorder.Response(
      "fetch_rows_response", Op::kFetchRows, FetchRowsResponse(),
      PayloadWriter().Bf16(size_t{2} * kKeyDim, 1).Bf16(size_t{2} * kValueDim, 32).Take());
}

void RecordObservation(Recorder& recorder) {
  StatsRequest stats;
  stats.set_with_sessions(true);
  recorder.Request("stats_request", Op::kStats, stats);
  stats.set_with_plans(true);
  stats.set_session_id(7);
  recorder.Request("stats_with_plans_request", Op::kStats, stats);
  StatsResponse found;
  found.set_uptime_ms(123456789);
  found.set_memory_used_bytes(uint64_t{5} << 30);
  found.set_memory_limit_bytes(uint64_t{64} << 30);
  found.set_sessions_open(1);
  found.set_connections_open(2);
  found.set_queue_depth(3);
  found.set_queue_limit(1024);
  found.set_workers(16);
  for (const auto& [name, value] : {std::pair("errors", 4), std::pair("requests", 1000)}) {
    proto::Counter* counter = found.add_counters();
    counter->set_name(name);
    counter->set_value(static_cast<uint64_t>(value));
  }
  SessionInfo* session = found.add_sessions();
  SetSession(7, session->mutable_session());
  session->set_name("caf\xc3\xa9");
  SetShape(session->mutable_shape());
  for (const uint64_t tokens : {4099, 4099, 4096}) session->add_tokens(tokens);
  session->set_bytes(9000000);
  session->set_idle_ms(12);
  session->set_lease_ms(60000);
  session->set_scan_bits(2);
  found.set_simd_level("avx3_dl");
  recorder.Response("stats_response", Op::kStats, found);
  SetPlan(found.mutable_sessions(0)->mutable_plan());
  found.mutable_sessions(0)->set_error_target(0.0625F);
  recorder.Response("stats_with_plans_response", Op::kStats, found);
  found.mutable_sessions(0)->clear_plan();
  found.mutable_sessions(0)->mutable_landmark()->set_summary(LANDMARK_GIVEN);
  found.mutable_sessions(0)->mutable_landmark()->set_block(32);
  found.mutable_sessions(0)->set_landmarks_given(127);
  recorder.Response("stats_with_landmarks_response", Op::kStats, found);
  found.mutable_sessions(0)->clear_landmark();
  found.mutable_sessions(0)->clear_landmarks_given();
  found.mutable_sessions(0)->set_model("org/a-model-8b@1, kv_heads 0..3");
  found.mutable_sessions(0)->set_planner_audits(12345);
  recorder.Response("stats_with_models_response", Op::kStats, found);

  recorder.Request("health_request", Op::kHealth, HealthRequest());
  HealthResponse health;
  health.set_serving(true);
  recorder.Response("health_response", Op::kHealth, health);

  CancelRequest cancel;
  cancel.set_request_id(0x0a04);
  recorder.Request("cancel_request", Op::kCancel, cancel);
  recorder.Response("cancel_response", Op::kCancel, CancelResponse());
}

void RecordErrors(Recorder& recorder) {
  Error error;
  SetError(FieldError(absl::StatusCode::kInvalidArgument, "items[1].layer", "3, of 3"), &error);
  recorder.Response("error_invalid_argument", Op::kTopK, error).header.flags |= kFlagError;
  SetError(Exhausted("queue", "1024 requests are waiting", 50), &error);
  recorder.Response("error_resource_exhausted", Op::kAttend, error).header.flags |= kFlagError;
}

void RecordDoorbell(Recorder& recorder) {
  OpenDoorbellRequest request;
  SetShape(request.mutable_shape());
  request.add_kv_heads(1);
  request.set_items_max(4);
  request.set_tokens_max(2);
  request.set_query_dtype(DTYPE_BF16);
  SetOptions(request.mutable_options());
  request.set_deadline_us(50000);
  recorder.Request("open_doorbell_request", Op::kOpenDoorbell, request);
  OpenDoorbellResponse response;
  response.set_version(1);
  response.set_memory_bytes(8192);
  recorder.Response("open_doorbell_response", Op::kOpenDoorbell, response);
}

// What a later version may send: more fields of every wire type, more flags, more operations.
void RecordLaterVersions(Recorder& recorder) {
  const std::string unknown =
      std::string("\xc0\x3e\x96\x01") +                              // field 1000: varint 150
      std::string("\xc9\x3e\x01\x02\x03\x04\x05\x06\x07\x08", 10) +  // field 1001: 8 bytes
      std::string("\xd2\x3e\x05later") +                             // field 1002: a string
      std::string("\xdd\x3e\x00\x00\x80\x3f", 6);                    // field 1003: 4 bytes
  FetchRowsRequest request;
  SetSession(7, request.mutable_session());
  request.set_count(1);
  RecordedFrame& fetch = recorder.Request("later_fetch_rows_request", Op::kFetchRows, request,
                                          PayloadWriter().Part(std::vector<int64_t>{3}).Take());
  fetch.unknown = unknown;
  fetch.header.flags |= 0xfffc;

  AppendResponse response;
  response.set_tokens_held(12);
  RecordedFrame& append = recorder.Response("later_append_response", Op::kAppend, response,
                                            PayloadWriter().Fp32(3, 1).Take());
  append.unknown = unknown;
  append.header.flags |= 0x8000;

  RecordedFrame& op = recorder.Add("later_op_request", static_cast<Op>(200), nullptr);
  op.unknown = unknown;
  op.payload = PayloadWriter().Fp32(20, 1).Take();
}

}  // namespace

std::vector<RecordedFrame> RecordedFrames() {
  Recorder recorder;
  RecordHello(recorder);
  RecordSessions(recorder);
  RecordAppend(recorder);
  RecordAttend(recorder);
  RecordReuse(recorder);
  RecordTopK(recorder);
  RecordTopKOfSome(recorder);
  RecordFetchRows(recorder);
  RecordObservation(recorder);
  RecordErrors(recorder);
  RecordDoorbell(recorder);
  RecordLaterVersions(recorder);
  return recorder.Take();
}

std::string EncodeRecorded(const RecordedFrame& frame) {
  const std::string known = frame.message == nullptr ? std::string() : Serialize(*frame.message);
  return EncodeFrame(frame.header, known + frame.unknown, frame.payload, frame.checked);
}

std::string FixtureFolder() { return KVSEEK_SOURCE_DIR "/tests/proto/fixtures"; }

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace kvseek::proto
