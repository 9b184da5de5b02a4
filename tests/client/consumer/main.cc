// Opens a session, fills it, asks, and merges the answer with a part of its own. Argument: the
// daemon's address.
#include <cmath>
#include <cstdio>
#include <vector>

#include "client/kv_client.h"
#include "kernels/attention_state.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const auto client = kvseek::KvClient::Connect({.address = argv[1]});
  if (!client.ok()) {
    std::printf("%s\n", client.status().ToString().c_str());
    return 1;
  }
  const kvseek::ModelShape shape{.key_dim = 8, .value_dim = 8};
  const auto session = (*client)->Open(shape, {.name = "consumer"});
  if (!session.ok()) return 1;
  constexpr uint32_t kTokens = 3;
  const std::vector<uint16_t> rows(kTokens * 8, kvseek::kernels::FloatToBf16(2.0F));
  const auto held = (*client)->Append(*session, 0, 0, kTokens, rows, rows);
  if (!held.ok() || *held != kTokens) return 1;
  const std::vector<float> query(8);
  const auto bytes = kvseek::AsBytes(absl::MakeConstSpan(query));
  auto answer = (*client)->Attend({.items = {{.session = *session, .queries = bytes}}});
  if (!answer.ok()) {
    std::printf("%s\n", answer.status().ToString().c_str());
    return 1;
  }
  const kvseek::ItemResult& part = answer->items[0];
  std::vector<float> out(8, 6.0F);  // one key of the same score: a quarter of the mass
  float lse = 0.0F;
  kvseek::kernels::MergeFinished(out.data(), &lse, part.out.data(), part.lse.data(), 1, 8);
  std::printf("out %.3f, lse %.3f\n", out[0], lse);
  return std::abs(out[0] - 3.0F) < 1e-3F ? 0 : 1;
}
