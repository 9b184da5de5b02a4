// A request under way, from its arrival to its answer.
//
// Whoever works on a request holds its call by a std::shared_ptr: the thread that read it, jobs on
// the pool, searches that run. What an operation needs beyond that, over several jobs, is in a
// class derived from Call (service/search_call.h, service/append_call.h). A request handler's calls
// use what it owns, so it waits for the last one of them to go (CallsUnderWay).
#ifndef KVSEEK_SERVICE_CALL_H_
#define KVSEEK_SERVICE_CALL_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/scratch.h"
#include "service/compute_pool.h"
#include "service/index_builder.h"
#include "service/options.h"
#include "service/request_audits.h"
#include "service/request_counters.h"
#include "service/request_handler.h"
#include "service/search_executor.h"
#include "service/session.h"
#include "service/session_store.h"

namespace kvseek::service {

/// How many calls a handler has. Thread-safe.
class CallsUnderWay {
 public:
  void Add() ABSL_LOCKS_EXCLUDED(mutex_);
  /// The handler may be gone when this returns.
  void Remove() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Has all calls given up (unavailable), and returns when there are none.
  void Stop() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Set by Stop; may outlive the handler.
  std::shared_ptr<const std::atomic<bool>> stopping() const { return stopping_; }

 private:
  const std::shared_ptr<std::atomic<bool>> stopping_ = std::make_shared<std::atomic<bool>>(false);
  std::mutex mutex_;
  std::condition_variable all_left_;
  uint64_t calls_ ABSL_GUARDED_BY(mutex_) = 0;
};

/// What the calls of one handler share; all of it is thread-safe.
struct CallContext {
  const DaemonOptions& options;
  SessionStore& store;
  ComputePool& pool;
  IndexBuilder& builder;
  RequestCounters& counters;
  RequestAudits& audits;
  CallsUnderWay& calls;
};

/// Thread-safe, apart from Admit. Made by std::make_shared, of the class that it is.
class Call {
 public:
  /// `context` must be there until its calls have stopped. `done` is called once and must not
  /// throw.
  Call(const CallContext& context, Request request, std::function<void(Response)> done);
  /// Answers with an internal error if nobody did. What derived classes hold is gone by then.
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const CallContext& context() const { return context_; }
  const Request& request() const { return request_; }
  TimePoint arrived() const { return arrived_; }
  absl::Span<const uint8_t> payload() const {
    return {request_.payload.data.get(), request_.payload.bytes};
  }
  GiveUp give_up() const {
    return {request_.deadline, request_.cancelled, context_.calls.stopping()};
  }

  /// Takes a place among the pool's requests until the call is finished; false: there is none, and
  /// the call has been finished with resource_exhausted. Once, before others work on the call.
  bool Admit();
  /// Answers the request and counts the answer; does nothing once that has been done.
  void Finish(absl::StatusOr<Response> outcome);

 private:
  const CallContext& context_;
  const TimePoint arrived_ = std::chrono::steady_clock::now();
  Request request_;
  std::function<void(Response)> done_;
  ComputePool::Admission admission_;
  std::atomic<bool> finished_{false};
};

/// A job that calls work(call, scratch), which finishes the call then or later. A call that is to
/// be given up before, or whose work throws, is finished with that. CallType is Call or derived
/// from it.
template <typename CallType, typename Work>
ComputePool::Job MakeJob(std::shared_ptr<CallType> call, Work work) {
  return [call = std::move(call), work = std::move(work)](index::Scratch& scratch) {
    if (absl::Status status = call->give_up().Check(); !status.ok()) {
      call->Finish(std::move(status));
      return;
    }
    try {
      work(call, scratch);
    } catch (...) {
      call->Finish(StatusOfException());
    }
  };
}

/// An answer that is a message alone.
template <typename Message>
Response MakeResponse(const Message& message) {
  Response response;
  response.metadata = message.SerializeAsString();
  return response;
}

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_CALL_H_
