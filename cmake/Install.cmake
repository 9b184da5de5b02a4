# What users get: the daemon and the command line, and the client library with the headers it needs
# and nothing more; where CUDA was found also the decoder. Outside projects: find_package(kvseek) and
# link kvseek::client or kvseek::decoder.
include(CMakePackageConfigHelpers)

set(KVSEEK_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kvseek)
set(KVSEEK_PROGRAMS kvseekd)
if(TARGET kvseek)
  list(APPEND KVSEEK_PROGRAMS kvseek)
endif()

install(TARGETS ${KVSEEK_PROGRAMS} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(TARGETS kvseek_client kvseek_transport kvseek_proto kvseek_kernels EXPORT kvseekTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${CMAKE_SOURCE_DIR}/client/doorbell.h ${CMAKE_SOURCE_DIR}/client/kv_client.h
  ${CMAKE_SOURCE_DIR}/client/head_plan.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/client)
install(FILES ${CMAKE_SOURCE_DIR}/client/decoder/head_modes.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/client/decoder)
install(FILES ${CMAKE_SOURCE_DIR}/kernels/dtype.h ${CMAKE_SOURCE_DIR}/kernels/attention_state.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/kernels)
install(FILES ${CMAKE_SOURCE_DIR}/transport/doorbell_memory.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/transport)
if(TARGET kvseek_decoder)
  install(TARGETS kvseek_decoder kvseek_kernels_cuda EXPORT kvseekDecoderTargets
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(FILES ${CMAKE_SOURCE_DIR}/client/sparse_decoder.h
    DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/client)
  install(FILES ${CMAKE_SOURCE_DIR}/client/decoder/decoder_options.h
    DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/client/decoder)
  install(FILES ${CMAKE_SOURCE_DIR}/kernels/cuda/attention.h
    ${CMAKE_SOURCE_DIR}/kernels/cuda/kv_pages.h
    DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvseek/kernels/cuda)
  install(EXPORT kvseekDecoderTargets NAMESPACE kvseek:: DESTINATION ${KVSEEK_CMAKE_DIR})
endif()
install(EXPORT kvseekTargets NAMESPACE kvseek:: DESTINATION ${KVSEEK_CMAKE_DIR})
configure_package_config_file(${CMAKE_SOURCE_DIR}/cmake/kvseekConfig.cmake.in
  ${CMAKE_BINARY_DIR}/kvseekConfig.cmake INSTALL_DESTINATION ${KVSEEK_CMAKE_DIR})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/kvseekConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/kvseekConfig.cmake ${CMAKE_BINARY_DIR}/kvseekConfigVersion.cmake
  DESTINATION ${KVSEEK_CMAKE_DIR})
