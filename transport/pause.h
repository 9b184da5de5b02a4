// What a thread does between looks while it waits.
#ifndef KVSEEK_TRANSPORT_PAUSE_H_
#define KVSEEK_TRANSPORT_PAUSE_H_

namespace kvseek::transport {

/// Tells the core that this is a loop that waits: its other thread gets what this one would take.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_PAUSE_H_
