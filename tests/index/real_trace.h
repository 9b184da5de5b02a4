// The recorded heads of tests/data.
#ifndef KVSEEK_TESTS_INDEX_REAL_TRACE_H_
#define KVSEEK_TESTS_INDEX_REAL_TRACE_H_

#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "cli/trace.h"

namespace kvseek::index {

inline cli::HeadTrace RealTrace(const std::string& head) {
  const std::string data = std::string(KVSEEK_SOURCE_DIR) + "/tests/data/";
  auto trace = cli::LoadHeadTrace(data + "code8." + head + ".safetensors",
                                  data + "code8.queries.safetensors", head);
  EXPECT_TRUE(trace.ok()) << trace.status();
  return *std::move(trace);
}

}  // namespace kvseek::index

#endif  // KVSEEK_TESTS_INDEX_REAL_TRACE_H_
