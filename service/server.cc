#include "service/server.h"

#include <pthread.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "proto/status_code.h"
#include "service/compute_pool.h"
#include "service/connection.h"
#include "service/listener.h"
#include "transport/lookout.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

namespace asio = boost::asio;
using transport::kAsTuple;
constexpr std::chrono::milliseconds kAcceptPause{100};  ///< when the system is out of descriptors
constexpr int kLooksBetween = 64;                       ///< at rings, for one at sockets
constexpr int kRefusalsMax = 64;  ///< refused peers that are told why at once; more are just closed

}  // namespace

class Server::Impl {
 public:
  Impl(const DaemonOptions& options, ServerIdentity identity, Dispatch dispatch,
       Doorbells* doorbells, ComputePool* pool)
      : pool_(pool),
        gate_(options.inflight_bytes_max),
        lookout_(/*resumes_here=*/options.io_threads <= 1),
        work_(asio::make_work_guard(io_)) {
    context_.options = options;
    context_.identity = std::move(identity);
    context_.dispatch = std::move(dispatch);
    context_.gate = &gate_;
    context_.shared_memory = std::make_shared<ByteGate>(options.shared_memory_bytes_max);
    context_.lookout = &lookout_;
    context_.doorbells = doorbells;
    context_.closed = [this](Connection* connection) {
      const std::lock_guard lock(mutex_);
      connections_.erase(connection);
      if (connections_.empty()) all_gone_.notify_all();
    };
  }
  ~Impl() { Stop(); }

  absl::Status Start() {
    if (context_.options.listen.empty()) {
      return proto::FieldError(absl::StatusCode::kInvalidArgument, "listen", "no address");
    }
    for (const std::string& address : context_.options.listen) {
      auto listener = Listener::Open(asio::make_strand(io_), address);
      if (!listener.ok()) return listener.status();
      addresses_.push_back((*listener)->address());
      spdlog::info("listening on {}", addresses_.back());
      listeners_.push_back(*std::move(listener));
    }
    for (const auto& listener : listeners_) {
      asio::co_spawn(listener->acceptor().get_executor(), AcceptAll(*listener), asio::detached);
    }
    for (int i = 0; i < std::max(1, context_.options.io_threads); ++i) {
      threads_.emplace_back([this] { RunIo(); });
    }
    return absl::OkStatus();
  }

  void Stop() {
    {
      const std::lock_guard lock(mutex_);
      if (stopped_) return;
      stopped_ = true;
    }
    for (const auto& listener : listeners_) {
      Listener* const closing = listener.get();
      asio::post(closing->acceptor().get_executor(), [closing] { closing->Close(); });
    }
    for (const auto& connection : Connections()) connection->Stop();
    {
      std::unique_lock lock(mutex_);
      all_gone_.wait_for(lock, context_.options.shutdown_grace,
                         [this] { return connections_.empty(); });
    }
    for (const auto& connection : Connections()) connection->Abort();
    // What is under way at the handler holds work guards: the threads end when all of it has been
    // answered.
    work_.reset();
    for (std::thread& thread : threads_) thread.join();
    if (threads_.empty()) io_.stop();
  }

  const std::vector<std::string>& addresses() const { return addresses_; }
  uint64_t connections_open() const {
    const std::lock_guard lock(mutex_);
    return connections_.size();
  }

 private:
  void RunIo() {
    pthread_setname_np(pthread_self(), "kvseek-io");
    std::optional<ComputePool::Guest> guest;
    if (pool_ != nullptr) guest.emplace(*pool_, LookAround());
    for (;;) {
      try {
        RunLooking(guest.has_value() ? &*guest : nullptr);
        return;
      } catch (const std::exception& error) {
        spdlog::error("io thread: {}", error.what());
      }
    }
  }

  /// What a thread that looks does while it is a guest.
  std::function<void()> LookAround() {
    return [this, looks = 0]() mutable {
      try {
        lookout_.Look();
        if (++looks % kLooksBetween == 0) io_.poll();
      } catch (const std::exception& error) {
        spdlog::error("io thread: {}", error.what());
      }
    };
  }

  /// io_.run(), which after any work looks for more for a while before it sleeps.
  void RunLooking(ComputePool::Guest* guest) {
    if (context_.options.io_spin.count() == 0) {
      io_.run();
      return;
    }
    while (!io_.stopped()) {
      LookForWork(guest);
      if (guest != nullptr) guest->Leave();
      io_.run_one();
    }
  }

  /// Returns when there has been none for io_spin. At rings it looks more often than at sockets,
  /// since that costs no system call. A guest's work is work.
  void LookForWork(ComputePool::Guest* guest) {
    const transport::Lookout::Watch watch(lookout_);
    auto last_work = std::chrono::steady_clock::now();
    auto now = last_work;
    while (!io_.stopped() && now - last_work < context_.options.io_spin) {
      bool found = false;
      for (int i = 0; i < kLooksBetween && !found && lookout_.HasStreams(); ++i) {
        found = lookout_.Look() || (guest != nullptr && guest->Help());
        if (!found) transport::Pause();
      }
      if (io_.poll() != 0) found = true;
      now = std::chrono::steady_clock::now();
      if (found) last_work = now;
    }
  }

  std::vector<std::shared_ptr<Connection>> Connections() {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<Connection>> all;
    all.reserve(connections_.size());
    for (const auto& [key, connection] : connections_) all.push_back(connection);
    return all;
  }

  /// A connection's strand. One thread is one without further ado.
  asio::any_io_executor MakeExecutor() {
    if (context_.options.io_threads <= 1) return io_.get_executor();
    return asio::make_strand(io_);
  }

  asio::awaitable<void> AcceptAll(Listener& listener) {
    asio::steady_timer pause(listener.acceptor().get_executor());
    while (listener.acceptor().is_open()) {
      auto [error, socket] = co_await listener.acceptor().async_accept(MakeExecutor(), kAsTuple);
      if (error == asio::error::operation_aborted) break;
      if (error) {
        spdlog::warn("accept on {}: {}", listener.address(), error.message());
        pause.expires_after(kAcceptPause);
        co_await pause.async_wait(kAsTuple);
        continue;
      }
      Admit(std::move(socket));
    }
  }

  void Admit(transport::Stream::Socket socket) {
    std::unique_lock lock(mutex_);
    if (stopped_) return;
    if (connections_.size() < context_.options.connections_max) {
      const auto connection = std::make_shared<Connection>(std::move(socket), context_);
      connections_.emplace(connection.get(), connection);
      lock.unlock();
      connection->Start();
      return;
    }
    lock.unlock();
    spdlog::warn("connection refused: {} are open", context_.options.connections_max);
    if (refusals_.fetch_add(1) >= kRefusalsMax) {
      refusals_.fetch_sub(1);
      return;
    }
    const asio::any_io_executor executor = socket.get_executor();
    const absl::Status reason =
        proto::Exhausted("connections_max", "too many connections",
                         static_cast<uint64_t>(context_.options.retry_after.count()));
    asio::co_spawn(executor, Refuse(std::make_shared<transport::Stream>(std::move(socket)), reason),
                   [this](const std::exception_ptr&) { refusals_.fetch_sub(1); });
  }

  ComputePool* const pool_;  ///< or null
  ConnectionContext context_;
  ByteGate gate_;
  transport::Lookout lookout_;
  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::vector<std::string> addresses_;
  std::vector<std::thread> threads_;
  std::atomic<int> refusals_{0};

  mutable std::mutex mutex_;
  std::condition_variable all_gone_;  ///< connections_ became empty
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  absl::flat_hash_map<Connection*, std::shared_ptr<Connection>> connections_
      ABSL_GUARDED_BY(mutex_);
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() { impl_->Stop(); }

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const DaemonOptions& options,
                                                      ServerIdentity identity, Dispatch dispatch,
                                                      Doorbells* doorbells, ComputePool* pool) {
  try {
    auto impl =
        std::make_unique<Impl>(options, std::move(identity), std::move(dispatch), doorbells, pool);
    const absl::Status started = impl->Start();
    if (!started.ok()) return started;
    return std::unique_ptr<Server>(new Server(std::move(impl)));
  } catch (const std::exception& error) {  // Asio's, or out of memory
    return absl::UnavailableError(error.what());
  }
}

const std::vector<std::string>& Server::addresses() const { return impl_->addresses(); }
uint64_t Server::connections_open() const { return impl_->connections_open(); }
void Server::Stop() { impl_->Stop(); }

}  // namespace kvseek::service
