#include "cli/plot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/table.h"

namespace kvseek::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

Plot SamplePlot() {
  return {.title = "a < b & c",
          .x_label = "bytes",
          .y_label = "error",
          .series = {{"first", {{1000, 0.1, "one"}, {1e6, 0.001, ""}}},
                     {"second", {{1000, 0.01, ""}, {0.0, 5.0, "nowhere"}}}}};
}

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST(PlotTest, SvgShowsEveryPoint) {
  const std::string svg = RenderSvg(SamplePlot());
  EXPECT_EQ(Count(svg, "<circle"), 3U + 2U);  // points, and the legend's marks
  EXPECT_THAT(svg, HasSubstr("a &lt; b &amp; c"));
  EXPECT_THAT(svg, HasSubstr(">one</text>"));
  EXPECT_THAT(svg, Not(HasSubstr("nowhere")));
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  EXPECT_THAT(svg, HasSubstr(">1M</text>"));
}

TEST(PlotTest, TextPutsPointsWhereTheyBelong) {
  const std::string text = RenderText(SamplePlot(), 31, 11);
  // x 1k..1M over 31 columns, y 0.1..0.001 over 11 rows: the first row and column, the last, and
  // halfway down.
  EXPECT_THAT(text, HasSubstr("     0.1 |o" + std::string(30, ' ') + "\n"));
  EXPECT_THAT(text, HasSubstr("   0.001 |" + std::string(30, ' ') + "o\n"));
  EXPECT_THAT(text, HasSubstr("    0.01 |x" + std::string(30, ' ') + "\n"));
}

TEST(PlotTest, LinearAxesBeginAtRoundNumbers) {
  Plot plot = SamplePlot();
  plot.y_linear = true;
  plot.series = {{"first", {{10, 0.43, ""}, {100, 1.0, ""}}}, {"second", {{10, 0.7, ""}}}};
  // 0.4..1.0 over 13 rows: a tenth each second row.
  const std::string text = RenderText(plot, 11, 13);
  EXPECT_THAT(text, HasSubstr("       1 |          o\n"));
  EXPECT_THAT(text, HasSubstr("     0.7 |x          \n"));
  EXPECT_THAT(text, HasSubstr("     0.4 |"));
  EXPECT_THAT(text, Not(HasSubstr("0.3")));
  plot.series = {{"zero", {{10, 0.0, ""}}}};
  EXPECT_EQ(Count(RenderSvg(plot), "<circle"), 2U) << "0 has a place on a linear axis";
}

TEST(PlotTest, PointsFarBelowAreDrawnOnTheEdge) {
  Plot plot = SamplePlot();
  plot.series[1].points.push_back({1e6, 1e-9, ""});
  plot.y_min = 0.001;
  const std::string text = RenderText(plot, 31, 11);
  EXPECT_THAT(text, HasSubstr("   0.001 |" + std::string(30, ' ') + "x\n"));
  EXPECT_THAT(text, HasSubstr("     0.1 |o" + std::string(30, ' ') + "\n"));
}

TEST(PlotTest, APageHasOneLegend) {
  Plot other = SamplePlot();
  other.title = "other";
  other.series[0].dashed = true;
  other.series[1].points.clear();
  const std::string svg = RenderSvgPage({SamplePlot(), other, SamplePlot()});
  EXPECT_EQ(Count(svg, "<svg"), 1U);
  EXPECT_EQ(Count(svg, "<g "), 3U);
  EXPECT_EQ(Count(svg, "</g>"), 3U);
  EXPECT_EQ(Count(svg, "<circle"), 3U + 2U + 3U + 2U);
  EXPECT_EQ(Count(svg, "stroke-dasharray"), 1U);
  EXPECT_EQ(Count(svg, ">first</text>"), 1U);
  EXPECT_EQ(Count(svg, ">second</text>"), 1U);
  EXPECT_EQ(Count(svg, ">a &lt; b &amp; c</text>"), 2U);
  EXPECT_THAT(RenderSvgPage({}), HasSubstr("</svg>"));
}

TEST(PlotTest, SurvivesNoPoints) {
  EXPECT_THAT(RenderSvg({.title = "", .x_label = "", .y_label = "", .series = {}}),
              HasSubstr("</svg>"));
  EXPECT_THAT(RenderText({.title = "", .x_label = "", .y_label = "", .series = {}}, 20, 10),
              HasSubstr("|"));
}

TEST(TableTest, AlignsColumns) {
  Table table({"name", "n"});
  table.Add({"a", "100"});
  EXPECT_EQ(table.Text(), "name    n\na     100\n");
}

TEST(TableTest, ShortensNumbers) {
  EXPECT_EQ(Short(0), "0");
  EXPECT_EQ(Short(999), "999");
  EXPECT_EQ(Short(7680), "7.68k");
  EXPECT_EQ(Short(1.5e6), "1.50M");
  EXPECT_EQ(ShortBytes(1536), "1.50 KiB");
  EXPECT_EQ(Digits(0.01234), "0.0123");
  EXPECT_EQ(Digits(2.5e-6), "2.50e-06");
  EXPECT_EQ(Digits(123.4), "123");
}

}  // namespace
}  // namespace kvseek::cli
