#include "service/session_store.h"

#include <gtest/gtest.h>

#include "proto/status_code.h"

namespace kvseek::service {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class SessionStoreTest : public testing::Test {
 protected:
  SessionStoreTest() {
    options_.sessions_max = 3;
    options_.lease_default = seconds(10);
    options_.lease_max = seconds(100);
    store_ = std::make_unique<SessionStore>(options_, budget_);
  }
  static SessionSettings Settings(milliseconds lease = milliseconds(0)) {
    return {2, 2, 4, {16, 16, kernels::DType::kBf16, 0.25F, 2}, "name", lease};
  }
  static std::string Describe(const absl::Status& status) {
    return absl::StatusCodeToString(status.code()) + " " + proto::ErrorField(status);
  }

  const TimePoint now_ = std::chrono::steady_clock::now();
  DaemonOptions options_;
  MemoryBudget budget_{1 << 20, milliseconds(50)};
  std::unique_ptr<SessionStore> store_;
};

TEST_F(SessionStoreTest, FindsByHandle) {
  EXPECT_NE(store_->boot_id(), 0U);
  EXPECT_NE(store_->boot_id(), SessionStore(options_, budget_).boot_id());
  const auto session = store_->Open(Settings(), 0, now_);
  ASSERT_TRUE(session.ok());
  const uint64_t boot = store_->boot_id();
  const uint64_t id = (*session)->id();
  EXPECT_EQ(store_->Find(boot, id, "session", now_).value(), *session);
  EXPECT_EQ(Describe(store_->Find(boot + 1, id, "items[3].session", now_).status()),
            "FAILED_PRECONDITION items[3].session.boot_id");
  EXPECT_EQ(Describe(store_->Find(boot, id + 1, "session", now_).status()), "NOT_FOUND session");
  EXPECT_EQ(store_->List().size(), 1U);
  EXPECT_EQ(Describe(store_->Close(boot + 1, id, "session", now_).status()),
            "FAILED_PRECONDITION session.boot_id");
  EXPECT_TRUE(store_->Close(boot, id, "session", now_).ok());
  EXPECT_EQ(Describe(store_->Close(boot, id, "session", now_).status()), "NOT_FOUND session");
  EXPECT_EQ((*session)->settings().name, "name") << "who holds a session keeps it";
}

TEST_F(SessionStoreTest, HeadsAreDealtOutToTheNodes) {
  SessionSettings settings = Settings();
  settings.layers = 3;
  settings.kv_heads = 3;
  settings.query_heads = 3;
  const auto nodes = [](const Session& session) {
    std::vector<std::vector<int>> of_layers;
    for (uint32_t l = 0; l < 3; ++l) {
      const auto state = session.State(l);
      std::vector<int>& of_heads = of_layers.emplace_back();
      for (size_t h = 0; h < 3; ++h) of_heads.push_back(state->Head(h).shape().node);
    }
    return of_layers;
  };
  using Nodes = std::vector<std::vector<int>>;
  const auto one = store_->Open(settings, 0, now_);
  EXPECT_EQ(nodes(**one), Nodes(3, {0, 0, 0}));
  SessionStore store(options_, budget_, 2);
  const auto first = store.Open(settings, 0, now_);
  EXPECT_EQ(nodes(**first), (Nodes{{0, 1, 0}, {1, 0, 1}, {0, 1, 0}}));
  const auto second = store.Open(settings, 0, now_);
  EXPECT_EQ(nodes(**second), (Nodes{{1, 0, 1}, {0, 1, 0}, {1, 0, 1}}));
  const auto forked = store.Fork(**second, std::nullopt, seconds(0), "", now_);
  EXPECT_EQ(nodes(**forked), nodes(**second)) << "it shares their memory";
}

TEST_F(SessionStoreTest, EveryUseRenewsTheLease) {
  const uint64_t boot = store_->boot_id();
  const uint64_t used = (*store_->Open(Settings(seconds(20)), 0, now_))->id();
  const uint64_t unused = (*store_->Open(Settings(), 0, now_))->id();
  ASSERT_TRUE(store_->Find(boot, used, "session", now_ + seconds(15)).ok());
  EXPECT_TRUE(store_->ReapExpired(now_ + seconds(10)).empty());
  EXPECT_EQ(Describe(store_->Find(boot, unused, "session", now_ + seconds(11)).status()),
            "NOT_FOUND session")
      << "expired, though not reaped yet";
  EXPECT_EQ(store_->ReapExpired(now_ + seconds(30)).size(), 1U);
  EXPECT_EQ(store_->expired(), 1U);
  EXPECT_TRUE(store_->Find(boot, used, "session", now_ + seconds(35)).ok());
  EXPECT_EQ(store_->ReapExpired(now_ + seconds(56)).size(), 1U);
  EXPECT_EQ(store_->size(), 0U);
}

TEST_F(SessionStoreTest, BoundsLeases) {
  EXPECT_EQ((*store_->Open(Settings(), 0, now_))->settings().lease, seconds(10));
  EXPECT_EQ((*store_->Open(Settings(seconds(101)), 0, now_))->settings().lease, seconds(100));
}

TEST_F(SessionStoreTest, BoundsSessionsAndMemory) {
  EXPECT_EQ(Describe(store_->Open(Settings(), 1 << 20, now_).status()),
            "RESOURCE_EXHAUSTED tokens_expected");
  EXPECT_EQ(budget_.used_bytes(), 0U);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(store_->Open(Settings(), 1024, now_).ok());
  const uint64_t used = budget_.used_bytes();
  EXPECT_EQ(Describe(store_->Open(Settings(), 0, now_).status()), "RESOURCE_EXHAUSTED ");
  EXPECT_EQ(budget_.used_bytes(), used);
  const auto closed = store_->Close(store_->boot_id(), 1, "session", now_);
  EXPECT_TRUE(store_->Open(Settings(), 0, now_).ok());

  SessionSettings huge = Settings();
  huge.layers = 512;
  huge.kv_heads = 1024;
  huge.query_heads = 1024;
  EXPECT_EQ(store_->Open(huge, 0, now_).status().code(), absl::StatusCode::kResourceExhausted)
      << "tables count too";
}

}  // namespace
}  // namespace kvseek::service
