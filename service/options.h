// Every bound of the daemon in one place: unit, default and reason.
#ifndef KVSEEK_SERVICE_OPTIONS_H_
#define KVSEEK_SERVICE_OPTIONS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvseek::proto {
class HeadPlan;
}

namespace kvseek::service {

struct DaemonOptions {
  // ---- listening
  std::vector<std::string> listen;  ///< "unix:/path", "tcp://host:port"; at least one
  std::string token;                ///< shared secret that hello must carry; "": none asked for
  /// They copy, parse and write, and work on searches while they look (ComputePool::Guest); one
  /// moves several GB/s.
  int io_threads = 1;
  /// An io thread looks for work for so long after its last before it sleeps. Off: it takes a core
  /// while it looks. Worth it where a wake-up (tens of us) is much of an answer's time.
  std::chrono::microseconds io_spin{0};

  // ---- memory
  uint64_t memory_limit_bytes = uint64_t{4} << 30;  ///< keys, values and codes of all sessions
  /// For segments: touched at the start and kept, within memory_limit_bytes, so that a prefill
  /// finds it ready. Clearing it takes the system longer than encoding what is written there. 0: no
  /// memory is taken before it is needed, and a quarter of the limit kept once it was.
  uint64_t prefault_bytes = 0;
  uint64_t sessions_max = 4096;
  uint32_t layers_max = 512;
  uint32_t kv_heads_max = 1024;
  uint64_t tokens_max = uint64_t{1} << 24;  ///< of a session

  // ---- work
  int workers = 0;                           ///< compute threads; 0: one a core
  std::chrono::microseconds worker_spin{0};  ///< as io_spin, for each compute thread
  bool pin_workers = false;                  ///< to a core each; on for a host of its own
  /// Each KV head's memory lies on one NUMA node, whose workers search it first. Off: as if there
  /// were one node. The same without several of them.
  bool numa = true;
  uint32_t queue_limit = 1024;     ///< requests waiting or under way; past it resource_exhausted
  uint32_t batch_items_max = 256;  ///< sessions in one request
  uint32_t query_tokens_max = 64;  ///< query tokens of one item (speculative decoding needs few)
  std::chrono::milliseconds deadline_default{30000};  ///< of requests that name none
  std::chrono::milliseconds retry_after{50};          ///< told with resource_exhausted

  // ---- indexes built in the background
  int build_threads = 1;              ///< run where a core is idle only; 0: none is built
  uint64_t build_from_tokens = 8192;  ///< shorter sequences get no index; exact is faster there

  // ---- connections
  uint32_t connections_max = 1024;
  uint32_t inflight_requests_max = 256;             ///< of one connection; past it reading stops
  uint64_t inflight_bytes_max = uint64_t{1} << 30;  ///< request payloads held by all connections
  /// Of a shared-memory connection's rings, each way, a power of two. Larger frames go through in
  /// pieces; a small ring stays in the caches of both sides.
  uint64_t shared_ring_bytes = uint64_t{1} << 20;
  /// Rings of all connections, and doorbells; past it clients that ask for one are not granted it.
  /// 0: none is.
  uint64_t shared_memory_bytes_max = uint64_t{256} << 20;
  uint32_t doorbells_max = 64;  ///< each is looked at all the time; one a GPU is plenty
  /// The thread that looks at doorbells does so without a rest for so long after a question: the
  /// layers of a decode step come every few hundred microseconds. It takes a core while it looks.
  std::chrono::microseconds doorbell_spin{1000};
  uint32_t metadata_bytes_max = 1U << 20;
  uint32_t payload_bytes_max = 256U << 20;
  std::chrono::milliseconds hello_timeout{5000};  ///< a connection that says nothing is closed
  std::chrono::milliseconds frame_timeout{
      30000};  ///< from a frame's first byte to its last, either way
  std::chrono::milliseconds shutdown_grace{5000};  ///< for requests under way when the daemon stops

  // ---- sessions
  std::chrono::milliseconds lease_default{10 * 60 *
                                          1000};  ///< a session unused for so long is closed
  std::chrono::milliseconds lease_max{24 * 60 * 60 * 1000};

  // ---- audits (service/request_audits.h)
  double audit_share = 0.0;     ///< of Attend requests also answered exactly, 0..1; 0: none
  size_t audit_queue_max = 16;  ///< waiting for one; more are dropped

  // ---- plans of sessions that are opened without one (service/session_plan.h)
  std::shared_ptr<const proto::HeadPlan> plan;  ///< of those that it fits; null: none
  float error_target = 0.0F;  ///< audits change plans to meet it; needs audit_share; 0: they do not
  /// Kept for sessions of a model (service/shared_planners.h), at most some MB each; the one least
  /// recently opened goes. 0: no two sessions share one.
  size_t planners_max = 16;

  // ---- defaults of searches (index/key_index.h)
  uint32_t scan_bits = 2;
  uint32_t candidates = 4096;
  uint32_t exact_rows = 64;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_OPTIONS_H_
