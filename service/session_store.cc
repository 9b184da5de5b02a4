#include "service/session_store.h"

#include <algorithm>
#include <mutex>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_code.h"

namespace kvseek::service {
namespace {

uint64_t RandomBootId() {
  std::random_device device;
  uint64_t id = 0;
  while (id == 0) id = (uint64_t{device()} << 32) | device();
  return id;
}

}  // namespace

SessionStore::SessionStore(const DaemonOptions& options, MemoryBudget& budget, int nodes)
    : boot_id_(RandomBootId()),
      sessions_max_(options.sessions_max),
      lease_default_(options.lease_default),
      lease_max_(options.lease_max),
      retry_after_(options.retry_after),
      budget_(budget),
      nodes_(nodes),
      planners_(options.planners_max) {}

absl::StatusOr<std::shared_ptr<Session>> SessionStore::Open(SessionSettings settings,
                                                            int64_t tokens_expected,
                                                            TimePoint now) {
  const uint64_t expected = Session::KvBytes(settings, tokens_expected);
  if (absl::Status status = budget_.Check(expected, "tokens_expected"); !status.ok()) {
    return status;
  }
  Session::Start start;
  const auto nodes = static_cast<uint32_t>(nodes_);
  const uint32_t first = opened_.fetch_add(1, std::memory_order_relaxed) % nodes;
  std::vector<std::shared_ptr<const LayerState>> empty;  // by the first head's node
  for (int node = 0; node < nodes_; ++node) {
    index::KvShape shape = settings.kv;
    shape.node = node;
    empty.push_back(LayerState::Empty(shape, settings.kv_heads, nodes_));
  }
  for (uint32_t l = 0; l < settings.layers; ++l) {
    start.layers.push_back(empty[(first + l) % nodes]);
  }
  start.planner = planners_.Find(settings);
  start.plan = std::make_shared<const SessionPlan>(settings.layers, settings.kv_heads,
                                                   settings.plan, start.planner);
  return Add(std::move(settings), std::move(start), now);
}

absl::StatusOr<std::shared_ptr<Session>> SessionStore::Fork(const Session& parent,
                                                            std::optional<uint64_t> tokens,
                                                            std::chrono::milliseconds lease,
                                                            std::string name, TimePoint now) {
  auto layers = parent.States(tokens.has_value() ? &*tokens : nullptr, budget_);
  if (!layers.ok()) return layers.status();
  SessionSettings settings = parent.settings();
  settings.lease = lease;
  settings.name = std::move(name);
  return Add(std::move(settings), {*std::move(layers), parent.plan(), parent.planner()}, now);
}

absl::StatusOr<std::shared_ptr<Session>> SessionStore::Add(SessionSettings settings,
                                                           Session::Start start, TimePoint now) {
  settings.lease =
      settings.lease.count() == 0 ? lease_default_ : std::min(settings.lease, lease_max_);
  absl::StatusOr<MemoryBudget::Reservation> memory =
      budget_.Reserve(Session::BookkeepingBytes(settings), "");
  if (!memory.ok()) return memory.status();
  const std::lock_guard lock(mutex_);
  if (sessions_.size() >= sessions_max_) {
    return proto::Exhausted("", absl::StrCat(sessions_max_, " sessions are open already"),
                            static_cast<uint64_t>(retry_after_.count()));
  }
  const uint64_t id = next_id_++;
  auto session =
      std::make_shared<Session>(id, std::move(settings), *std::move(memory), std::move(start), now);
  sessions_.emplace(id, session);
  return session;
}

absl::StatusOr<SessionStore::Sessions::iterator> SessionStore::Locate(uint64_t boot_id,
                                                                      uint64_t session_id,
                                                                      absl::string_view field,
                                                                      TimePoint now) {
  if (boot_id != boot_id_) {
    return proto::FieldError(absl::StatusCode::kFailedPrecondition, absl::StrCat(field, ".boot_id"),
                             "the session belongs to another start of the daemon");
  }
  const auto found = sessions_.find(session_id);
  if (found == sessions_.end() || found->second->Expired(now)) {
    return proto::FieldError(absl::StatusCode::kNotFound, field,
                             absl::StrCat("there is no session ", session_id));
  }
  return found;
}

absl::StatusOr<std::shared_ptr<Session>> SessionStore::Find(uint64_t boot_id, uint64_t session_id,
                                                            absl::string_view field,
                                                            TimePoint now) {
  const std::lock_guard lock(mutex_);
  auto found = Locate(boot_id, session_id, field, now);
  if (!found.ok()) return found.status();
  (*found)->second->Touch(now);
  return (*found)->second;
}

absl::StatusOr<std::shared_ptr<Session>> SessionStore::Close(uint64_t boot_id, uint64_t session_id,
                                                             absl::string_view field,
                                                             TimePoint now) {
  const std::lock_guard lock(mutex_);
  auto found = Locate(boot_id, session_id, field, now);
  if (!found.ok()) return found.status();
  std::shared_ptr<Session> session = std::move((*found)->second);
  sessions_.erase(*found);
  return session;
}

std::vector<std::shared_ptr<Session>> SessionStore::ReapExpired(TimePoint now) {
  std::vector<std::shared_ptr<Session>> expired;
  const std::lock_guard lock(mutex_);
  for (auto it = sessions_.begin(); it != sessions_.end();) {
    if (it->second->Expired(now)) {
      expired.push_back(std::move(it->second));
      sessions_.erase(it++);
    } else {
      ++it;
    }
  }
  expired_.fetch_add(expired.size(), std::memory_order_relaxed);
  return expired;
}

std::vector<std::shared_ptr<Session>> SessionStore::List() const {
  std::vector<std::shared_ptr<Session>> sessions;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, session] : sessions_) sessions.push_back(session);
  }
  std::sort(sessions.begin(), sessions.end(),
            [](const auto& a, const auto& b) { return a->id() < b->id(); });
  return sessions;
}

uint64_t SessionStore::size() const {
  const std::lock_guard lock(mutex_);
  return sessions_.size();
}

}  // namespace kvseek::service
