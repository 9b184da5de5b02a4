#include "index/index_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "index/cluster_index.h"
#include "index/graph_index.h"
#include "index/landmark_index.h"
#include "index/parts_index.h"
#include "index/product_index.h"
#include "tests/index/random_trace.h"
#include "tests/index/recorded_trace.h"

namespace kvseek::index {
namespace {

using ::testing::HasSubstr;

constexpr size_t kHeaderBytes = 36;

struct Kind {
  std::string name;
  std::shared_ptr<const BuiltIndex> (*build)(const BuildInput& input);
};

/// Every second block has a landmark of the client's.
std::shared_ptr<const BuiltIndex> BuildGiven(const BuildInput& input) {
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  BuildInput with_landmarks = input;
  std::vector<int64_t> positions;
  std::vector<float> landmarks;
  for (int64_t begin = 0; begin < input.view.SealedTokens(); begin += 128) {
    positions.push_back(begin);
    for (int d = 0; d < input.view.shape.key_dim; ++d) landmarks.push_back(normal(random));
  }
  with_landmarks.landmark_positions = positions;
  with_landmarks.landmarks = landmarks;
  return BuildLandmark(with_landmarks, {.block = 64, .summary = LandmarkSummary::kGiven});
}

std::vector<Kind> AllKinds() {
  return {
      {"Bounds", [](const BuildInput& input) { return BuildLandmark(input, {}); }},
      {"WideBounds", [](const BuildInput& input) { return BuildLandmark(input, {.block = 128}); }},
      {"Mean",
       [](const BuildInput& input) {
         return BuildLandmark(input, {.block = 64, .summary = LandmarkSummary::kMean});
       }},
      {"Given", BuildGiven},
      {"Cluster", [](const BuildInput& input) { return BuildCluster(input, {}); }},
      {"Graph", [](const BuildInput& input) { return BuildIndex(BuiltKind::kGraph, input); }},
      {"Product", [](const BuildInput& input) { return BuildIndex(BuiltKind::kProduct, input); }},
      {"ProductWithoutSketch",
       [](const BuildInput& input) -> std::shared_ptr<const BuiltIndex> {
         return ProductIndex::Build(input, {.subspaces = 22, .sketch = false});
       }},
  };
}

/// A head with training queries.
cli::HeadTrace TrainedTrace(const TraceShape& shape) {
  cli::HeadTrace trace = RandomTrace(shape);
  TraceShape training = shape;
  training.tokens = 1;
  training.steps = 70;
  training.seed = shape.seed + 1;
  trace.prefill_queries = RandomTrace(training).queries;
  for (int i = 0; i < training.steps; ++i) {
    trace.prefill_positions.push_back(shape.tokens * (i + 1) / training.steps - 1);
  }
  return trace;
}

BuildInput InputOf(const cli::HeadTrace& trace, const KvView& view) {
  return {.view = view,
          .group = trace.group,
          .queries = trace.prefill_queries,
          .query_positions = trace.prefill_positions};
}

std::shared_ptr<const BuiltIndex> SaveAndLoad(const BuiltIndex& built, const KvShape& shape) {
  const std::string bytes = SaveIndex(built, shape);
  auto loaded = LoadIndex(bytes, shape);
  EXPECT_TRUE(loaded.ok()) << loaded.status();
  if (!loaded.ok()) return nullptr;
  EXPECT_EQ(SaveIndex(**loaded, shape), bytes);
  return *std::move(loaded);
}

/// Equal to the last bit.
bool Same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void ExpectSame(const SearchResult& a, const SearchResult& b) {
  EXPECT_EQ(a.positions, b.positions);
  EXPECT_TRUE(Same(a.out, b.out));
  EXPECT_TRUE(Same(a.lse, b.lse));
  EXPECT_TRUE(Same(a.report.missed_mass, b.report.missed_mass));
  EXPECT_TRUE(Same(a.report.missed_low, b.report.missed_low));
  EXPECT_TRUE(Same(a.report.missed_high, b.report.missed_high));
  EXPECT_EQ(a.report.keys_scanned, b.report.keys_scanned);
  EXPECT_EQ(a.report.keys_exact, b.report.keys_exact);
  EXPECT_EQ(a.report.bytes_touched, b.report.bytes_touched);
}

std::vector<SearchOptions> ManyOptions() {
  std::vector<SearchOptions> many;
  for (const int candidates : {1, 50, 700, 100000}) {
    many.push_back({.candidates = candidates, .audit_samples = 64, .list_read = true});
    many.push_back({.candidates = candidates, .estimate_rest = false});
    many.push_back({.k = 30, .candidates = candidates});
  }
  many.push_back({.k = 10, .candidates = 100, .exact_top = 10});
  many.push_back({.candidates = 500, .list_read = true, .beta = 4.0F});
  return many;
}

/// Both indexes answer alike, whatever the range, the group and the options.
void ExpectSameAnswers(const cli::HeadTrace& trace, const KvView& view, const BuiltIndex& a,
                       const BuiltIndex& b) {
  Scratch scratch;
  const int64_t covered = a.covered();
  const std::vector<std::pair<int64_t, int64_t>> ranges = {
      {0, trace.tokens}, {777, trace.tokens - 3}, {0, 65}, {covered - 1, covered}};
  for (const auto& [begin, end] : ranges) {
    for (int group = 1; group <= trace.group; group += 2) {
      for (const SearchOptions& options : ManyOptions()) {
        const SearchQuery query{trace.StepQueries(trace.steps - 1), group, begin, end};
        SCOPED_TRACE(testing::Message() << begin << ".." << end << " group " << group << " k "
                                        << options.k << " candidates " << options.candidates);
        ExpectSame(a.Search(view, query, options, scratch),
                   b.Search(view, query, options, scratch));
      }
    }
  }
}

std::string NameOf(const testing::TestParamInfo<Kind>& tested) { return tested.param.name; }

class IndexFileTest : public ::testing::TestWithParam<Kind> {
 protected:
  static void ExpectRoundTrip(const cli::HeadTrace& trace) {
    const cli::StoredHead head(trace, 2);
    const auto built = GetParam().build(InputOf(trace, head.view()));
    ASSERT_NE(built, nullptr);
    const auto loaded = SaveAndLoad(*built, head.view().shape);
    ASSERT_NE(loaded, nullptr);
    EXPECT_EQ(loaded->name(), built->name());
    EXPECT_EQ(loaded->covered(), built->covered());
    EXPECT_EQ(loaded->Bytes(), built->Bytes());
    EXPECT_EQ(loaded->build_core_seconds(), built->build_core_seconds());
    ExpectSameAnswers(trace, head.view(), *built, *loaded);
  }
};

INSTANTIATE_TEST_SUITE_P(Kinds, IndexFileTest, ::testing::ValuesIn(AllKinds()), NameOf);

TEST_P(IndexFileTest, LoadedIndexAnswersIdentically) {
  ExpectRoundTrip(TrainedTrace({.tokens = 6200, .key_dim = 64, .group = 3}));
  ExpectRoundTrip(TrainedTrace({.tokens = 1024, .key_dim = 24, .value_dim = 40, .seed = 2}));
  ExpectRoundTrip(TrainedTrace({.tokens = 9300,
                                .key_dim = 80,
                                .value_dim = 96,
                                .group = 5,
                                .dtype = kernels::DType::kFp16,
                                .seed = 3}));
}

TEST_P(IndexFileTest, LoadedIndexOfARealHeadAnswersIdentically) {
  for (const char* name : {"layer15.kv1", "layer20.kv0"}) ExpectRoundTrip(RecordedTrace(name));
}

TEST_P(IndexFileTest, TheNextBuildTakesALoadedIndexOver) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 10 * kSegmentTokens, .key_dim = 16});
  const cli::StoredHead head(trace, 2);
  KvView earlier = head.view();
  earlier.segments = earlier.segments.subspan(0, 6);
  earlier.tail = {};
  earlier.tail_tokens = 0;
  const auto built = GetParam().build(InputOf(trace, earlier));
  const auto loaded = SaveAndLoad(*built, earlier.shape);
  ASSERT_NE(loaded, nullptr);
  BuildInput input = InputOf(trace, head.view());
  input.previous = built;
  const auto after_built = GetParam().build(input);
  input.previous = loaded;
  const auto after_loaded = GetParam().build(input);
  EXPECT_EQ(after_loaded->covered(), 10 * kSegmentTokens);
  ExpectSameAnswers(trace, head.view(), *after_built, *after_loaded);
  if (const auto* const parts = dynamic_cast<const PartsIndex*>(after_loaded.get())) {
    EXPECT_EQ(parts->runs()[0], dynamic_cast<const PartsIndex&>(*loaded).runs()[0]);
  }
}

TEST_P(IndexFileTest, AnIndexIsForItsShapeOnly) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 1100, .key_dim = 16, .value_dim = 16});
  const cli::StoredHead head(trace, 2);
  const KvShape shape = head.view().shape;
  const std::string bytes = SaveIndex(*GetParam().build(InputOf(trace, head.view())), shape);
  std::vector<KvShape> others(4, shape);
  others[0].key_dim = 24;
  others[1].value_dim = 8;
  others[2].dtype = kernels::DType::kFp16;
  others[3].softmax_scale *= 2.0F;
  for (const KvShape& other : others) {
    const absl::Status status = LoadIndex(bytes, other).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr("shape"));
  }
  KvShape one_bit = shape;
  one_bit.scan_bits = 1;
  EXPECT_TRUE(LoadIndex(bytes, one_bit).ok());
}

struct Section {
  size_t begin = 0;  ///< of its elements; 8 bytes of length come before
  size_t bytes = 0;
};

std::vector<Section> SectionsOf(const std::string& bytes) {
  std::vector<Section> sections;
  for (size_t at = kHeaderBytes; at < bytes.size();) {
    uint64_t length = 0;
    std::memcpy(&length, bytes.data() + at, sizeof(length));
    sections.push_back({at + 8, length});
    at += 8 + length;
  }
  return sections;
}

/// A small saved index, and what it takes to search in what became of it.
class DamagedFileTest : public IndexFileTest {
 protected:
  static absl::StatusOr<std::shared_ptr<const BuiltIndex>> Load(const std::string& bytes) {
    // In an allocation of its own size, so that reading past its end shows.
    const std::vector<char> exact(bytes.begin(), bytes.end());
    return LoadIndex({exact.data(), exact.size()}, Head().view().shape);
  }

  static void ExpectDataLoss(const std::string& bytes, const std::string& section) {
    const absl::Status status = Load(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << section;
    EXPECT_THAT(std::string(status.message()), HasSubstr(section));
  }

  /// Either fails cleanly or makes an index that answers, if wrongly. Returns whether it loaded.
  static bool LoadsOrFails(const std::string& bytes) {
    const auto loaded = Load(bytes);
    if (!loaded.ok()) {
      EXPECT_EQ(loaded.status().code(), absl::StatusCode::kDataLoss);
      EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("saved index, "));
      return false;
    }
    EXPECT_EQ((*loaded)->covered(), 5 * kSegmentTokens);
    Scratch scratch;
    const std::vector<SearchOptions> many = {
        {.candidates = 200, .audit_samples = 16, .list_read = true},
        {.k = 7, .candidates = 900, .exact_top = 7}};
    for (const SearchOptions& options : many) {
      const SearchResult result = (*loaded)->Search(
          Head().view(), {Trace().StepQueries(0), Trace().group, 100, 5000}, options, scratch);
      EXPECT_TRUE(std::is_sorted(result.positions.begin(), result.positions.end()));
      EXPECT_EQ(std::adjacent_find(result.positions.begin(), result.positions.end()),
                result.positions.end());
      for (const int64_t position : result.positions) {
        EXPECT_TRUE(position >= 100 && position < 5000) << position;
      }
    }
    return true;
  }

  static const cli::HeadTrace& Trace() {
    static const auto* const trace = new cli::HeadTrace(
        TrainedTrace({.tokens = 5 * kSegmentTokens, .key_dim = 8, .value_dim = 8, .group = 2}));
    return *trace;
  }
  static const cli::StoredHead& Head() {
    static const auto* const head = new cli::StoredHead(Trace(), 2);
    return *head;
  }

  /// The file with one element of a section changed.
  template <typename T>
  std::string With(size_t section, size_t element, T value) const {
    std::string damaged = bytes_;
    std::memcpy(damaged.data() + sections_[section].begin + element * sizeof(T), &value, sizeof(T));
    return damaged;
  }

  const std::string bytes_ =
      SaveIndex(*GetParam().build(InputOf(Trace(), Head().view())), Head().view().shape);
  const std::vector<Section> sections_ = SectionsOf(bytes_);
};

INSTANTIATE_TEST_SUITE_P(Kinds, DamagedFileTest, ::testing::ValuesIn(AllKinds()), NameOf);

TEST_P(DamagedFileTest, CutOffOrTooLong) {
  ASSERT_TRUE(LoadsOrFails(bytes_));
  for (size_t i = 0; i <= kHeaderBytes; ++i) ExpectDataLoss(bytes_.substr(0, i), "saved index, ");
  for (const Section& section : sections_) {
    for (const size_t end :
         {section.begin - 8, section.begin - 7, section.begin - 1, section.begin, section.begin + 1,
          section.begin + section.bytes / 2, section.begin + section.bytes - 1}) {
      ExpectDataLoss(bytes_.substr(0, end), "cut off");
    }
  }
  ExpectDataLoss(bytes_ + "x", "end");
}

TEST_P(DamagedFileTest, LengthsThatLie) {
  for (const Section& section : sections_) {
    for (const uint64_t length :
         {uint64_t{0}, uint64_t{section.bytes} - 1, uint64_t{section.bytes} + 8, uint64_t{1} << 40,
          uint64_t{1} << 63, ~uint64_t{0}}) {
      std::string damaged = bytes_;
      std::memcpy(damaged.data() + section.begin - 8, &length, sizeof(length));
      ExpectDataLoss(damaged, "bytes, should have");
    }
  }
}

TEST_P(DamagedFileTest, HeadersThatLie) {
  const auto with = [&](size_t offset, auto value) {
    std::string damaged = bytes_;
    std::memcpy(damaged.data() + offset, &value, sizeof(value));
    return damaged;
  };
  ExpectDataLoss(with(0, 'K'), "magic");
  ExpectDataLoss(with(8, uint32_t{1}), "version");
  ExpectDataLoss(with(12, uint8_t{4}), "kind");
  ExpectDataLoss(with(13, uint8_t{3}), "rank");
  ExpectDataLoss(with(15, uint8_t{1}), "header");
  for (const uint64_t covered : {uint64_t{0}, uint64_t{1000}, ~uint64_t{1023}}) {
    ExpectDataLoss(with(24, covered), "covered");
  }
  for (const uint64_t segments : {uint64_t{4}, uint64_t{6}, uint64_t{100}, uint64_t{1} << 52}) {
    ExpectDataLoss(with(24, segments * kSegmentTokens), "");
  }
  for (uint8_t kind = 0; kind < 4; ++kind) {
    for (uint8_t rank = 0; rank < 3; ++rank) {
      std::string damaged = with(12, kind);
      damaged[13] = static_cast<char>(rank);
      LoadsOrFails(damaged);
    }
  }
}

TEST_P(DamagedFileTest, FlippedBytes) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  int loaded = 0;
  for (int trial = 0; trial < 700; ++trial) {
    std::string damaged = bytes_;
    // Anywhere, or near the ends of a section, so that short ones have their turn.
    const int flips = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < flips; ++i) {
      size_t at = random() % bytes_.size();
      if (trial % 2 == 0) {
        const Section& section = sections_[random() % sections_.size()];
        at = section.begin + random() % std::min<size_t>(section.bytes, 16);
        if (random() % 2 == 0) at = section.begin + section.bytes - 1 - random() % 8;
      }
      damaged[at] = static_cast<char>(damaged[at] ^ static_cast<char>(1 + random() % 255));
    }
    loaded += LoadsOrFails(damaged) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GT(loaded, 70);
}

TEST_P(DamagedFileTest, ExtremeNumbers) {
  for (const Section& section : sections_) {
    // fp32 and bf16 that are the largest there are, of both signs, and the smallest.
    for (const uint32_t pattern : {0x7f7f7f7fU, 0xff7fff7fU, 0xff7f7f7fU, 0x00010001U, 0U}) {
      std::string damaged = bytes_;
      for (size_t at = 0; at + sizeof(pattern) <= section.bytes; at += sizeof(pattern)) {
        std::memcpy(damaged.data() + section.begin + at, &pattern, sizeof(pattern));
      }
      LoadsOrFails(damaged);
    }
  }
}

class DamagedGraphTest : public DamagedFileTest {};

INSTANTIATE_TEST_SUITE_P(Kinds, DamagedGraphTest, ::testing::Values(AllKinds()[5]), NameOf);

TEST_P(DamagedGraphTest, NamesTheSection) {
  ASSERT_EQ(sections_.size(), 12U);
  const float infinity = std::numeric_limits<float>::infinity();
  ExpectDataLoss(With(0, 1, -1.0), "build seconds");
  ExpectDataLoss(With(1, 3, std::nanf("")), "basis");
  ExpectDataLoss(With(1, 9, 0.0F), "basis");
  ExpectDataLoss(With(1, 8, 1.0F), "basis");
  ExpectDataLoss(With(2, 5, infinity), "mean keys");
  ExpectDataLoss(With(3, 5, uint16_t{0xbf80}), "key variances");
  ExpectDataLoss(With(4, 5, uint16_t{0x7f80}), "mean values");
  ExpectDataLoss(With(5, 0, -1.0F), "query factor");
  ExpectDataLoss(With(6, 0, uint32_t{1}), "starts");
  ExpectDataLoss(With(6, 77, uint32_t{1000000}), "starts");
  ExpectDataLoss(With(6, 5120, ~uint32_t{0}), "neighbours");
  ExpectDataLoss(With(7, 1234, uint32_t{5120}), "neighbours");
  ExpectDataLoss(With(8, 1234, uint16_t{0}), "distances");
  ExpectDataLoss(With(9, 7, uint32_t{5120}), "entries");
  ExpectDataLoss(With(10, 3, uint32_t{63}), "part entries");
  ExpectDataLoss(With(11, 5119, uint16_t{0x8001}), "deviations");
}

class DamagedProductTest : public DamagedFileTest {};

INSTANTIATE_TEST_SUITE_P(Kinds, DamagedProductTest, ::testing::Values(AllKinds()[6]), NameOf);

TEST_P(DamagedProductTest, NamesTheSection) {
  ASSERT_EQ(sections_.size(), 13U);
  ExpectDataLoss(With(0, 0, -1.0), "build seconds");
  ExpectDataLoss(With(1, 0, uint32_t{0}), "layout");
  ExpectDataLoss(With(1, 0, uint32_t{64}), "layout");
  ExpectDataLoss(With(1, 1, uint32_t{2}), "layout");
  ExpectDataLoss(With(2, 0, uint32_t{0}), "stretch 0, trained");
  ExpectDataLoss(With(2, 0, uint32_t{65}), "stretch 0, trained");
  ExpectDataLoss(With(3, 11, uint32_t{9}), "stretch 0, starts");
  ExpectDataLoss(With(3, 2, uint32_t{8}), "stretch 0, starts");
  ExpectDataLoss(With(4, 5, std::nanf("")), "stretch 0, key map");
  ExpectDataLoss(With(5, 5, uint16_t{0x7fc0}), "stretch 0, query map");
  ExpectDataLoss(With(6, 5, std::nanf("")), "stretch 0, centroids");
  ExpectDataLoss(With(7, 5, 0.0F), "stretch 0, errors");
  ExpectDataLoss(With(8, 5, std::nanf("")), "stretch 0, components");
  ExpectDataLoss(With(9, 7, -1.0F), "stretch 0, steps");
  ExpectDataLoss(With(12, 3, uint16_t{0x7fc0}), "stretch 0, value means");
}

class DamagedPartsTest : public DamagedFileTest {};

INSTANTIATE_TEST_SUITE_P(Kinds, DamagedPartsTest,
                         ::testing::Values(AllKinds()[1], AllKinds()[2], AllKinds()[3],
                                           AllKinds()[4]),
                         NameOf);

TEST_P(DamagedPartsTest, NamesTheSection) {
  const bool bounds = GetParam().name == "WideBounds";
  // The part of each key, of the first run and of the second.
  const size_t second = bounds ? 13 : GetParam().name == "Given" ? 7 : 6;
  ASSERT_EQ(sections_[2].bytes, 2U * kRunTokens);
  ASSERT_EQ(sections_[second].bytes, 2U * kSegmentTokens);
  ExpectDataLoss(With(2, 0, uint16_t{65535}), "run 0, part of key");
  ExpectDataLoss(With(second, 5, uint16_t{4000}), "run 1, part of key");
  ExpectDataLoss(With(3, 0, std::nanf("")), "run 0, mean keys");
  ExpectDataLoss(With(second + 1, 0, std::nanf("")), "run 1, mean keys");
  if (bounds) {
    ExpectDataLoss(With(5, 0, uint16_t{0x7f00}), "run 0, upper bounds");
    ExpectDataLoss(With(6, 0, uint16_t{0x7fc0}), "run 0, upper bounds");
  }
}

}  // namespace
}  // namespace kvseek::index
