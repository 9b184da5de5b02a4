// Real heads of tests/data for the index tests.
#ifndef KVSEEK_TESTS_INDEX_RECORDED_TRACE_H_
#define KVSEEK_TESTS_INDEX_RECORDED_TRACE_H_

#include <string>
#include <utility>

#include "cli/trace.h"
#include "gtest/gtest.h"

namespace kvseek::index {

/// 8K tokens of `head`: layer15.kv1 or layer20.kv0.
inline cli::HeadTrace RecordedTrace(const std::string& head) {
  const std::string data = std::string(KVSEEK_SOURCE_DIR) + "/tests/data/";
  auto trace = cli::LoadHeadTrace(data + "code8." + head + ".safetensors",
                                  data + "code8.queries.safetensors", head);
  EXPECT_TRUE(trace.ok()) << trace.status();
  return *std::move(trace);
}

}  // namespace kvseek::index

#endif  // KVSEEK_TESTS_INDEX_RECORDED_TRACE_H_
