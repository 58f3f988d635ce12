# onnxruntime::onnxruntime, where it is found: in onnxruntime_ROOT or ONNXRUNTIME_ROOT (variables of CMake or of the
# environment), or where CMake looks for everything. Not by its own CMake package first: that of the release archives
# names folders that they do not have, and ends the configuration.
if(TARGET onnxruntime::onnxruntime)
  return()
endif()
set(roots "${onnxruntime_ROOT}" "${ONNXRUNTIME_ROOT}" ENV onnxruntime_ROOT ENV ONNXRUNTIME_ROOT)
find_path(onnxruntime_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ${roots}
          PATH_SUFFIXES include include/onnxruntime onnxruntime)
find_library(onnxruntime_LIBRARY onnxruntime HINTS ${roots} PATH_SUFFIXES lib lib64)
mark_as_advanced(onnxruntime_INCLUDE_DIR onnxruntime_LIBRARY)
if(onnxruntime_INCLUDE_DIR AND onnxruntime_LIBRARY)
  add_library(onnxruntime::onnxruntime UNKNOWN IMPORTED)
  set_target_properties(onnxruntime::onnxruntime PROPERTIES
    IMPORTED_LOCATION "${onnxruntime_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${onnxruntime_INCLUDE_DIR}")
else()
  find_package(onnxruntime CONFIG QUIET)
endif()
