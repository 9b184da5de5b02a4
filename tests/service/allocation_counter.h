// Counts what a program takes from malloc, operator new and the aligned ones included: linking this
// puts counting functions in their places.
#ifndef KVSEEK_TESTS_SERVICE_ALLOCATION_COUNTER_H_
#define KVSEEK_TESTS_SERVICE_ALLOCATION_COUNTER_H_

#include <cstdint>

namespace kvseek {

/// False under a sanitizer, which has functions of its own there.
bool CanCountAllocations();

/// Of all threads, since the program began.
uint64_t Allocations();

}  // namespace kvseek

#endif  // KVSEEK_TESTS_SERVICE_ALLOCATION_COUNTER_H_
