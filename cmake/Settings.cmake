# Compiler settings for our own targets, and the two functions that declare them.
include(GNUInstallDirs)

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

find_program(KVSEEK_CCACHE ccache)
if(KVSEEK_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${KVSEEK_CCACHE})
endif()

add_library(kvseek_settings INTERFACE)
target_compile_options(kvseek_settings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Werror -Wshadow -Wnon-virtual-dtor -Wold-style-cast
    -Woverloaded-virtual -Wimplicit-fallthrough>)
target_include_directories(kvseek_settings INTERFACE ${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR})
if(KVSEEK_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${KVSEEK_SANITIZE}>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g1>)
  # GCC 12 mistakes the two ends of a coroutine's frame for new and delete that do not belong together.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wno-mismatched-new-delete>)
  add_link_options(-fsanitize=${KVSEEK_SANITIZE})
  if(KVSEEK_SANITIZE MATCHES "thread")
    # Asio has fences, which GCC warns of; and instrumented vectors look to it as if freed from within.
    add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wno-tsan>
      $<$<COMPILE_LANGUAGE:CXX>:-Wno-free-nonheap-object>)
  endif()
  if(KVSEEK_SANITIZE MATCHES "undefined")
    add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=undefined>)
  endif()
endif()

# kvseek_library(NAME SOURCES a.cc... DEPS targets...): one layer, kvseek::NAME.
function(kvseek_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;PRIVATE_DEPS" ${ARGN})
  add_library(kvseek_${name} STATIC ${ARG_SOURCES})
  add_library(kvseek::${name} ALIAS kvseek_${name})
  set_target_properties(kvseek_${name} PROPERTIES EXPORT_NAME ${name})
  target_include_directories(kvseek_${name} PUBLIC
    $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}> $<BUILD_INTERFACE:${CMAKE_BINARY_DIR}>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/kvseek>)
  target_link_libraries(kvseek_${name} PUBLIC ${ARG_DEPS}
    PRIVATE $<BUILD_INTERFACE:kvseek_settings> ${ARG_PRIVATE_DEPS})
endfunction()

# kvseek_program(NAME SOURCES a.cc... DEPS targets...)
function(kvseek_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE kvseek_settings ${ARG_DEPS})
endfunction()

# kvseek_test(NAME SOURCES a.cc... DEPS targets...): a GoogleTest program and its ctest entry. Tests find the repository's
# data through KVSEEK_SOURCE_DIR and the built programs through KVSEEK_BIN_DIR.
function(kvseek_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS" ${ARGN})
  kvseek_program(${name} SOURCES ${ARG_SOURCES} DEPS ${ARG_DEPS} GTest::gtest_main GTest::gmock)
  target_compile_definitions(${name} PRIVATE KVSEEK_SOURCE_DIR="${CMAKE_SOURCE_DIR}"
    KVSEEK_BIN_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 600)
  endif()
  add_test(NAME ${name} COMMAND ${name} --gtest_brief=1)
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT})
  if(KVSEEK_SANITIZE MATCHES "thread")
    set_tests_properties(${name} PROPERTIES
      ENVIRONMENT "TSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/tsan_suppressions.txt")
  endif()
endfunction()
