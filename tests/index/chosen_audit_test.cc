#include "index/chosen_audit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tests/index/chosen_subject.h"

namespace kvseek::index {
namespace {

struct Audited {
  double cover = 0.0;  ///< share of audits whose interval has the truth in it, of the worst head
  double ratio = 0.0;  ///< of the audits' missed mass to the truth, mean
};

Audited AuditAll(const ChosenSizes& sizes) {
  constexpr int kGroup = 4;
  constexpr int kTrials = 100;
  std::vector<int> covered(kGroup);
  double ratio = 0.0;
  for (uint64_t seed = 100; seed < 100 + kTrials; ++seed) {
    const ChosenSubject subject({.tokens = 2500, .group = kGroup, .seed = seed}, sizes);
    const SearchResult result = subject.Search({.audit_samples = 64, .seed = seed});
    for (int h = 0; h < kGroup; ++h) {
      const double truth = subject.MissedMass(h);
      const auto at = static_cast<size_t>(h);
      const double low = double{result.report.missed_low[at]};
      const double high = double{result.report.missed_high[at]};
      if (low <= truth && truth <= high) ++covered[at];
      ratio += double{result.report.missed_mass[at]} / truth;
    }
  }
  return {static_cast<double>(*std::min_element(covered.begin(), covered.end())) / kTrials,
          ratio / kTrials / kGroup};
}

TEST(ChosenAuditTest, CoversTheTruthAtTheNominalRate) {
  const Audited audited = AuditAll({.begin = 300, .end = 2500, .share = 0.2});
  EXPECT_GE(audited.cover, 0.9);
  EXPECT_NEAR(audited.ratio, 1.0, 0.05);
}

TEST(ChosenAuditTest, FindsASinkThatAPartHides) {
  // The sink is the first key; it has most of the mass of some heads.
  for (const int parts : {200, 8}) {  // of a dozen keys, and of 256
    const Audited audited = AuditAll({.parts = parts, .end = 2500, .share = 0.01});
    EXPECT_GE(audited.cover, 0.9) << parts;
    EXPECT_NEAR(audited.ratio, 1.0, 0.05) << parts;
  }
}

TEST(ChosenAuditTest, CoversTheTruthWhereOneHeadsWeightsAreFarOff) {
  const Audited audited = AuditAll({.begin = 300, .end = 2500, .share = 0.2, .weight_noise = 2.0});
  EXPECT_GE(audited.cover, 0.9);
  EXPECT_NEAR(audited.ratio, 1.0, 0.1);
}

TEST(ChosenAuditTest, SinksAloneAreNoEstimate) {
  const ChosenSubject subject({.tokens = 1040, .group = 2},
                              {.covered = 1024, .parts = 60, .end = 12, .share = 0.0});
  const SearchResult result = subject.Search({.audit_samples = 1});
  for (int h = 0; h < 2; ++h) {
    const auto at = static_cast<size_t>(h);
    EXPECT_NEAR(result.report.missed_mass[at], 1.0, 1e-6);  // nothing is read
    EXPECT_EQ(result.report.missed_low[at], result.report.missed_mass[at]);
    EXPECT_EQ(result.report.missed_high[at], result.report.missed_mass[at]);
  }
}

TEST(ChosenAuditTest, OneDrawTellsLittleAndSaysSo) {
  const ChosenSubject subject({.tokens = 2500, .group = 1},
                              {.begin = 300, .end = 2500, .share = 0.2});
  const SearchResult result = subject.Search({.audit_samples = 1});
  EXPECT_EQ(result.report.missed_low[0], 0.0F);
  EXPECT_EQ(result.report.missed_high[0], 1.0F);
  EXPECT_GT(result.report.missed_mass[0], 0.0F);
}

TEST(ChosenAuditTest, TheSameSeedDrawsTheSameKeys) {
  const ChosenSubject subject({.tokens = 2500}, {.begin = 300, .end = 2500, .share = 0.2});
  const auto missed = [&](uint64_t seed) {
    return subject.Search({.audit_samples = 16, .seed = seed}).report.missed_mass;
  };
  EXPECT_EQ(missed(5), missed(5));
  EXPECT_NE(missed(5), missed(6));
}

}  // namespace
}  // namespace kvseek::index
