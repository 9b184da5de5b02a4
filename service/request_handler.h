// Answers requests. Knows messages, sessions and indexes, and no sockets: connection.h brings a
// request here and takes the response away; tests call it directly.
#ifndef KVSEEK_SERVICE_REQUEST_HANDLER_H_
#define KVSEEK_SERVICE_REQUEST_HANDLER_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "proto/frame.h"
#include "service/options.h"
#include "service/payload.h"
#include "service/statistics.h"

namespace kvseek::proto {
class AttendRequest;
}

namespace kvseek::service {

class ComputePool;
class IndexBuilder;
class SessionStore;

/// One request, its payload's checksum already verified where the connection has checksums.
struct Request {
  proto::Op op = proto::Op::kHealth;
  std::string metadata;
  /// An Attend that came without a frame (service/doorbell.h): in place of the metadata, and the
  /// answer has none. Read until `done` is called.
  std::shared_ptr<const proto::AttendRequest> attend{};
  Payload payload;
  std::chrono::steady_clock::time_point deadline;
  /// Set by the connection on Cancel and when the peer is gone; work not yet begun is then dropped.
  std::shared_ptr<std::atomic<bool>> cancelled;
};

struct Response {
  bool error = false;  ///< metadata is then a proto::Error
  std::string metadata;
  Payload payload;
};

/// Thread-safe.
class RequestHandler {
 public:
  /// `store`, `pool` and `builder` must outlive the handler.
  RequestHandler(const DaemonOptions& options, SessionStore& store, ComputePool& pool,
                 IndexBuilder& builder, ServerFacts facts);
  /// Gives up what is under way (unavailable) and waits until all `done` have returned.
  ~RequestHandler();
  RequestHandler(const RequestHandler&) = delete;
  RequestHandler& operator=(const RequestHandler&) = delete;

  /// Answers every op but hello, cancel and open_doorbell, which belong to the connection. Calls
  /// `done` exactly once, here or on a worker: past the request's deadline as soon as a worker gets
  /// to it. Long work (search, append, fetch, cut, close) runs on the pool; when the queue is full
  /// it is refused at once with resource_exhausted, apart from close, which only frees. Appends to
  /// one layer run in the order of the calls; nothing else is ordered. No exception leaves here,
  /// `done` must not throw.
  void Handle(Request request, std::function<void(Response)> done);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_REQUEST_HANDLER_H_
