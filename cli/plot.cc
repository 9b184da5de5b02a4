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

constexpr std::array kColours = {"#1f5fa8", "#c4541a", "#3d8c40", "#7a4ca0", "#8a6d1d", "#5a5a5a"};
constexpr std::array kMarks = {'o', 'x', '+', '*', '#', '@'};

/// One logarithmic axis, [low, high] mapped to [0, 1].
struct Axis {
  double low = std::numeric_limits<double>::infinity();
  double high = 0.0;

  void Cover(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  /// Widens to numbers of 1, 2 or 5 times a power of ten.
  void RoundOut() {
    if (high <= 0.0) low = high = 1.0;
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
  double Map(double value) const { return std::log(value / low) / std::log(high / low); }
  std::vector<double> Ticks() const { return Ticks(low * 0.999, high * 1.001); }

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

bool Drawn(const PlotPoint& point) { return point.x > 0.0 && point.y > 0.0; }

void Fit(const Plot& plot, Axis& x, Axis& y) {
  for (const PlotSeries& series : plot.series) {
    for (const PlotPoint& point : series.points) {
      if (!Drawn(point)) continue;
      x.Cover(point.x);
      y.Cover(point.y);
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

/// The picture's measures, in pixels.
struct Frame {
  static constexpr double kWidth = 760;
  static constexpr double kHeight = 480;
  static constexpr double kLeft = 76;
  static constexpr double kRight = 24;
  static constexpr double kTop = 48;
  static constexpr double kBottom = 60;

  Axis x;
  Axis y;
  double PixelX(double value) const { return kLeft + x.Map(value) * (kWidth - kLeft - kRight); }
  double PixelY(double value) const {
    return kHeight - kBottom - y.Map(value) * (kHeight - kTop - kBottom);
  }
};

std::string Text(double x, double y, const std::string& anchor, const std::string& rest,
                 const std::string& text) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"%s>%s</text>\n", x, y,
                         anchor, rest, Escape(text));
}

std::string SvgAxes(const Plot& plot, const Frame& frame) {
  std::string svg;
  const double bottom = Frame::kHeight - Frame::kBottom;
  const double right = Frame::kWidth - Frame::kRight;
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
  svg += Text(Frame::kWidth / 2, 28, "middle", " font-size=\"16\"", plot.title);
  svg += Text((Frame::kLeft + right) / 2, Frame::kHeight - 16, "middle", "", plot.x_label);
  const double middle = (Frame::kTop + bottom) / 2;
  svg += Text(18, middle, "middle", absl::StrFormat(" transform=\"rotate(-90 18 %.1f)\"", middle),
              plot.y_label);
  return svg;
}

std::string SvgSeries(const PlotSeries& series, const std::string& colour, const Frame& frame) {
  std::string path;
  std::string marks;
  for (const PlotPoint& point : series.points) {
    if (!Drawn(point)) continue;
    const double x = frame.PixelX(point.x);
    const double y = frame.PixelY(point.y);
    absl::StrAppendFormat(&path, "%c%.1f %.1f", path.empty() ? 'M' : 'L', x, y);
    absl::StrAppendFormat(&marks, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", x, y,
                          colour);
    if (!point.label.empty())
      marks += Text(x + 7, y - 6, "start", " font-size=\"11\"", point.label);
  }
  return absl::StrFormat("<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n%s",
                         path, colour, marks);
}

}  // namespace

std::string RenderSvg(const Plot& plot) {
  Frame frame;
  Fit(plot, frame.x, frame.y);
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
      "font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n"
      "<style>.grid{stroke:#ddd;fill:none}</style>\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
      Frame::kWidth, Frame::kHeight);
  svg += SvgAxes(plot, frame);
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const std::string colour = kColours[i % kColours.size()];
    svg += SvgSeries(plot.series[i], colour, frame);
    const double y = Frame::kTop + 18 + 18 * static_cast<double>(i);
    const double x = Frame::kWidth - Frame::kRight - 12;
    absl::StrAppendFormat(&svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", x, y - 4,
                          colour);
    svg += Text(x - 10, y, "end", "", plot.series[i].name);
  }
  return svg + "</svg>\n";
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
      if (Drawn(point)) rows[row_of(point.y)][column_of(point.x)] = kMarks[i % kMarks.size()];
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
