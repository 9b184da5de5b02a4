// One search of the ladder, split over files by step: what it begins with and how its steps follow
// each other (ladder_plan.cc), the sample (ladder_sample.cc), the scan (ladder_scan_piece.cc),
// exact rows and putting together (ladder_finish.cc); the audit stands beside them
// (ladder_audit.h), and so does the search that takes its candidates and weights from an earlier
// one (ladder_recall.cc; reuse.h).
//
// The range is cut in two. Whole 64-key blocks of sealed segments are the ladder's; what is left at
// either end, and the tail, is read exactly. For a group of heads, the queries are rotated; then in
// steps
//
//   tables   build each codebook's tables and attend to the exact part, in pieces if it is long.
//            Sign codes' tables are built with the plan, and the exact part is the next step's
//   sample   estimate a fixed sample of blocks; from it and the exact part each head's lse, and
//            from the sample thresholds that about `candidates` keys of the group exceed
//            (docs/adr/0004)
//   scan     scan all codes; keys over a threshold are candidates, read at 4 bits; all others add
//            their estimated weight to what stands for their values (scan_code.h); a piece lists
//            what may be each head's best candidates; merge in order
//   refine   Attend: replace each head's best candidates' 4-bit parts by exact ones
//
// and in the end TopK takes the returned keys' parts out, and the report is made.
#ifndef KVSEEK_INDEX_LADDER_PLAN_H_
#define KVSEEK_INDEX_LADDER_PLAN_H_

#include <array>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <utility>
#include <variant>
#include <vector>

#include "absl/types/span.h"
#include "index/key_index.h"
#include "index/product_index.h"
#include "index/product_scan.h"
#include "index/rest_audit.h"
#include "index/reuse.h"
#include "index/scan_code.h"
#include "index/selection.h"
#include "index/sign_scan.h"
#include "kernels/cpu/ladder_fine.h"

namespace kvseek::index {

/// What takes the place of the scan in a search that reuses an earlier one.
struct Recall {
  std::shared_ptr<const LastSearch> last;  ///< null: a search of its own
  int samples = 0;                         ///< see ReuseOptions
  float tolerance = 0.0F;
};

class LadderPlan final : public SearchPlan {
 public:
  /// `product`: whose codes are scanned, and whose covered keys are the ladder's; null: the
  /// segments' sign codes. It must outlive the plan. `memory`: see MakePlan.
  LadderPlan(Scratch& memory, const KvView& view, const SearchQuery& query,
             const SearchOptions& options, Scratch& scratch, Recall recall = {},
             const ProductIndex* product = nullptr);

  SearchPhase phase() const override;
  int pieces() const override;
  void Run(int index, Scratch& scratch) override;
  bool NextStep(Scratch& scratch) override;
  void Finish(SearchResult& result, Scratch& scratch) override;

 private:
  friend struct LadderAudit;
  friend struct LadderPlanPeer;  // exact_rows_test.cc

  static constexpr int kSegmentBlocks = kSegmentTokens / kernels::kScanBlock;
  // Segments of a piece: so many that a search has eight pieces, within these bounds.
  static constexpr int64_t kPieces = 8;
  static constexpr int64_t kPieceSegmentsMin = 4;
  static constexpr int64_t kPieceSegmentsMax = 32;
  static constexpr size_t kExactPartsMax = 8;

  enum class Step { kTables, kSample, kScan, kRefine };

  /// Keys of the range that are not in the ladder's blocks, which are numbered as if nothing stood
  /// between them.
  struct ExactPart {
    int64_t begin = 0;
    int64_t end = 0;
    kernels::GroupState state{};
  };

  /// Sampled blocks [first_block, last_block) of sample_, and the segments that they are in.
  struct SamplePart {
    int64_t first_segment;
    int64_t last_segment;
    size_t first_block;
    size_t last_block;
    float* largest;  ///< (group), estimate; RunSample's
    float* mass;     ///< (group), summed weight relative to it
  };

  /// Keys of a piece that were read at 4 bits, ascending, with their scores.
  struct Candidates {
    int count = 0;
    int capacity = 0;
    uint16_t* keys = nullptr;         ///< (capacity): of the piece
    float* scores = nullptr;          ///< (group, capacity)
    AlignedArray<std::byte> grown{};  ///< what they stand in, if the search's memory had too little

    /// Makes room for `more`.
    void Reserve(int more, int group);
  };

  /// A candidate that may be one of a head's best.
  struct Listed {
    float score;
    uint16_t number;  ///< among the piece's candidates
    uint16_t key;     ///< candidates.keys[number]
  };
  static_assert(kPieceSegmentsMax * kSegmentTokens <= 1 << 16);

  /// For each head the candidates that reach its listing threshold, ascending: so few that its
  /// worker, in whose caches no piece's candidates are, need not look at all others.
  struct Lists {
    int capacity = 0;        ///< of all heads' together; 0: nothing is listed
    int* ends = nullptr;     ///< (group): of a head's; where they would end, if over `capacity`
    Listed* keys = nullptr;  ///< (capacity): one head's after the other's

    /// Where a head's begin and end.
    std::pair<int, int> Of(int head) const {
      if (capacity == 0) return {0, 0};
      return {head == 0 ? 0 : ends[head - 1], ends[head]};
    }
  };

  /// Blocks [first_block, last_block) of the session, all of segments [first_block / 16, ...).
  struct Piece {
    int64_t first_block;
    int64_t last_block;
    kernels::GroupState state;  ///< candidates at 4 bits and the rest's estimate; Run empties it
    Candidates candidates{};
    Lists lists{};
    float* rest = nullptr;  ///< (group): the unchosen keys' summed weight, relative to reference_
    /// Audits only, (group, blocks): the same for each block, of those that are not weighed what
    /// the one that stands for them has.
    std::vector<float> block_weights{};
    std::vector<int64_t> kept{};        ///< SearchOptions::keep: positions
    std::vector<float> kept_weights{};  ///< (group, blocks): of the keys not kept

    /// Of its key 0.
    int64_t FirstPosition() const { return first_block * kernels::kScanBlock; }
  };

  // ---- preparation (ladder_plan.cc)
  void PrepareQueries(const ProductIndex* product);
  /// The exact part's parts are the first pieces of a step, since they are the longest.
  size_t ExactPieces() const { return step_ == exact_step_ ? exact_part_count_ : 0; }
  /// Of segments [first, last).
  void ScoreCentres(int64_t first, int64_t last, Scratch& scratch);
  /// One or, if it `may_cut`, as many as there is enough for.
  void PlanExactParts(bool may_cut);
  void AttendExactPart(const ExactPart& part, Scratch& scratch);
  /// Of the whole exact part, for searches that have no sample.
  void AttendExactPart(Scratch& scratch);
  /// Merges all parts' states into the first's, in order.
  void MergeExactParts();
  void PlanScan();
  int64_t ExactTokens() const {
    return query_.end - query_.begin - (last_block_ - first_block_) * kernels::kScanBlock;
  }
  /// The segments of the ladder's blocks: [FirstSegment(), LastSegment()).
  int64_t FirstSegment() const { return first_block_ / kSegmentBlocks; }
  int64_t LastSegment() const { return (last_block_ + kSegmentBlocks - 1) / kSegmentBlocks; }
  /// 0: the ladder has no blocks.
  size_t Segments() const {
    return first_block_ == last_block_ ? 0 : static_cast<size_t>(LastSegment() - FirstSegment());
  }

  // ---- sample (ladder_sample.cc)
  void PlanSample();
  void RunSample(SamplePart& part, Scratch& scratch);
  /// Each head's lse from the exact part and the sample.
  void EstimateReference();
  void ChooseThreshold(Scratch& scratch);
  /// (group): what about `wanted` keys of the range exceed, from estimates (group, keys). `own`, if
  /// not null: (group), what each head's share of them exceeds, its own best.
  std::pmr::vector<float> Thresholds(const float* estimates, int keys, int64_t wanted,
                                     Scratch& scratch,
                                     std::pmr::vector<float>* own = nullptr) const;
  /// How many keys of the range the options' mass and beta ask for, at most `wanted`.
  int64_t WantedKeys(const float* estimates, int keys, int64_t wanted, Scratch& scratch) const;
  /// How many of the `count` sampled keys hold all but options_.mass of every head's mass.
  size_t KeysForMass(const float* estimates, size_t count, Scratch& scratch) const;
  /// SearchOptions::threshold, as far as TopK's k allows.
  void RaiseThresholds(const float* estimates, int keys, Scratch& scratch);

  // ---- scan (ladder_scan_piece.cc)
  /// A worker's buffers for one segment after the other.
  struct ScanBuffers {
    std::byte* sums;      ///< (group, 1024, kSumBytes)
    ScanResults results;  ///< but for `chosen`
    uint32_t* kept;       ///< (1024)
    float* kept_weights;  ///< (group, 16)
  };
  /// Candidates of one segment, as indices into it.
  struct Chosen {
    int64_t segment;
    int count;
    uint32_t* keys;
  };
  void RunScan(Piece& piece, Scratch& scratch);
  /// Fills the lists of a piece whose candidates are all there.
  void ListBest(Piece& piece, Scratch& scratch) const;
  /// One in so many of the range's blocks is weighed.
  int WeighedStep() const;
  /// Blocks [begin_block, end_block), of one segment.
  SegmentPart PartOf(int64_t begin_block, int64_t end_block) const;
  void ScanSegmentPart(Piece& piece, const SegmentPart& part, const ScanBuffers& buffers,
                       Chosen& chosen);
  /// Of the codes just scanned: what SearchOptions::keep asks for.
  void KeepKeys(Piece& piece, const SegmentPart& part, const ScanBuffers& buffers);
  /// Adds the unchosen keys' weights, buffers.results, to the rest.
  void AddRest(Piece& piece, const SegmentPart& part, const ScanBuffers& buffers,
               const kernels::GroupState& rest, RestSums& rest_sums);
  /// Where as many blocks that follow `part` start, or null if the range has not so many. A piece
  /// that ends fetches for the one after it, which the same worker is likely to run.
  const uint8_t* NextCodes(const SegmentPart& part) const;
  /// Of candidates [begin, end).
  void PrefetchRecords(const Chosen& chosen, int begin, int end) const;
  /// The youngest candidates, which are read when they are so many: fewer cost more each.
  static constexpr int kPendingWhole = 128;
  struct Pending {
    int count;
    kernels::FineRow* rows;  ///< (kPendingWhole + kSegmentTokens)
  };
  /// Adds them to the piece's candidates and to `pending`.
  void AddCandidates(Piece& piece, const Chosen& chosen, Pending& pending) const;
  /// Reads the first `count`.
  void ReadPending(Piece& piece, Pending& pending, int count) const;
  kernels::FineRow FindFine(int64_t position) const;

  // ---- recall (ladder_recall.cc)
  /// Sets reference_ and recalled_weights_.
  void PrepareRecall();
  /// In place of ScanSegmentPart.
  void RecallSegmentPart(const SegmentPart& part, const ScanBuffers& buffers, Chosen& chosen) const;
  /// (group) mass of the unread keys over its estimate, from a sample of them.
  std::pmr::vector<RestRatio> SampleUnread(const ScoredKeys& candidates,
                                           absl::Span<const float> rest, Scratch& scratch) const;
  /// Sets trusted_; returns the sample's ratios.
  std::pmr::vector<RestRatio> CheckRecall(absl::Span<const float> lse, const ScoredKeys& candidates,
                                          Scratch& scratch);
  std::shared_ptr<const LastSearch> MakeLast(absl::Span<const float> lse) const;

  // ---- finish (ladder_finish.cc)
  /// (group): the unread keys' mass over exp(reference).
  std::pmr::vector<float> RestMass() const;
  /// Puts all pieces' states into state_, unless that is left to RefineBest, and what was asked for
  /// into candidates_.
  void MergePieces(Scratch& scratch);
  /// One head's part of state_: the exact part and all pieces, in order.
  void MergeHead(int head);
  int64_t CandidateCount() const;
  ScoredKeys AllCandidates() const;
  /// SearchOptions::list_read.
  void ListRead(std::vector<int64_t>& positions) const;
  /// Candidates of one head, ascending.
  struct HeadCandidates {
    size_t count;
    uint32_t* numbers;  ///< among all pieces' candidates
    int64_t* positions;
    float* scores;
  };
  /// Those that the pieces listed; all, if these are not as many as are wanted.
  HeadCandidates BestOrAll(int head, Scratch& scratch) const;
  /// The best options_.exact_rows of all. The same whether they are chosen among listed ones or
  /// all.
  HeadCandidates FindBest(int head, Scratch& scratch) const;
  /// What other workers wrote of a head: fetched from their caches at once.
  void PrefetchPieces(int head) const;
  /// Merges a head, if that was left to it, and replaces the 4-bit parts of its best candidates by
  /// exact ones.
  void RefineBest(int head, Scratch& scratch);
  /// Chooses the keys to return and takes their parts out of `state`.
  void TakeTopK(const ScoredKeys& candidates, SearchResult& result, Scratch& scratch);
  /// Adds candidates `picks`, ascending, at 4 bits.
  void AddFine(const ScoredKeys& candidates, absl::Span<const uint32_t> picks,
               const kernels::GroupState& state, Scratch& scratch) const;
  /// `ratios`: CheckRecall's; empty: there is none.
  void ReportMissed(absl::Span<const float> lse, const ScoredKeys& candidates,
                    absl::Span<const RestRatio> ratios, SearchReport& report,
                    Scratch& scratch) const;
  void ReportReads(SearchReport& report, Scratch& scratch) const;

  Scratch& memory_;  ///< of what is taken while one thread plans or goes on to a next step
  KvView view_;
  SearchQuery query_;
  SearchOptions options_;
  int group_;
  int padded_dim_;
  int64_t first_block_ = 0;  ///< the ladder's blocks, of the session
  int64_t last_block_ = 0;

  const float* scaled_;             ///< (group, key_dim), times softmax_scale
  int8_t* quantised_ = nullptr;     ///< (group, padded_dim), rotated
  float* fine_slopes_ = nullptr;    ///< (group), for kernels::ScoreFine
  float* centre_scores_ = nullptr;  ///< (segments of the range, group)
  std::variant<std::monostate, SignScan, ProductScan> scan_;
  ScanCode* codes_ = nullptr;  ///< scan_'s

  kernels::GroupState exact_state_;  ///< of the exact part, once its parts are merged
  std::array<ExactPart, kExactPartsMax> exact_parts_;
  size_t exact_part_count_ = 0;
  /// TopK: the exact part's keys; its size is set before parts write it.
  ScoredKeys exact_keys_{memory_};
  std::pmr::vector<float> reference_{&memory_};  ///< (group): estimated lse of the whole range
  /// (group): share of it that is not the exact part's.
  std::pmr::vector<float> sampled_mass_{&memory_};
  std::pmr::vector<float> thresholds_{&memory_};       ///< (group), on estimates
  std::pmr::vector<float> keep_thresholds_{&memory_};  ///< (group), none higher
  /// (group), on 4-bit scores, for Lists; empty: nothing is listed.
  std::pmr::vector<float> listing_thresholds_{&memory_};

  const Recall recall_;
  std::pmr::vector<float> recalled_weights_{&memory_};  ///< (group, blocks), over exp(reference)

  Step step_ = Step::kRefine;
  Step exact_step_ = Step::kSample;             ///< whose pieces attend to the exact part
  std::pmr::vector<int64_t> sample_{&memory_};  ///< blocks, ascending
  float* estimates_ = nullptr;                  ///< (group, keys of the sample)
  std::pmr::vector<SamplePart> sample_parts_{&memory_};
  std::pmr::vector<Piece> pieces_{&memory_};
  kernels::GroupState state_;
  bool merged_ = false;             ///< state_ is all heads'
  ScoredKeys candidates_{memory_};  ///< all pieces'; empty unless it is asked for
  /// (group): numbers of a head's exact candidates; made with room, since heads fill them at once.
  std::pmr::vector<std::pmr::vector<uint32_t>> picks_{&memory_};
  std::pmr::vector<RestRatio> recall_ratios_{&memory_};  ///< CheckRecall's
  bool trusted_ = true;                                  ///< see SearchReport
  std::shared_ptr<const LastSearch> last_;               ///< see SearchResult
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_LADDER_PLAN_H_
