// secateur's files: safetensors with a JSON header of fields and two SHA-256 sums (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "safetensors.h"
#include "sha256.h"

namespace embed {

/// What a file says of itself, with its header checked against its checksum.
struct Header {
  nlohmann::json fields{};
  std::string data_sha256{};
};

/// The checksum over kind, fields (as they stand in the file) and the tensors' names, types,
/// shapes.
std::string table_sha256(const std::string& kind, const std::string& fields,
                         const std::map<std::string, Tensor>& tensors);

/// Throws secateur::InvalidArgument where the file is not one of `kind`, newer, or damaged.
Header read_header(const Table& table, const std::string& kind, const std::string& file);

/// Name to SHA-256 of a tensor's data; in order of the names.
using Digests = std::map<std::string, std::string>;
/// The checksum over all data.
std::string data_sha256(const Digests& digests);

/// Writes a file of given tensors, whose data come one after the other, in any pieces. It appears
/// whole under its name, or not at all.
class Writer {
 public:
  /// tensors: offsets are made here. Throws secateur::InvalidArgument where there cannot be a file.
  Writer(std::string path, const std::string& kind, const nlohmann::json& fields,
         std::map<std::string, Tensor> tensors);
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  /// The tensors in the order in which their data are to come.
  const std::vector<std::pair<std::string, Tensor>>& order() const { return order_; }
  void append(const void* data, std::size_t bytes);
  /// Gives the file its name. All data have been appended.
  void commit();

 private:
  std::string header(const std::string& sum) const;
  void finish_tensors();
  void write(std::uint64_t offset, const void* data, std::size_t bytes);

  std::string path_;
  std::string kind_;
  std::string fields_;
  std::string table_sha256_;
  std::vector<std::pair<std::string, Tensor>> order_{};
  std::string temporary_;
  int descriptor_ = -1;
  std::uint64_t position_ = 0;  ///< in the file
  std::size_t current_ = 0;     ///< tensor whose data come next
  std::uint64_t left_ = 0;      ///< bytes of it
  Sha256 sum_{};
  Digests digests_{};
};

}  // namespace embed
