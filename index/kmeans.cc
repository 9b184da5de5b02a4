#include "index/kmeans.h"

#include <faiss/Clustering.h>
#include <faiss/Index.h>
#include <omp.h>

#include <algorithm>
#include <limits>

#include "index/scratch.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/product_codes.h"

namespace kvseek::index {
namespace {

constexpr int kIterations = 10;  // half as many cost a tenth of the quality, more give nothing
constexpr int kSeed = 1234;
constexpr int kBatch = 64;  // points that are compared with all centroids at a time

/// Finds nearest centroids with our kernels, since the distribution's FAISS knows SSE only and
/// starts threads of its own.
class NearestCentroid final : public faiss::Index {
 public:
  explicit NearestCentroid(int dim) : faiss::Index(dim) {}

  void add(int64_t n, const float* x) override {
    centroids_.insert(centroids_.end(), x, x + n * d);
    for (int64_t i = 0; i < n; ++i) {
      float square = 0.0F;
      for (int j = 0; j < d; ++j) square += x[i * d + j] * x[i * d + j];
      half_squares_.push_back(0.5F * square);
    }
    ntotal += n;
  }

  void search(int64_t n, const float* x, int64_t, float* distances, int64_t* labels,
              const faiss::SearchParameters*) const override {
    const auto count = static_cast<int>(ntotal);
    const AlignedArray<float> scores = MakeAligned<float>(static_cast<size_t>(kBatch) * count);
    for (int64_t at = 0; at < n; at += kBatch) {
      const auto batch = static_cast<int>(std::min<int64_t>(kBatch, n - at));
      kernels::ScoreFloatRows(x + at * d, batch, centroids_.data(), count, d, scores.get(), count);
      for (int i = 0; i < batch; ++i) {
        // |x - c|^2 is least where <x, c> - |c|^2 / 2 is largest.
        const float* const row = scores.get() + static_cast<ptrdiff_t>(i) * count;
        float best = -std::numeric_limits<float>::infinity();
        for (int c = 0; c < count; ++c) {
          const float value = row[c] - half_squares_[static_cast<size_t>(c)];
          if (value > best) {
            best = value;
            labels[at + i] = c;
          }
        }
        distances[at + i] = -2.0F * best;
      }
    }
  }

  void reset() override {
    centroids_.clear();
    half_squares_.clear();
    ntotal = 0;
  }

 private:
  std::vector<float> centroids_;
  std::vector<float> half_squares_;  ///< |c|^2 / 2
};

/// The same for 64 centroids of any dimension.
class NearestOf64 final : public faiss::Index {
 public:
  explicit NearestOf64(int dim)
      : faiss::Index(dim), centroids_(static_cast<size_t>(dim) * kernels::kCentroids) {}

  void add(int64_t n, const float* x) override {
    for (int64_t c = 0; c < n; ++c) {
      for (int i = 0; i < d; ++i) {
        centroids_[static_cast<size_t>(i * kernels::kCentroids + c)] = x[c * d + i];
      }
    }
    ntotal = n;
  }

  void search(int64_t n, const float* x, int64_t, float* distances, int64_t* labels,
              const faiss::SearchParameters*) const override {
    std::vector<uint8_t> nearest(static_cast<size_t>(n));
    std::fill_n(distances, n, 0.0F);
    kernels::NearestCentroids(x, d, static_cast<int>(n), centroids_.data(), d, nearest.data(), 1,
                              distances);
    std::copy(nearest.begin(), nearest.end(), labels);
  }

  void reset() override { ntotal = 0; }

  const std::vector<float>& centroids() const { return centroids_; }

 private:
  std::vector<float> centroids_;  ///< (d, 64)
};

/// Runs the iterations; `nearest` holds the last centroids afterwards.
void Train(absl::Span<const float> points, int dim, int clusters, faiss::Index& nearest) {
  const auto n = static_cast<int64_t>(points.size()) / dim;
  faiss::ClusteringParameters parameters;
  parameters.niter = kIterations;
  parameters.seed = kSeed;
  parameters.min_points_per_centroid = 1;
  parameters.max_points_per_centroid = static_cast<int>(n);
  faiss::Clustering clustering(dim, clusters, parameters);
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  clustering.train(n, points.data(), nearest);
  omp_set_num_threads(threads);
}

}  // namespace

std::vector<uint16_t> AssignToClusters(absl::Span<const float> points, int dim, int clusters) {
  const auto n = static_cast<int64_t>(points.size()) / dim;
  NearestCentroid nearest(dim);
  Train(points, dim, clusters, nearest);
  std::vector<int64_t> labels(static_cast<size_t>(n));
  std::vector<float> distances(labels.size());
  nearest.search(n, points.data(), 1, distances.data(), labels.data(), nullptr);
  std::vector<uint16_t> cluster_of(labels.begin(), labels.end());
  CompactNumbers(cluster_of);
  return cluster_of;
}

std::vector<float> TrainCentroids(absl::Span<const float> points, int dim) {
  NearestOf64 nearest(dim);
  Train(points, dim, kernels::kCentroids, nearest);
  return nearest.centroids();
}

int CompactNumbers(std::vector<uint16_t>& numbers) {
  std::vector<uint16_t> number_of(*std::max_element(numbers.begin(), numbers.end()) + size_t{1});
  for (const uint16_t number : numbers) number_of[number] = 1;
  uint16_t next = 0;
  for (uint16_t& number : number_of) number = number != 0 ? next++ : uint16_t{0};
  for (uint16_t& number : numbers) number = number_of[number];
  return next;
}

}  // namespace kvseek::index
