#include "service/call.h"

#include "proto/kvseek.pb.h"
#include "proto/status_code.h"

namespace kvseek::service {

void CallsUnderWay::Add() {
  const std::lock_guard lock(mutex_);
  ++calls_;
}

void CallsUnderWay::Remove() {
  const std::lock_guard lock(mutex_);
  if (--calls_ == 0) all_left_.notify_all();
}

void CallsUnderWay::Stop() {
  stopping_->store(true);
  std::unique_lock lock(mutex_);
  while (calls_ > 0) all_left_.wait(lock);
}

Call::Call(const CallContext& context, Request request, std::function<void(Response)> done)
    : context_(context), request_(std::move(request)), done_(std::move(done)) {
  context_.calls.Add();
}

Call::~Call() {
  if (!finished_.load()) Finish(absl::InternalError("the request was lost"));
  // The handler, and with it sessions' memory budget, may go with the last call: what a derived
  // class holds of sessions has gone before, and so does what `done` holds.
  done_ = nullptr;
  context_.calls.Remove();
}

bool Call::Admit() {
  absl::StatusOr<ComputePool::Admission> admission = context_.pool.Admit();
  if (!admission.ok()) {
    Finish(admission.status());
    return false;
  }
  admission_ = *std::move(admission);
  return true;
}

void Call::Finish(absl::StatusOr<Response> outcome) {
  if (finished_.exchange(true)) return;
  { const ComputePool::Admission released = std::move(admission_); }
  Response response;
  if (outcome.ok()) {
    response = *std::move(outcome);
  } else {
    context_.counters.CountError(outcome.status().code());
    response.error = true;
    response.metadata = proto::ToError(outcome.status()).SerializeAsString();
  }
  context_.counters.CountAnswer(response.payload.bytes);
  done_(std::move(response));
}

}  // namespace kvseek::service
