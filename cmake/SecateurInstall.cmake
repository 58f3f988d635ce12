# Headers, library, and what find_package(secateur CONFIG) reads: below the prefix of cmake --install, or in a wheel
# inside of the Python package. Either may be moved.
include(CMakePackageConfigHelpers)

if(wheel)
  set(include_dir secateur/include)
  set(library_dir secateur/lib)
  set(namelink NAMELINK_SKIP)
else()
  set(include_dir ${CMAKE_INSTALL_INCLUDEDIR})
  set(library_dir ${CMAKE_INSTALL_LIBDIR})
  set(namelink)
endif()
set(package_dir ${library_dir}/cmake/secateur)

install(TARGETS secateur EXPORT secateurTargets
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
        LIBRARY DESTINATION ${library_dir} ${namelink}
        ARCHIVE DESTINATION ${library_dir}
        INCLUDES DESTINATION ${include_dir})
install(DIRECTORY csrc/include/ DESTINATION ${include_dir})
install(EXPORT secateurTargets NAMESPACE secateur:: DESTINATION ${package_dir})
set(SECATEUR_CONFIG_STATIC OFF)
set(SECATEUR_CONFIG_CUDA OFF)
if(NOT BUILD_SHARED_LIBS)
  set(SECATEUR_CONFIG_STATIC ON)
  set(SECATEUR_CONFIG_CUDA ${SECATEUR_WITH_CUDA})
endif()
configure_package_config_file(cmake/secateurConfig.cmake.in secateurConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(secateurConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/secateurConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/secateurConfigVersion.cmake
        DESTINATION ${package_dir})
