# nlohmann_json::nlohmann_json, from the system or fetched; without a network there is no such target.
find_package(nlohmann_json 3.10 CONFIG QUIET)
if(NOT TARGET nlohmann_json::nlohmann_json)
  # FetchContent alone ends the configuration where it cannot download.
  set(archive "${CMAKE_CURRENT_BINARY_DIR}/json-3.11.3.tar.xz")
  set(sha256 d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d)
  set(found)
  if(EXISTS "${archive}")
    file(SHA256 "${archive}" found)
  endif()
  if(NOT found STREQUAL sha256)
    file(DOWNLOAD https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz "${archive}"
         INACTIVITY_TIMEOUT 10 STATUS status)
    file(SHA256 "${archive}" found)
  endif()
  if(found STREQUAL sha256)
    include(FetchContent)
    FetchContent_Declare(nlohmann_json URL "${archive}" URL_HASH SHA256=${sha256}
                         DOWNLOAD_EXTRACT_TIMESTAMP FALSE)
    FetchContent_MakeAvailable(nlohmann_json)
  endif()
endif()
