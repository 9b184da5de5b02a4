// A peer that speaks the wire protocol by hand, well or badly, over a blocking socket or shared
// memory: what tests of both sides play the other side with.
#ifndef KVSEEK_TESTS_CLIENT_RAW_SOCKET_H_
#define KVSEEK_TESTS_CLIENT_RAW_SOCKET_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "google/protobuf/message_lite.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "transport/shared_rings.h"

namespace kvseek::test {

/// A directory of its own under the system's temporary one, removed at the end.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

struct RawFrame {
  proto::FrameHeader header;
  std::string metadata;
  std::string payload;
  std::array<uint8_t, proto::kTrailerBytes> trailer{};

  bool IsError() const { return (header.flags & proto::kFlagError) != 0; }
  /// Its metadata as an Error; a code of 0 if it is none.
  proto::Error Error() const;
};

/// Movable, owns its descriptor. Reads give up after ten seconds. One thread may send while another
/// one reads.
class RawSocket {
 public:
  RawSocket() = default;
  explicit RawSocket(int descriptor);
  RawSocket(RawSocket&& other) noexcept;
  RawSocket& operator=(RawSocket&& other) noexcept;
  ~RawSocket() { Close(); }

  /// Connects to "unix:/path", "tcp://127.0.0.1:port" or "shm:/path": a unix socket, whose Greet
  /// goes over to shared memory.
  static RawSocket Connect(const std::string& address);

  bool Send(const std::string& bytes);
  bool SendFrame(proto::Op op, uint64_t request_id, const std::string& metadata,
                 const std::string& payload = "", uint32_t time_left_us = 0, uint16_t flags = 0);
  bool SendHello(const std::string& token = "");
  /// Hello and its answer; false if it was refused.
  bool Greet(const std::string& token = "");
  /// The next frame; none at the end of the stream, or if it is no frame. Unless `checked`, its
  /// trailer may be anything.
  std::optional<RawFrame> ReadFrame(bool checked = true);
  /// Whether the stream ends here, within `patience`.
  bool Ended(std::chrono::milliseconds patience = std::chrono::seconds(10));
  void Close();
  /// The daemon's side: hands `rings` over and goes over to them.
  bool Share(std::unique_ptr<transport::SharedRings> rings);
  bool is_open() const { return descriptor_ >= 0; }
  int descriptor() const { return descriptor_; }

 private:
  bool ReadBytes(void* out, size_t bytes);
  bool GreetShared(const proto::HelloRequest& hello);
  /// Drops the bells; false: the stream has ended.
  bool SocketIsAlive() const;
  int descriptor_ = -1;
  bool asks_shared_ = false;
  std::unique_ptr<transport::SharedRings> rings_;
};

/// Encodes a request's or an answer's frame.
std::string MakeFrame(proto::Op op, uint64_t request_id, const std::string& metadata,
                      const std::string& payload = "", uint32_t time_left_us = 0,
                      uint16_t flags = 0);

/// A daemon that does what its script says: the script runs once for each connection, in turn.
class FakeServer {
 public:
  using Script = std::function<void(RawSocket&)>;
  FakeServer(const std::string& path, Script script);
  ~FakeServer();
  FakeServer(const FakeServer&) = delete;
  FakeServer& operator=(const FakeServer&) = delete;

  /// Reads a hello and accepts it. Grants `feature`, asked for or not, unless it is ""; rings are
  /// said to have 4 KiB.
  static bool Welcome(RawSocket& socket, uint32_t payload_bytes_max = 1U << 20,
                      const std::string& feature = "");

 private:
  int listener_ = -1;
  std::thread thread_;
};

}  // namespace kvseek::test

#endif  // KVSEEK_TESTS_CLIENT_RAW_SOCKET_H_
