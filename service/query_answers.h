// Attend, TopK and FetchRows: from results to the answer's message and payload.
//
// An answer is made by whichever worker ends the last search, in whose caches nothing of this is
// left. So its message is written field by field: making it of message objects took 7 us of a
// request's 350 (docs/performance.md, "In time").
#ifndef KVSEEK_SERVICE_QUERY_ANSWERS_H_
#define KVSEEK_SERVICE_QUERY_ANSWERS_H_

#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "service/compute_pool.h"
#include "service/options.h"
#include "service/request_handler.h"
#include "service/request_validation.h"
#include "service/search_validation.h"

namespace kvseek::service {

/// Refuses a search whose answer might not fit the limits: resource_exhausted naming "k" (fewer
/// keys would fit) or "items".
absl::Status CheckAnswerFits(const CheckedSearch& search, const DaemonOptions& options);

/// The answer to an Attend or a TopK that arrived at `arrived`; without its message where there is
/// no `arrived`, since nobody reads it. `results` are those of MakeTasks. resource_exhausted naming
/// "options.list_read" when the positions read, which nobody knew before, are too many.
absl::StatusOr<Response> MakeAnswer(const CheckedSearch& search,
                                    absl::Span<const index::SearchResult> results,
                                    std::optional<TimePoint> arrived, const DaemonOptions& options,
                                    Worker worker);

/// The answer to a FetchRows. resource_exhausted naming "count" when it does not fit the limits.
absl::StatusOr<Response> FetchRows(const CheckedFetch& fetch, const DaemonOptions& options,
                                   Worker worker);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_QUERY_ANSWERS_H_
