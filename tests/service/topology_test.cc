#include "service/topology.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <utility>

namespace kvseek::service {
namespace {

TEST(ParseCpuList, Formats) {
  const auto parse = [](absl::string_view text) { return ParseCpuList(text, 100); };
  EXPECT_EQ(*parse("0-3,8,10-11\n"), (std::vector<int>{0, 1, 2, 3, 8, 10, 11}));
  EXPECT_EQ(*parse("0"), std::vector<int>{0});
  EXPECT_EQ(*parse("7-7,99"), (std::vector<int>{7, 99}));
  EXPECT_EQ(*parse("\n"), std::vector<int>{});
  EXPECT_EQ(*parse(""), std::vector<int>{});
  for (const char* bad :
       {"x", "1,", ",1", "1,,2", "3-1", "-1", "1-", "1-2-3", "0-4:2/2", "100", "0-4294967295",
        "99999999999999999999", "5,3", "0-3,2", "1 2", "0x1", "(null)"}) {
    EXPECT_EQ(parse(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

class TopologyTest : public testing::Test {
 protected:
  TopologyTest() { std::filesystem::create_directories(root_); }
  ~TopologyTest() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root_ / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  absl::StatusOr<Topology> Read(const std::vector<int>& allowed) const {
    return ReadTopology(root_.string(), allowed);
  }

  const std::filesystem::path root_ = std::filesystem::path(testing::TempDir()) /
                                      testing::UnitTest::GetInstance()->current_test_info()->name();
};

using Nodes = std::vector<std::pair<int, std::vector<int>>>;

Nodes Look(const Topology& topology) {
  Nodes nodes;
  for (const NumaNode& node : topology) nodes.emplace_back(node.id, node.cpus);
  return nodes;
}

TEST_F(TopologyTest, TwoNodes) {
  Write("online", "0-1\n");
  Write("node0/cpulist", "0-1,4-5\n");
  Write("node1/cpulist", "2-3,6-7\n");
  const auto topology = Read({0, 1, 2, 3, 4, 5, 6, 7});
  ASSERT_TRUE(topology.ok()) << topology.status();
  EXPECT_EQ(Look(*topology), (Nodes{{0, {0, 1, 4, 5}}, {1, {2, 3, 6, 7}}}));
}

TEST_F(TopologyTest, HolesMemoryOnlyNodesAndCpusThatTheProcessMayNotUse) {
  Write("online", "0,2,8-9\n");
  Write("node0/cpulist", "0-3\n");
  Write("node1/cpulist", "never read\n");
  Write("node2/cpulist", "\n");  // memory only
  Write("node8/cpulist", "8-11\n");
  Write("node9/cpulist", "12-15\n");
  const auto topology = Read({1, 3, 8, 9});  // 0, 2: offline; 10 on: another's
  ASSERT_TRUE(topology.ok()) << topology.status();
  EXPECT_EQ(Look(*topology), (Nodes{{0, {1, 3}}, {8, {8, 9}}}));
}

TEST_F(TopologyTest, OneNodeWhereTheSystemKnowsNone) {
  EXPECT_EQ(Look(*Read({0, 3})), (Nodes{{0, {0, 3}}}));
  EXPECT_EQ(Look(*ReadTopology((root_ / "missing").string(), {0, 3})), (Nodes{{0, {0, 3}}}));
}

TEST_F(TopologyTest, RefusesWhatMakesNoSense) {
  const auto code = [this] { return Read({0, 1, 2, 3}).status().code(); };
  constexpr auto kBad = absl::StatusCode::kInvalidArgument;
  Write("online", "0-1\n");
  Write("node0/cpulist", "0-1\n");
  EXPECT_EQ(code(), kBad) << "node1 is missing";
  Write("node1/cpulist", "1-3\n");
  EXPECT_EQ(code(), kBad) << "cpu 1 is of two nodes";
  Write("node1/cpulist", "3\n");
  EXPECT_EQ(code(), kBad) << "cpu 2 is of none";
  Write("node1/cpulist", "2-\n");
  EXPECT_EQ(code(), kBad);
  Write("node1/cpulist", "2-3\n");
  EXPECT_EQ(code(), absl::StatusCode::kOk);
  for (const char* online : {"", "0-", "0-1023,1024", "nonsense", "1,0"}) {
    Write("online", online);
    EXPECT_EQ(code(), kBad) << online;
  }
  std::filesystem::remove(root_ / "online");
  std::filesystem::create_directory(root_ / "online");
  EXPECT_EQ(code(), kBad) << "a folder";
}

TEST(Topology, OfThisMachine) {
  const std::vector<int> allowed = AllowedCpus();
  ASSERT_FALSE(allowed.empty());
  const auto topology = ReadTopology("/sys/devices/system/node", allowed);
  ASSERT_TRUE(topology.ok()) << topology.status();
  EXPECT_FALSE(topology->front().cpus.empty());
}

}  // namespace
}  // namespace kvseek::service
