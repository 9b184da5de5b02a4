// Pictures of y over x, as SVG and as text for a terminal. Axes are logarithmic, y if wished
// linear.
#ifndef KVSEEK_CLI_PLOT_H_
#define KVSEEK_CLI_PLOT_H_

#include <string>
#include <vector>

namespace kvseek::cli {

struct PlotPoint {
  double x = 0.0;  ///< > 0, as y is if logarithmic; other points are left out
  double y = 0.0;
  std::string label;  ///< "" : none
};

struct PlotSeries {
  std::string name;
  std::vector<PlotPoint> points;  ///< joined by a line in this order
  bool dashed = false;            ///< in SVG: a line of reference
};

struct Plot {
  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<PlotSeries> series;  ///< up to ten are told apart
  bool y_linear = false;
  double y_min = 0.0;  ///< the axis ends about here; points below are drawn on the lower edge
};

/// A whole SVG file.
std::string RenderSvg(const Plot& plot);
/// One file with all of them, two beside each other, and one legend: the series of each must have
/// the same names in the same order.
std::string RenderSvgPage(const std::vector<Plot>& panels);
/// `width` x `height` characters of plot, with axes and a legend around them. REQUIRES: both at
/// least 10.
std::string RenderText(const Plot& plot, int width, int height);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_PLOT_H_
