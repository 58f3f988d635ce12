# cmake --install: headers, library, and what find_package(secateur CONFIG) reads.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/secateur)
install(TARGETS secateur EXPORT secateurTargets)
install(DIRECTORY csrc/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT secateurTargets NAMESPACE secateur:: DESTINATION ${package_dir})
if(SECATEUR_WITH_CUDA AND NOT BUILD_SHARED_LIBS)
  set(SECATEUR_CONFIG_CUDA ON)
else()
  set(SECATEUR_CONFIG_CUDA OFF)
endif()
configure_package_config_file(cmake/secateurConfig.cmake.in secateurConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(secateurConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/secateurConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/secateurConfigVersion.cmake
        DESTINATION ${package_dir})
