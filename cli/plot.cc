#include "cli/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace kvseek::cli {
namespace {

constexpr std::array kColours = {"#1f5fa8", "#c4541a", "#3d8c40", "#7a4ca0", "#8a6d1d",
                                 "#5a5a5a", "#d6457f", "#1a9c9c", "#9aa61c", "#000000"};
constexpr std::array kMarks = {'o', 'x', '+', '*', '#', '@', '%', '&', '=', '$'};

/// One axis, [low, high] mapped to [0, 1].
struct Axis {
  bool linear = false;
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void Cover(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  /// Widens to numbers of 1, 2 or 5 times a power of ten; linear: to multiples of such a one.
  void RoundOut() {
    if (high < low) low = high = 1.0;
    if (linear) {
      const double step = Step();
      low = std::floor(low / step + 0.001) * step;
      high = std::ceil(high / step - 0.001) * step;
      if (low == high) high = low + step;
      return;
    }
    const std::vector<double> ticks = Ticks(low / 10.0, high * 10.0);
    for (const double tick : ticks) {
      if (tick >= high * 0.999) {
        high = tick;
        break;
      }
    }
    const auto below = std::find_if(ticks.rbegin(), ticks.rend(),
                                    [&](double tick) { return tick <= low * 1.001; });
    if (below != ticks.rend()) low = *below;
    if (low == high) high = low * 10.0;
  }
  double Map(double value) const {
    if (linear) return (value - low) / (high - low);
    return std::log(value / low) / std::log(high / low);
  }
  std::vector<double> Ticks() const {
    if (!linear) return Ticks(low * 0.999, high * 1.001);
    std::vector<double> ticks;
    const double step = Step();
    for (long i = std::lround(low / step); i <= std::lround(high / step); ++i) {
      ticks.push_back(static_cast<double>(i) * step);
    }
    return ticks;
  }
  /// Of a linear axis: the smallest 1, 2 or 5 times a power of ten with at most ten to the range.
  double Step() const {
    const double least = (high > low ? high - low : 1.0) / 10.0 * 0.999;
    return Ticks(least, least * 10.0).front();
  }

  static std::vector<double> Ticks(double from, double to) {
    std::vector<double> ticks;
    const auto last = static_cast<int>(std::floor(std::log10(to)));
    for (auto exponent = static_cast<int>(std::floor(std::log10(from))); exponent <= last;
         ++exponent) {
      const double power = std::pow(10.0, exponent);
      for (const double digit : {1.0, 2.0, 5.0}) {
        if (digit * power >= from && digit * power <= to) ticks.push_back(digit * power);
      }
    }
    return ticks;
  }
};

bool Drawn(const Plot& plot, const PlotPoint& point) {
  return point.x > 0.0 && (plot.y_linear || point.y > 0.0);
}

void Fit(const Plot& plot, Axis& x, Axis& y) {
  y.linear = plot.y_linear;
  for (const PlotSeries& series : plot.series) {
    for (const PlotPoint& point : series.points) {
      if (!Drawn(plot, point)) continue;
      x.Cover(point.x);
      y.Cover(std::max(point.y, plot.y_min));
    }
  }
  x.RoundOut();
  y.RoundOut();
}

std::string Escape(const std::string& text) {
  return absl::StrReplaceAll(text,
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}});
}

std::string TickText(double value) {
  if (value >= 1e9) return absl::StrFormat("%gG", value / 1e9);
  if (value >= 1e6) return absl::StrFormat("%gM", value / 1e6);
  if (value >= 1e3) return absl::StrFormat("%gk", value / 1e3);
  return absl::StrFormat("%g", value);
}

/// A panel's measures, in pixels.
struct Frame {
  static constexpr double kLeft = 76;
  static constexpr double kRight = 24;
  static constexpr double kTop = 48;
  static constexpr double kBottom = 60;

  double width = 760;
  double height = 480;
  Axis x;
  Axis y;
  double PixelX(double value) const { return kLeft + x.Map(value) * (width - kLeft - kRight); }
  double PixelY(double value) const {
    return height - kBottom - y.Map(value) * (height - kTop - kBottom);
  }
};

std::string Text(double x, double y, const std::string& anchor, const std::string& rest,
                 const std::string& text) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"%s>%s</text>\n", x, y,
                         anchor, rest, Escape(text));
}

std::string Circle(double x, double y, const std::string& colour) {
  return absl::StrFormat("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", x, y, colour);
}

std::string Colour(size_t series) { return kColours[series % kColours.size()]; }

std::string SvgAxes(const Plot& plot, const Frame& frame) {
  std::string svg;
  const double bottom = frame.height - Frame::kBottom;
  const double right = frame.width - Frame::kRight;
  for (const double tick : frame.x.Ticks()) {
    const double x = frame.PixelX(tick);
    absl::StrAppendFormat(&svg, "<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>\n", x, Frame::kTop,
                          bottom);
    svg += Text(x, bottom + 18, "middle", "", TickText(tick));
  }
  for (const double tick : frame.y.Ticks()) {
    const double y = frame.PixelY(tick);
    absl::StrAppendFormat(&svg, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>\n", Frame::kLeft, y,
                          right);
    svg += Text(Frame::kLeft - 8, y + 4, "end", "", TickText(tick));
  }
  svg += Text(frame.width / 2, 28, "middle", " font-size=\"16\"", plot.title);
  svg += Text((Frame::kLeft + right) / 2, frame.height - 16, "middle", "", plot.x_label);
  const double middle = (Frame::kTop + bottom) / 2;
  svg += Text(18, middle, "middle", absl::StrFormat(" transform=\"rotate(-90 18 %.1f)\"", middle),
              plot.y_label);
  return svg;
}

std::string SvgSeries(const Plot& plot, size_t which, const Frame& frame) {
  const PlotSeries& series = plot.series[which];
  const std::string colour = Colour(which);
  std::string path;
  std::string marks;
  for (const PlotPoint& point : series.points) {
    if (!Drawn(plot, point)) continue;
    const double x = frame.PixelX(point.x);
    const double y = frame.PixelY(std::max(point.y, frame.y.low));
    absl::StrAppendFormat(&path, "%c%.1f %.1f", path.empty() ? 'M' : 'L', x, y);
    marks += Circle(x, y, colour);
    if (point.label.empty()) continue;
    const bool at_right = x > frame.width * 0.75;
    marks += Text(at_right ? x - 7 : x + 7, y - 6, at_right ? "end" : "start", " font-size=\"11\"",
                  point.label);
  }
  if (path.empty()) return "";
  return absl::StrFormat("<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"%s/>\n%s",
                         path, colour, series.dashed ? " stroke-dasharray=\"5 4\"" : "", marks);
}

/// Axes and curves; `frame` has its size.
std::string SvgPanel(const Plot& plot, Frame frame) {
  Fit(plot, frame.x, frame.y);
  std::string svg = SvgAxes(plot, frame);
  for (size_t i = 0; i < plot.series.size(); ++i) svg += SvgSeries(plot, i, frame);
  return svg;
}

std::string SvgFile(double width, double height, const std::string& content) {
  return absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
      "font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n"
      "<style>.grid{stroke:#ddd;fill:none}</style>\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n%s</svg>\n",
      width, height, content);
}

}  // namespace

std::string RenderSvg(const Plot& plot) {
  const Frame frame;
  std::string svg = SvgPanel(plot, frame);
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const double y = Frame::kTop + 18 + 18 * static_cast<double>(i);
    const double x = frame.width - Frame::kRight - 12;
    svg += Circle(x, y - 4, Colour(i)) + Text(x - 10, y, "end", "", plot.series[i].name);
  }
  return SvgFile(frame.width, frame.height, svg);
}

std::string RenderSvgPage(const std::vector<Plot>& panels) {
  constexpr size_t kColumns = 2;
  constexpr size_t kLegendColumns = 4;
  const Frame frame{.width = 540, .height = 380, .x = {}, .y = {}};
  const double width = kColumns * frame.width;
  std::string svg;
  for (size_t i = 0; i < panels.size(); ++i) {
    const size_t row = i / kColumns;
    absl::StrAppendFormat(&svg, "<g transform=\"translate(%.0f %.0f)\">\n%s</g>\n",
                          static_cast<double>(i % kColumns) * frame.width,
                          static_cast<double>(row) * frame.height, SvgPanel(panels[i], frame));
  }
  const size_t rows = (panels.size() + kColumns - 1) / kColumns;
  const double top = static_cast<double>(rows) * frame.height + 12;
  const size_t entries = panels.empty() ? 0 : panels[0].series.size();
  for (size_t i = 0; i < entries; ++i) {
    const double x = Frame::kLeft + static_cast<double>(i % kLegendColumns) *
                                        (width - Frame::kLeft) / kLegendColumns;
    const size_t row = i / kLegendColumns;
    const double y = top + 20 * static_cast<double>(row);
    svg += Circle(x, y - 4, Colour(i)) + Text(x + 10, y, "start", "", panels[0].series[i].name);
  }
  const size_t legend_rows = (entries + kLegendColumns - 1) / kLegendColumns;
  return SvgFile(width, top + 20 * static_cast<double>(legend_rows), svg);
}

std::string RenderText(const Plot& plot, int width, int height) {
  Axis x;
  Axis y;
  Fit(plot, x, y);
  std::vector<std::string> rows(static_cast<size_t>(height),
                                std::string(static_cast<size_t>(width), ' '));
  const auto row_of = [&](double value) {
    return static_cast<size_t>(std::lround((1.0 - y.Map(value)) * (height - 1)));
  };
  const auto column_of = [&](double value) {
    return static_cast<size_t>(std::lround(x.Map(value) * (width - 1)));
  };
  for (size_t i = 0; i < plot.series.size(); ++i) {
    for (const PlotPoint& point : plot.series[i].points) {
      if (!Drawn(plot, point)) continue;
      rows[row_of(std::max(point.y, y.low))][column_of(point.x)] = kMarks[i % kMarks.size()];
    }
  }
  std::vector<std::string> labels(rows.size());
  for (const double tick : y.Ticks()) labels[row_of(tick)] = TickText(tick);
  std::string text = absl::StrCat(plot.title, "\n", plot.y_label, "\n");
  for (size_t r = 0; r < rows.size(); ++r) {
    absl::StrAppendFormat(&text, "%8s |%s\n", labels[r], rows[r]);
  }
  std::string ticks(static_cast<size_t>(width) + 10, ' ');
  size_t free_from = 0;
  for (const double tick : x.Ticks()) {
    const std::string label = TickText(tick);
    const size_t at = std::min(column_of(tick) + 10, ticks.size() - label.size());
    if (at < free_from) continue;
    ticks.replace(at, label.size(), label);
    free_from = at + label.size() + 1;
  }
  absl::StrAppend(&text, std::string(9, ' '), "+", std::string(static_cast<size_t>(width), '-'),
                  "\n", ticks, "\n", std::string(10, ' '), plot.x_label, "\n");
  for (size_t i = 0; i < plot.series.size(); ++i) {
    absl::StrAppendFormat(&text, "%9c  %s\n", kMarks[i % kMarks.size()], plot.series[i].name);
  }
  return text;
}

}  // namespace kvseek::cli
