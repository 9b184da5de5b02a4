#include "client/decoder/head_modes.h"

#include <gtest/gtest.h>

#include <map>

namespace kvseek::client {
namespace {

/// Plays `steps` steps in which the modes take what `cost` says; how often each was chosen.
std::map<HeadMode, int> Play(ModeChooser& chooser, int steps, std::map<HeadMode, double> cost) {
  std::map<HeadMode, int> chosen;
  for (int step = 0; step < steps; ++step) {
    const HeadMode mode = chooser.Next(0)[0];
    ++chosen[mode];
    chooser.Record(0, cost[mode]);
  }
  return chosen;
}

TEST(ModeChooserTest, KeepsToTheFasterMode) {
  for (const HeadMode faster : {HeadMode::kRows, HeadMode::kState}) {
    ModeChooser chooser(1, 1, {}, /*rows=*/true);
    std::map<HeadMode, double> cost{{HeadMode::kRows, 100.0}, {HeadMode::kState, 100.0}};
    cost[faster] = 50.0;
    auto chosen = Play(chooser, 100, cost);
    EXPECT_GE(chosen[faster], 90);
    EXPECT_EQ(chosen[HeadMode::kRows] + chosen[HeadMode::kState], 100);
  }
}

TEST(ModeChooserTest, FollowsWhenCostsChange) {
  ModeChooser chooser(1, 1, {}, true);
  Play(chooser, 100, {{HeadMode::kRows, 50.0}, {HeadMode::kState, 100.0}});
  // Rows became slow: their average passes the other's soon.
  auto chosen = Play(chooser, 100, {{HeadMode::kRows, 300.0}, {HeadMode::kState, 100.0}});
  EXPECT_GE(chosen[HeadMode::kState], 90);
  // Rows are fast again, which a trial finds out.
  Play(chooser, 40 * ModeChooser::kTrialEvery,
       {{HeadMode::kRows, 10.0}, {HeadMode::kState, 100.0}});
  EXPECT_EQ(chooser.Next(0)[0], HeadMode::kRows);
}

TEST(ModeChooserTest, LayersAreApart) {
  ModeChooser chooser(2, 1, {}, true);
  for (int step = 0; step < 20; ++step) {
    chooser.Record(0, chooser.Next(0)[0] == HeadMode::kRows ? 10.0 : 20.0);
    chooser.Record(1, chooser.Next(1)[0] == HeadMode::kRows ? 20.0 : 10.0);
  }
  EXPECT_EQ(chooser.Next(0)[0], HeadMode::kRows);
  EXPECT_EQ(chooser.Next(1)[0], HeadMode::kState);
}

TEST(ModeChooserTest, GivenModesStay) {
  const std::vector<HeadMode> modes{HeadMode::kLocal, HeadMode::kRows, HeadMode::kAuto,
                                    HeadMode::kState};
  ModeChooser chooser(1, 4, modes, true);
  for (int step = 0; step < 20; ++step) {
    const std::vector<HeadMode>& next = chooser.Next(0);
    EXPECT_EQ(next[0], HeadMode::kLocal);
    EXPECT_EQ(next[1], HeadMode::kRows);
    EXPECT_TRUE(next[2] == HeadMode::kRows || next[2] == HeadMode::kState);
    EXPECT_EQ(next[3], HeadMode::kState);
    chooser.Record(0, 1.0);
  }
}

TEST(ModeChooserTest, WithoutRowsAutoIsState) {
  ModeChooser chooser(1, 1, {}, /*rows=*/false);
  EXPECT_EQ(Play(chooser, 50, {})[HeadMode::kState], 50);
}

}  // namespace
}  // namespace kvseek::client
