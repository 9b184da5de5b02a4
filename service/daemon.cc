#include "service/daemon.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/slab_memory.h"
#include "kernels/cpu/simd_level.h"
#include "proto/head_plan_file.h"
#include "proto/status_code.h"
#include "service/compute_pool.h"
#include "service/doorbells.h"
#include "service/index_builder.h"
#include "service/memory_budget.h"
#include "service/request_handler.h"
#include "service/server.h"
#include "service/session_store.h"
#include "service/topology.h"
#include "transport/shared_rings.h"

namespace kvseek::service {
namespace {

constexpr std::chrono::milliseconds kReapInterval{250};

absl::Status CheckOptions(const DaemonOptions& options) {
  const auto check = [](bool good, absl::string_view field, absl::string_view message) {
    return good ? absl::OkStatus()
                : proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
  };
  absl::Status status = check(options.io_threads > 0, "io_threads", "must be at least 1");
  status.Update(check(options.prefault_bytes <= options.memory_limit_bytes, "prefault_bytes",
                      "must not be more than memory_limit_bytes"));
  status.Update(check(options.workers >= 0, "workers", "must not be negative"));
  status.Update(check(options.io_spin.count() >= 0, "io_spin", "must not be negative"));
  status.Update(check(options.worker_spin.count() >= 0, "worker_spin", "must not be negative"));
  status.Update(check(options.doorbell_spin.count() >= 0, "doorbell_spin", "must not be negative"));
  status.Update(check(options.build_threads >= 0, "build_threads", "must not be negative"));
  status.Update(check(options.queue_limit > 0, "queue_limit", "must be at least 1"));
  status.Update(check(options.connections_max > 0, "connections_max", "must be at least 1"));
  const transport::RingSizes rings{.request_bytes = options.shared_ring_bytes,
                                   .answer_bytes = options.shared_ring_bytes};
  status.Update(check(rings.Sensible(), "shared_ring_bytes", "a power of two from 4 KiB to 1 GiB"));
  status.Update(
      check(options.inflight_requests_max > 0, "inflight_requests_max", "must be at least 1"));
  status.Update(check(options.scan_bits == 1 || options.scan_bits == 2, "scan_bits", "1 or 2"));
  status.Update(
      check(options.audit_share >= 0.0 && options.audit_share <= 1.0, "audit_share", "0 to 1"));
  if (options.plan != nullptr) status.Update(proto::CheckHeadPlan(*options.plan, "plan."));
  status.Update(check(
      options.error_target == 0.0F || (options.error_target > 0.0F && options.audit_share > 0.0),
      "error_target", "must be 0, or more where there are audits (audit_share)"));
  status.Update(check(options.lease_default.count() > 0, "lease_default", "must be positive"));
  status.Update(check(options.frame_timeout.count() > 0, "frame_timeout", "must be positive"));
  status.Update(check(options.hello_timeout.count() > 0, "hello_timeout", "must be positive"));
  return status;
}

Topology FindTopology(const DaemonOptions& options) {
  const std::vector<int> allowed = AllowedCpus();
  if (!options.numa) return OneNode(allowed);
  auto topology = ReadTopology("/sys/devices/system/node", allowed);
  if (topology.ok()) return *std::move(topology);
  spdlog::warn("NUMA nodes are not made use of: {}", std::string(topology.status().message()));
  return OneNode(allowed);
}

}  // namespace

class Daemon::Impl {
 public:
  explicit Impl(const DaemonOptions& options)
      : options_(options),
        topology_(FindTopology(options)),
        budget_(options.memory_limit_bytes, options.retry_after),
        store_(options, budget_, static_cast<int>(topology_.size())),
        pool_(options, topology_),
        builder_(options, budget_),
        handler_(options, store_, pool_, builder_,
                 {.connections_open = [this] { return Connections(); },
                  .counters = [this] { return doorbells_.Counters(); }}),
        doorbells_(
            options, store_,
            [this](Request request, std::function<void(Response)> done) {
              handler_.Handle(std::move(request), std::move(done));
            },
            &pool_) {}
  ~Impl() {
    Stop();
    index::KeepSlabs(0);
    index::PlaceSlabs({});
  }

  absl::Status Start() {
    TakeMemory();
    auto server = Server::Start(
        options_,
        {.boot_id = store_.boot_id(),
         .server = "kvseekd " KVSEEK_VERSION,
         .simd_level = kernels::SimdLevel()},
        [this](Request request, std::function<void(Response)> done) {
          handler_.Handle(std::move(request), std::move(done));
        },
        &doorbells_, &pool_);
    if (!server.ok()) return server.status();
    server_ = *std::move(server);
    server_view_.store(server_.get());
    reaper_ = std::thread([this] { Reap(); });
    spdlog::info("serving with {} workers at {}, {} MiB for sessions, boot id {:016x}",
                 pool_.workers(), kernels::SimdLevel(), options_.memory_limit_bytes >> 20,
                 store_.boot_id());
    return absl::OkStatus();
  }

  void Stop() {
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
      stopping_ = true;
    }
    stop_reaping_.notify_all();
    if (server_ != nullptr) server_->Stop();
    if (reaper_.joinable()) reaper_.join();
  }

  const Server& server() const { return *server_; }
  uint64_t boot_id() const { return store_.boot_id(); }

 private:
  /// A quarter of the limit: sessions that come and go find the memory of those before them, and a
  /// daemon that has become idle gives most of its own back.
  void TakeMemory() {
    PlaceMemory();
    index::KeepSlabs(options_.prefault_bytes);
    std::vector<std::thread> threads;
    for (int i = 0; options_.prefault_bytes != 0 && i < pool_.workers(); ++i) {
      threads.emplace_back([i, nodes = pool_.nodes()] {
        int node = i % nodes;
        while (index::AddSpareSlab(node)) node = (node + 1) % nodes;
      });
    }
    for (std::thread& thread : threads) thread.join();
    const size_t taken = index::SlabBytes();
    if (taken + index::kSlabBytes <= options_.prefault_bytes) {
      spdlog::warn("the system gave {} of {} MiB to be prefaulted", taken >> 20,
                   options_.prefault_bytes >> 20);
    }
    index::KeepSlabs(std::max(options_.prefault_bytes, options_.memory_limit_bytes / 4));
  }

  void PlaceMemory() {
    if (topology_.size() == 1) return;
    std::vector<int> nodes;
    for (const NumaNode& node : topology_) {
      spdlog::info("NUMA node {}: {} cpus, {} workers", node.id, node.cpus.size(),
                   pool_.workers_of_nodes()[nodes.size()]);
      nodes.push_back(node.id);
    }
    if (!index::PlaceSlabs(std::move(nodes))) {
      spdlog::warn("the system does not let this process place its memory on NUMA nodes");
    }
  }

  uint64_t Connections() const {
    const Server* server = server_view_.load();
    return server == nullptr ? 0 : server->connections_open();
  }

  /// Closes sessions that nobody has used for the length of their lease.
  void Reap() {
    std::unique_lock lock(mutex_);
    while (!stop_reaping_.wait_for(lock, kReapInterval, [this] { return stopping_; })) {
      auto expired = store_.ReapExpired(std::chrono::steady_clock::now());
      if (expired.empty()) continue;
      spdlog::info("{} sessions expired", expired.size());
      // Freeing a large session takes long: on a worker.
      pool_.Submit([sessions = std::move(expired)](index::Scratch&) mutable { sessions.clear(); });
    }
  }

  const DaemonOptions options_;
  const Topology topology_;
  MemoryBudget budget_;
  SessionStore store_;
  ComputePool pool_;
  IndexBuilder builder_;
  // Before the handler: that one's end waits for the last calls, which hold connections of the
  // server.
  std::unique_ptr<Server> server_;
  std::atomic<const Server*> server_view_{nullptr};
  RequestHandler handler_;
  Doorbells doorbells_;  ///< asks the handler, but for the server's connections

  std::mutex mutex_;
  std::condition_variable stop_reaping_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread reaper_;
};

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Start(const DaemonOptions& options) {
  const absl::Status sensible = CheckOptions(options);
  if (!sensible.ok()) return sensible;
  try {
    auto impl = std::make_unique<Impl>(options);
    const absl::Status started = impl->Start();
    if (!started.ok()) return started;
    return std::unique_ptr<Daemon>(new Daemon(std::move(impl)));
  } catch (const std::exception& error) {  // no memory, no threads
    return absl::ResourceExhaustedError(error.what());
  }
}

Daemon::Daemon(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Daemon::~Daemon() = default;
const std::vector<std::string>& Daemon::addresses() const { return impl_->server().addresses(); }
uint64_t Daemon::boot_id() const { return impl_->boot_id(); }
void Daemon::Stop() { impl_->Stop(); }

}  // namespace kvseek::service
