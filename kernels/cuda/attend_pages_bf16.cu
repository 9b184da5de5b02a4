#include "kernels/cuda/attend_pages.cuh"

namespace kvseek::kernels::cuda {

cudaError_t LaunchAttendPagesBf16(const AttendArguments& arguments, int processors,
                                  cudaStream_t stream) {
  return LaunchAttendPages<Bf16Elements>(arguments, processors, stream);
}

}  // namespace kvseek::kernels::cuda
