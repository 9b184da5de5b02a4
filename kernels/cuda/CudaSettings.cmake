# Settings of the folders with CUDA sources of ours: C++20, of which CMake before 3.26 does not know
# that nvcc has it, and warnings as errors (target kvseek_cuda_settings).
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

if(NOT TARGET kvseek_cuda_settings)
  add_library(kvseek_cuda_settings INTERFACE)
  target_compile_options(kvseek_cuda_settings INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror>")
endif()
