// Takes the descriptor that comes with shared memory by hand, as no client of ours does.
#ifndef KVSEEK_TESTS_TRANSPORT_RECEIVE_DESCRIPTOR_H_
#define KVSEEK_TESTS_TRANSPORT_RECEIVE_DESCRIPTOR_H_

#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <cstring>

namespace kvseek::transport {

/// The descriptor that comes next over a unix socket, beside one byte; the caller closes it. -1:
/// something else came, or the end. Waits for it.
inline int ReceiveDescriptor(int socket) {
  char byte = 0;
  iovec part{.iov_base = &byte, .iov_len = 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  if (recvmsg(socket, &message, 0) != 1) return -1;
  const cmsghdr* const header = CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) return -1;
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
  return descriptor;
}

}  // namespace kvseek::transport

#endif  // KVSEEK_TESTS_TRANSPORT_RECEIVE_DESCRIPTOR_H_
