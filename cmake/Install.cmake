# What users get: the daemon and the command line, and the client library with the headers it needs
# and nothing more. Outside projects: find_package(kvseek) and link kvseek::client.
include(CMakePackageConfigHelpers)

set(KVSEEK_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kvseek)
set(KVSEEK_PROGRAMS kvseekd)
if(TARGET kvseek)
  list(APPEND KVSEEK_PROGRAMS kvseek)
endif()

install(TARGETS ${KVSEEK_PROGRAMS} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(TARGETS kvseek_client kvseek_proto kvseek_kernels EXPORT kvseekTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${CMAKE_SOURCE_DIR}/client/kv_client.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/client)
install(FILES ${CMAKE_SOURCE_DIR}/kernels/dtype.h ${CMAKE_SOURCE_DIR}/kernels/attention_state.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/kernels)
install(EXPORT kvseekTargets NAMESPACE kvseek:: DESTINATION ${KVSEEK_CMAKE_DIR})
configure_package_config_file(${CMAKE_SOURCE_DIR}/cmake/kvseekConfig.cmake.in
  ${CMAKE_BINARY_DIR}/kvseekConfig.cmake INSTALL_DESTINATION ${KVSEEK_CMAKE_DIR})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/kvseekConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/kvseekConfig.cmake ${CMAKE_BINARY_DIR}/kvseekConfigVersion.cmake
  DESTINATION ${KVSEEK_CMAKE_DIR})
