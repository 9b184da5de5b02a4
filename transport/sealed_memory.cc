#include "transport/sealed_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cassert>
#include <cerrno>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace kvseek::transport {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

absl::Status Failed(absl::string_view what) {
  return absl::ResourceExhaustedError(
      absl::StrCat("shared memory: ", what, ": ", std::strerror(errno)));
}

uint8_t* Map(int descriptor, uint64_t bytes) {
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory);
}

/// A message of one byte with room for one descriptor beside it.
struct DescriptorMessage {
  DescriptorMessage() {
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
  }
  DescriptorMessage(const DescriptorMessage&) = delete;
  DescriptorMessage& operator=(const DescriptorMessage&) = delete;

  char byte = 0;
  iovec part{.iov_base = &byte, .iov_len = 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
};

}  // namespace

SealedMemory::~SealedMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

absl::StatusOr<SealedMemory> SealedMemory::Create(const char* name, uint64_t bytes) {
  const int descriptor = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) return Failed("memfd_create");
  absl::Cleanup closing = [descriptor] { close(descriptor); };
  // All pages now: one that is missing later would be a SIGBUS in the middle of a copy.
  if (fallocate(descriptor, 0, 0, static_cast<off_t>(bytes)) != 0) return Failed("fallocate");
  if (fcntl(descriptor, F_ADD_SEALS, kSeals) != 0) return Failed("sealing");
  uint8_t* const memory = Map(descriptor, bytes);
  if (memory == nullptr) return Failed("mmap");
  std::move(closing).Cancel();
  return SealedMemory(memory, bytes, descriptor);
}

absl::Status SealedMemory::SendTo(int socket) {
  assert(descriptor_ >= 0);
  DescriptorMessage carrier;
  cmsghdr* const header = CMSG_FIRSTHDR(&carrier.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor_, sizeof(int));
  if (sendmsg(socket, &carrier.message, MSG_NOSIGNAL | MSG_DONTWAIT) != 1) {
    return absl::UnavailableError(absl::StrCat("shared memory: ", std::strerror(errno)));
  }
  close(std::exchange(descriptor_, -1));
  return absl::OkStatus();
}

absl::StatusOr<SealedMemory> SealedMemory::ReceiveFrom(int socket, uint64_t bytes) {
  DescriptorMessage carrier;
  const ssize_t got = recvmsg(socket, &carrier.message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got <= 0) return absl::UnavailableError("the daemon closed the connection at shared memory");
  const cmsghdr* const header = CMSG_FIRSTHDR(&carrier.message);
  if (header == nullptr || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS ||
      header->cmsg_len != CMSG_LEN(sizeof(int))) {
    return absl::DataLossError("shared memory: no descriptor came");
  }
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
  const absl::Cleanup closing = [descriptor] { close(descriptor); };
  struct stat info {};
  if (bytes == 0 || fstat(descriptor, &info) != 0 || static_cast<uint64_t>(info.st_size) != bytes ||
      (fcntl(descriptor, F_GET_SEALS) & F_SEAL_SHRINK) == 0) {
    return absl::DataLossError("shared memory: not of the size agreed on, or not sealed");
  }
  uint8_t* const memory = Map(descriptor, bytes);
  if (memory == nullptr) return Failed("mmap");
  return SealedMemory(memory, bytes, -1);
}

}  // namespace kvseek::transport
