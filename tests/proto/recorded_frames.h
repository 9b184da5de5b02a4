// One frame of every kind, as messages and tensors. tests/proto/fixtures holds the same frames as
// bytes; they were recorded once and stay as they are: what a released version sent must be
// understood by every later one.
#ifndef KVSEEK_TESTS_PROTO_RECORDED_FRAMES_H_
#define KVSEEK_TESTS_PROTO_RECORDED_FRAMES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "google/protobuf/message.h"
#include "proto/frame.h"

namespace kvseek::proto {

struct RecordedFrame {
  std::string name;  ///< the fixture is <name>.bin
  FrameHeader header;
  /// Null for the frame of an unknown op, whose metadata is `unknown` alone.
  std::unique_ptr<google::protobuf::Message> message;
  std::string unknown;  ///< fields that nobody knows, after the message's own
  std::vector<uint8_t> payload;
  bool checked = true;  ///< false: of a connection with kUncheckedPayloads
};

/// At least one request and one response of every op, an Error, and frames of a later version.
std::vector<RecordedFrame> RecordedFrames();

std::string EncodeRecorded(const RecordedFrame& frame);

/// Folder of the fixtures.
std::string FixtureFolder();
/// A whole file; empty if it cannot be read.
std::string ReadFile(const std::string& path);

}  // namespace kvseek::proto

#endif  // KVSEEK_TESTS_PROTO_RECORDED_FRAMES_H_
