#include "cli/policy_flags.h"

#include "absl/strings/str_cat.h"
#include "cli/table.h"

namespace kvseek::cli {

void PolicyFlags::AddOptions(CLI::App& command) {
  command
      .add_option("--mass", mass,
                  "ladder, landmark, cluster: fewer candidates where they are expected to leave no "
                  "head more than this share of its mass unread; 0: spend all")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      .add_option("--beta", beta,
                  "fewer candidates where fewer are expected within so many nats of a head's best "
                  "score; 0: spend all")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str();
  command
      .add_option("--vote", vote,
                  "landmark, cluster: a part's rank is that of its best head (max), or by the sum "
                  "of its heads' shares (sum)")
      ->check(CLI::IsMember({"max", "sum"}))
      ->capture_default_str();
  command
      .add_option("--reuse", reuse,
                  "Search at most every so many steps, and answer the others from the last "
                  "selection; the first --steps consecutive steps are taken. 1: search always; 0: "
                  "steps evenly spread")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_option("--reuse-keys", reuse_options.keep, "Keys that a search remembers")
      ->check(CLI::Range(1, index::kMaxKeep))
      ->capture_default_str();
  command
      .add_option("--reuse-samples", reuse_options.samples, "Unread keys scored to check a reuse")
      ->check(CLI::Range(0, index::kMaxAuditSamples))
      ->capture_default_str();
  command
      .add_option("--reuse-tolerance", reuse_options.tolerance,
                  "Mass that a reuse may leave unread, over what the search left")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
}

void PolicyFlags::Apply(index::SearchOptions& options) const {
  options.mass = mass;
  options.beta = beta;
  options.vote = vote == "sum" ? index::Vote::kSum : index::Vote::kMax;
}

SearchFunction PolicyFlags::Search(const HeadTrace& trace, const StoredHead& head,
                                   const index::KeyIndex& index, PieceRunner& runner) const {
  if (reuse == 0) return SearchLibrary(trace, head, index, runner);
  index::ReuseOptions options = reuse_options;
  options.every = reuse;
  return SearchReusing(trace, head, index, options, runner);
}

SearchFunction PolicyFlags::Search(DaemonHead& head, IndexKind index) const {
  return head.Search(index, reuse, reuse == 0 ? 0 : reuse_options.keep);
}

void PolicyFlags::Describe(nlohmann::ordered_json& settings) const {
  if (mass > 0.0F) settings["mass"] = mass;
  if (beta > 0.0F) settings["beta"] = beta;
  if (vote != "sum") settings["vote"] = vote;
  if (reuse == 0) return;
  settings["reuse"] = reuse;
  settings["reuse_keys"] = reuse_options.keep;
  settings["reuse_samples"] = reuse_options.samples;
  settings["reuse_tolerance"] = reuse_options.tolerance;
}

std::string PolicyFlags::Text(const nlohmann::ordered_json& settings) {
  std::string text;
  for (const char* name : {"mass", "beta"}) {
    const double value = settings.value(name, 0.0);
    if (value > 0.0) absl::StrAppend(&text, ", ", name, " ", Digits(value));
  }
  if (settings.contains("vote")) absl::StrAppend(&text, ", vote max");
  if (settings.contains("reuse")) {
    absl::StrAppend(&text, ", reuse ", settings["reuse"].get<int>(), " of ",
                    settings["reuse_keys"].get<int>());
  }
  return text;
}

}  // namespace kvseek::cli
