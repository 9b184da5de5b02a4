// The flags that name recorded heads: --kv, --queries and --head of `kvseek eval` and `kvseek
// plan`.
#ifndef KVSEEK_CLI_TRACE_FLAGS_H_
#define KVSEEK_CLI_TRACE_FLAGS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace kvseek::cli {

void AddTraceFlags(CLI::App& command, std::vector<std::string>& kv, std::string& queries,
                   std::vector<std::string>& heads);
/// Throws CLI::ValidationError where there are some --head, but not one for each --kv.
void CheckHeadFlags(const std::vector<std::string>& kv, const std::vector<std::string>& heads);
/// Without --head: each --kv means the head that its file name contains.
absl::Status ResolveHeads(const std::vector<std::string>& kv, const std::string& queries,
                          std::vector<std::string>& heads);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_TRACE_FLAGS_H_
