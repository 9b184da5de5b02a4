// Requests that a daemon must answer well, for fuzzers to spoil.
//
// They are about sessions of SmallShape that build every index, landmark with
// the client's keys for blocks of kLandmarkBlock.
#ifndef KVSEEK_TESTS_SERVICE_RIGHT_CALLS_H_
#define KVSEEK_TESTS_SERVICE_RIGHT_CALLS_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "tests/proto/message_mutator.h"

namespace kvseek::service {

inline constexpr uint32_t kVictimTokens = 1030;  ///< a sealed segment and a tail
inline constexpr uint32_t kLandmarkBlock = 32;   ///< tokens that have one landmark

/// A request as the handler gets it.
struct TestCall {
  proto::Op op = proto::Op::kHealth;
  std::string metadata;
  std::string payload;
  std::chrono::milliseconds time_left{30000};
  bool cancelled = false;
};

/// So many tokens from `start` on, with one sampled query and the landmarks of all blocks that end
/// in them.
TestCall RightAppend(const proto::SessionRef& session, uint32_t layer, uint64_t start,
                     uint32_t tokens, proto::MessageMutator& random);

/// One item for each session, of 1, 2, ... query tokens of layer 1.
TestCall RightAttend(const std::vector<proto::SessionRef>& sessions, proto::IndexKind index,
                     uint64_t seed);

/// At least one right request of every op, all on `victim`, whose layers hold kVictimTokens each.
std::vector<TestCall> RightCalls(const proto::SessionRef& victim);

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_RIGHT_CALLS_H_
