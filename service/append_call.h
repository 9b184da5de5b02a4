// An Append under way: of one layer or several, each in its own order.
#ifndef KVSEEK_SERVICE_APPEND_CALL_H_
#define KVSEEK_SERVICE_APPEND_CALL_H_

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "index/scratch.h"
#include "proto/kvseek.pb.h"
#include "service/call.h"
#include "service/message_memory.h"
#include "service/request_validation.h"

namespace kvseek::service {

/// Its layers may be appended by several threads at once.
class AppendCall : public Call {
 public:
  using Call::Call;

  /// Checks the request and gives each layer's strand (Session::AppendStrand) a job; the one that
  /// is done last answers with the tokens that the shortest layer holds, the first that fails with
  /// an error, which keeps no other from being appended. So appends to a layer run in the order of
  /// the calls of Start. May throw before all layers have their jobs. REQUIRES: the request's op is
  /// kAppend.
  static void Start(const std::shared_ptr<AppendCall>& call);

 private:
  struct Layers {
    Layers() : messages(*memory), message(messages.New<proto::AppendRequest>()) {}

    index::SearchMemory memory = index::TakeSearchMemory();
    MessageMemory messages;
    proto::AppendRequest& message;
    CheckedAppend checked;  ///< points into `message`
    std::atomic<size_t> left{0};
    std::atomic<int64_t> held{std::numeric_limits<int64_t>::max()};  ///< by the one that has least
  };

  absl::Status Check();
  /// The layer checked.layer + i.
  void AppendLayer(uint32_t i, index::Scratch& scratch);

  std::optional<Layers> layers_;  ///< since Check
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_APPEND_CALL_H_
