#include "service/doorbells.h"

#include <pthread.h>
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/dtype.h"
#include "proto/status_code.h"
#include "service/field_checks.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr microseconds kNapMin{20};
constexpr microseconds kNapMax{1000};
constexpr int kNapShare = 16;

absl::Status CheckHeads(const proto::OpenDoorbellRequest& message) {
  uint32_t lowest = 0;
  for (int i = 0; i < message.kv_heads_size(); ++i) {
    const uint32_t head = message.kv_heads(i);
    if (head < lowest || head >= message.shape().kv_heads()) {
      return Invalid(absl::StrCat("kv_heads[", i, "]"),
                     absl::StrCat("must be more than the one before and one of the ",
                                  message.shape().kv_heads(), " KV heads, not ", head));
    }
    lowest = head + 1;
  }
  return absl::OkStatus();
}

}  // namespace

Doorbells::Doorbells(const DaemonOptions& options, SessionStore& store, AskHandler ask,
                     ComputePool* pool)
    : options_(options),
      store_(store),
      pool_(pool),
      validator_(options_, store_),
      search_validator_(options_, store_),
      ask_(std::move(ask)),
      thread_([this] { Work(); }) {}

Doorbells::~Doorbells() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    has_news_.store(true);
  }
  news_.notify_all();
  thread_.join();
}

absl::StatusOr<DoorbellSettings> Doorbells::Check(const proto::OpenDoorbellRequest& message) const {
  if (!message.has_shape()) return Invalid("shape", "is missing");
  const proto::ModelShape& shape = message.shape();
  absl::Status status = validator_.CheckShape(shape);
  if (status.ok()) status = CheckHeads(message);
  status.Update(CheckBetween("items_max", message.items_max(), 1, options_.batch_items_max));
  status.Update(CheckBetween("tokens_max", message.tokens_max(), 1, options_.query_tokens_max));
  const auto dtype = static_cast<kernels::DType>(message.query_dtype());
  if (!proto::DType_IsValid(message.query_dtype()) || kernels::DTypeBytes(dtype) == 0) {
    status.Update(Invalid("query_dtype", "must be bf16, fp16 or fp32"));
  }
  status.Update(search_validator_.Check(message.options()));
  if (message.options().list_read()) {
    status.Update(Invalid("options.list_read", "a doorbell brings states alone"));
  }
  if (!status.ok()) return status;

  DoorbellSettings settings;
  const uint32_t group = shape.query_heads() / shape.kv_heads();
  const auto heads = static_cast<uint32_t>(message.kv_heads_size());
  settings.shape = {.slots = shape.layers(),
                    .items_max = message.items_max(),
                    .tokens_max = message.tokens_max(),
                    .query_heads = (heads == 0 ? shape.kv_heads() : heads) * group,
                    .key_dim = shape.key_dim(),
                    .value_dim = shape.value_dim(),
                    .query_element_bytes = static_cast<uint32_t>(kernels::DTypeBytes(dtype))};
  settings.request = message;
  settings.deadline = message.deadline_us() == 0 ? microseconds(options_.deadline_default)
                                                 : microseconds(message.deadline_us());
  return settings;
}

absl::StatusOr<std::shared_ptr<Doorbell>> Doorbells::Open(const proto::OpenDoorbellRequest& message,
                                                          std::shared_ptr<ByteGate> gate) {
  auto settings = Check(message);
  if (!settings.ok()) return settings.status();
  const auto again = static_cast<uint64_t>(options_.retry_after.count());
  if (counts_->open.load(std::memory_order_relaxed) >= options_.doorbells_max) {
    return proto::Exhausted("", absl::StrCat(options_.doorbells_max, " doorbells are open"), again);
  }
  const uint64_t bytes = transport::DoorbellLayout(settings->shape).bytes();
  if (bytes > options_.shared_memory_bytes_max) {
    return proto::Exhausted("items_max",
                            absl::StrCat("takes ", bytes, " bytes of shared memory; the limit is ",
                                         options_.shared_memory_bytes_max),
                            0);
  }
  if (!gate->TryTake(bytes)) {
    return proto::Exhausted("", absl::StrCat("no ", bytes, " bytes of shared memory left"), again);
  }
  auto memory = transport::SealedMemory::Create("kvseek-doorbell", bytes);
  if (!memory.ok()) {
    gate->Release(bytes);
    return memory.status();
  }
  return std::make_shared<Doorbell>(*std::move(settings), *std::move(memory), store_, counts_,
                                    [gate = std::move(gate), bytes] { gate->Release(bytes); });
}

void Doorbells::Serve(std::shared_ptr<Doorbell> doorbell) {
  {
    const std::lock_guard lock(mutex_);
    arrived_.push_back(std::move(doorbell));
    has_news_.store(true);
  }
  news_.notify_all();
}

bool Doorbells::Gather(std::vector<std::shared_ptr<Doorbell>>& served) {
  std::erase_if(served, [](const auto& doorbell) { return doorbell->closed(); });
  if (!served.empty() && !has_news_.load(std::memory_order_relaxed)) return true;
  std::unique_lock lock(mutex_);
  while (served.empty() && arrived_.empty() && !stopping_) news_.wait(lock);
  has_news_.store(false);
  std::move(arrived_.begin(), arrived_.end(), std::back_inserter(served));
  arrived_.clear();
  return !stopping_;
}

void Doorbells::Work() {
  pthread_setname_np(pthread_self(), "kvseek-bell");
  prctl(PR_SET_TIMERSLACK, 1000UL);  // ns; a nap is to be as long as it says
  std::vector<std::shared_ptr<Doorbell>> served;
  auto last = Clock::now();
  const auto look = [&] {
    bool found = false;
    for (const auto& doorbell : served) found = doorbell->Look(ask_) || found;
    if (found) last = Clock::now();
  };
  std::optional<ComputePool::Guest> guest;
  if (pool_ != nullptr) guest.emplace(*pool_, look);
  while (Gather(served)) {
    look();
    const auto now = Clock::now();
    if (now - last <= options_.doorbell_spin) {
      if (guest.has_value() && guest->Help()) {
        last = Clock::now();
      } else {
        transport::Pause();
      }
      continue;
    }
    if (guest.has_value()) guest->Leave();
    const auto nap = std::chrono::duration_cast<microseconds>(now - last) / kNapShare;
    std::this_thread::sleep_for(std::clamp(nap, kNapMin, kNapMax));
  }
}

std::vector<std::pair<std::string, uint64_t>> Doorbells::Counters() const {
  return {{"doorbells", counts_->open.load(std::memory_order_relaxed)},
          {"doorbell_questions", counts_->questions.load(std::memory_order_relaxed)},
          {"doorbell_errors", counts_->errors.load(std::memory_order_relaxed)},
          {"doorbell_overtaken", counts_->overtaken.load(std::memory_order_relaxed)}};
}

}  // namespace kvseek::service
