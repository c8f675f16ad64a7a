# SPDX-License-Identifier: Apache-2.0
# What an installed kvarn offers: find_package(kvarn) and pkg-config.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
install(TARGETS kvarn EXPORT kvarnTargets)
install(DIRECTORY include/kvarn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
set(kvarn_config ${CMAKE_INSTALL_LIBDIR}/cmake/kvarn)
install(EXPORT kvarnTargets NAMESPACE kvarn:: DESTINATION ${kvarn_config})
configure_package_config_file(cmake/kvarnConfig.cmake.in kvarnConfig.cmake INSTALL_DESTINATION ${kvarn_config}
                              NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(kvarnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvarnConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kvarnConfigVersion.cmake
        DESTINATION ${kvarn_config})
set(KVARN_PRIVATE_LIBS "-lstdc++ -lm")
if(KVARN_HAS_CUDA)
  string(PREPEND KVARN_PRIVATE_LIBS "-L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -ldl -lrt -lpthread ")
endif()
configure_file(cmake/kvarn.pc.in kvarn.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvarn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
