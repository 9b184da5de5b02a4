// Options that no decoder can have are refused by name, before a daemon or a GPU is looked for.
#include <cstdio>

#include "client/sparse_decoder.h"

int main() {
  kvseek::DecoderOptions options;
  options.recent_tokens = 17;
  const auto decoder = kvseek::SparseDecoder::Create(options, {{.address = "unix:/nowhere"}});
  std::printf("%s\n", decoder.status().ToString().c_str());
  return kvseek::ErrorField(decoder.status()) == "recent_tokens" ? 0 : 1;
}
