// One picture: y over x, both logarithmic, as SVG and as text for a terminal.
#ifndef KVSEEK_CLI_PLOT_H_
#define KVSEEK_CLI_PLOT_H_

#include <string>
#include <vector>

namespace kvseek::cli {

struct PlotPoint {
  double x = 0.0;  ///< > 0, as y is; other points are left out
  double y = 0.0;
  std::string label;  ///< "" : none
};

struct PlotSeries {
  std::string name;
  std::vector<PlotPoint> points;  ///< joined by a line in this order
};

struct Plot {
  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<PlotSeries> series;  ///< up to six are told apart
};

/// A whole SVG file.
std::string RenderSvg(const Plot& plot);
/// `width` x `height` characters of plot, with axes and a legend around them. REQUIRES: both at
/// least 10.
std::string RenderText(const Plot& plot, int width, int height);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_PLOT_H_
