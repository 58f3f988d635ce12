// The safetensors format: 8 bytes of header size, a JSON table, the tensors' data without gaps.
// A file is taken for hostile: nothing of it is used before it was checked.
#pragma once

#include <secateur/tensor.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace embed {

/// Longest header that is read: tens of thousands of tensors, and tens of MiB when parsed.
inline constexpr std::uint64_t kMaxHeader = std::uint64_t{2} << 20;
/// Bytes in front of the header: its size.
inline constexpr std::uint64_t kPrefix = 8;

/// An element type of the format.
struct Type {
  const char* name;   ///< "F32"
  const char* torch;  ///< "torch.float32", as secateur's checksums have it
  std::size_t bytes;
  std::optional<secateur::DType> dtype;  ///< of those that the core computes with
};
/// nullptr where there is none of that name.
const Type* type_named(std::string_view name);

struct Tensor {
  const Type* type = nullptr;
  std::vector<std::int64_t> shape{};
  std::uint64_t offset = 0;  ///< of the data, from the start of the file; a multiple of type->bytes
  std::uint64_t bytes = 0;
};

struct Table {
  std::map<std::string, Tensor> tensors{};
  std::map<std::string, std::string> metadata{};
};

/// The size of the header that the first 8 bytes of a file announce.
/// Throws secateur::InvalidArgument, as every function here, with `file` in front of the text.
std::uint64_t header_bytes(const unsigned char* prefix, std::uint64_t file_bytes,
                           const std::string& file);

/// Checks and returns a header. Data are inside of the file, each tensor's as many as its type and
/// shape say, aligned, next to one another and none of them in two tensors.
Table parse_table(std::string_view header, std::uint64_t file_bytes, const std::string& file);

/// An open file.
class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& name() const { return name_; }  ///< without the folder, for errors
  std::uint64_t bytes() const { return bytes_; }
  int descriptor() const { return descriptor_; }
  void read(std::uint64_t offset, void* to, std::size_t bytes) const;

 private:
  std::string name_;
  int descriptor_;
  std::uint64_t bytes_ = 0;
};

/// Reads the header of a file.
Table read_table(const File& file);

/// A file in memory, page by page as it is touched. What is written to it stays in this process.
/// Nobody may cut the file off meanwhile: the system then ends the program (SIGBUS).
class Mapping {
 public:
  explicit Mapping(const File& file);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  unsigned char* at(const Tensor& tensor) const { return data_ + tensor.offset; }

 private:
  unsigned char* data_ = nullptr;
  std::size_t bytes_;
};

/// A view for the core. `argument` names the tensor in errors; its type has to be a dtype.
secateur::MutableTensorView view(const Tensor& tensor, void* data, const std::string& argument);

/// Throws secateur::InvalidArgument with the library's form of text.
[[noreturn]] void refuse(const std::string& argument, const std::string& expected,
                         const std::string& got);
/// The same with what the system says about its last error.
[[noreturn]] void refuse_errno(const std::string& argument, const std::string& expected);

}  // namespace embed
