# SPDX-License-Identifier: Apache-2.0
# What an installed kvarn offers: find_package(kvarn) and pkg-config.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
install(TARGETS kvarn EXPORT kvarnTargets)
install(DIRECTORY include/kvarn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT kvarnTargets NAMESPACE kvarn:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvarn FILE kvarnConfig.cmake)
write_basic_package_version_file(kvarnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvarnConfigVersion.cmake DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvarn)
configure_file(cmake/kvarn.pc.in kvarn.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvarn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
