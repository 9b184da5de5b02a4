#include "index/rest_audit.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

#include "absl/types/span.h"

namespace kvseek::index {
namespace {

std::vector<float> Ratios(size_t count) {
  std::vector<float> ratios;
  for (size_t i = 0; i < count; ++i) ratios.push_back(i % 2 == 0 ? 0.5F : 2.0F);
  return ratios;
}

TEST(RestAuditTest, IntervalShrinksWithSamplesAndHoldsTheMean) {
  const RestRatio few = EstimateRatio(Ratios(16), 0.5, 16);
  const RestRatio many = EstimateRatio(Ratios(64), 0.5, 64);
  EXPECT_FLOAT_EQ(many.mean, 1.25F);
  EXPECT_LT(many.low, 1.25F);
  EXPECT_GT(many.high, 1.25F);
  EXPECT_LT(many.high - many.low, few.high - few.low);
}

TEST(RestAuditTest, WhatTheDrawsCannotHaveSeenIsAdmitted) {
  const RestRatio quiet = EstimateRatio(Ratios(64), 0.5, 64);
  const RestRatio noisy = EstimateRatio(Ratios(64), 4.0, 64);
  EXPECT_GT(noisy.high, 5.0F * quiet.high);
  EXPECT_EQ(noisy.low, quiet.low);
  EXPECT_GT(EstimateRatio(Ratios(64), 2.0, 16).high, EstimateRatio(Ratios(64), 2.0, 64).high);
}

TEST(RestAuditTest, AFewLargeRatiosAreFewDegreesOfFreedom) {
  std::vector<float> ratios(256, 1e-3F);
  ratios[10] = ratios[200] = 100.0F;
  const RestRatio two = EstimateRatio(ratios, 0.5, 256);
  // Two draws make up the mean: normal theory alone would say a factor of e^(1.96 / sqrt 2) = 4.
  EXPECT_GT(two.high, 10.0F * two.mean);
  EXPECT_LT(two.low, 0.1F * two.mean);
  ratios[10] = 0.0F;
  EXPECT_GT(EstimateRatio(ratios, 0.5, 256).high, 1e20F);  // one draw tells nothing
  EXPECT_EQ(EstimateRatio(std::vector<float>(5), 0.5, 5).high, kUnbounded);
}

}  // namespace
}  // namespace kvseek::index
