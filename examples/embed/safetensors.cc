#include "safetensors.h"

#include <secateur/error.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace embed {
namespace {

using nlohmann::json;
using secateur::DType;

constexpr Type kTypes[] = {
    {"F64", "torch.float64", 8, DType::f64}, {"F32", "torch.float32", 4, DType::f32},
    {"F16", "torch.float16", 2, DType::f16}, {"BF16", "torch.bfloat16", 2, DType::bf16},
    {"I64", "torch.int64", 8, std::nullopt}, {"I32", "torch.int32", 4, std::nullopt},
    {"I16", "torch.int16", 2, std::nullopt}, {"I8", "torch.int8", 1, std::nullopt},
    {"U8", "torch.uint8", 1, std::nullopt},  {"BOOL", "torch.bool", 1, std::nullopt},
};

std::string text(std::uint64_t value) { return std::to_string(value); }

/// A number that fits into 63 bits.
std::uint64_t count(const json& value, const std::string& what) {
  constexpr std::uint64_t kMost = ~std::uint64_t{0} >> 1;
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > kMost) {
    refuse(what, "whole numbers from 0 to 2^63 - 1", value.is_number() ? value.dump() : "others");
  }
  return value.get<std::uint64_t>();
}

const json& member(const json& object, const char* key, const std::string& what) {
  const auto found = object.find(key);
  if (found == object.end()) refuse(what, std::string("a member ") + key, "none");
  return *found;
}

Tensor parse_tensor(const json& entry, std::uint64_t data_start, const std::string& what) {
  if (!entry.is_object() || entry.size() != 3) {
    refuse(what, "dtype, shape and data_offsets", "something else");
  }
  const json& dtype = member(entry, "dtype", what);
  const json& shape = member(entry, "shape", what);
  const json& offsets = member(entry, "data_offsets", what);
  Tensor tensor;
  tensor.type = dtype.is_string() ? type_named(dtype.get_ref<const std::string&>()) : nullptr;
  if (tensor.type == nullptr) refuse(what, "a dtype such as F32", "another");
  if (!shape.is_array() || shape.size() > secateur::kMaxRank) {
    refuse(what, "a shape of at most " + text(secateur::kMaxRank) + " sizes", "another");
  }
  if (!offsets.is_array() || offsets.size() != 2) refuse(what, "two data_offsets", "others");

  bool overflow = false;
  tensor.bytes = tensor.type->bytes;
  for (const json& size : shape) {
    const std::uint64_t n = count(size, what);
    tensor.shape.push_back(static_cast<std::int64_t>(n));
    // Sizes behind a 0 count as well: a view has strides for them.
    const std::uint64_t factor = std::max<std::uint64_t>(n, 1);
    overflow = overflow || tensor.bytes > (~std::uint64_t{0} >> 1) / factor;
    tensor.bytes = overflow ? 0 : tensor.bytes * factor;
  }
  if (overflow) refuse(what, "a shape of fewer than 2^63 bytes", "more");
  if (std::count(tensor.shape.begin(), tensor.shape.end(), 0) > 0) tensor.bytes = 0;
  const std::uint64_t begin = count(offsets[0], what), end = count(offsets[1], what);
  if (end < begin || end - begin != tensor.bytes) {
    refuse(what, text(tensor.bytes) + " bytes, as its dtype and shape say",
           "data_offsets " + text(begin) + " to " + text(end));
  }
  tensor.offset = begin + data_start;  // below 2^64: both are below 2^63
  return tensor;
}

/// Every byte of the data belongs to one tensor.
void check_places(const Table& table, std::uint64_t data_start, std::uint64_t file_bytes,
                  const std::string& file) {
  std::vector<std::pair<const std::string*, const Tensor*>> order;
  for (const auto& [name, tensor] : table.tensors) order.emplace_back(&name, &tensor);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->offset, a.second->bytes) <
           std::pair(b.second->offset, b.second->bytes);
  });
  std::uint64_t next = data_start;
  for (const auto& [name, tensor] : order) {
    const std::string what = file + ": " + *name;
    if (tensor->offset != next) {
      refuse(what, "data at byte " + text(next) + ", behind those of the tensor before",
             "byte " + text(tensor->offset));
    }
    if (tensor->offset % tensor->type->bytes != 0) {
      refuse(what, "data aligned to " + text(tensor->type->bytes) + " bytes",
             "byte " + text(tensor->offset));
    }
    if (tensor->bytes > file_bytes - next) {
      refuse(what, text(tensor->bytes) + " bytes inside of the file",
             text(file_bytes - next) + " that are left");
    }
    next += tensor->bytes;
  }
  if (next != file_bytes) {
    refuse(file, "a file of " + text(next) + " bytes, as its tensors say", text(file_bytes));
  }
}

}  // namespace

void refuse(const std::string& argument, const std::string& expected, const std::string& got) {
  throw secateur::InvalidArgument(argument + ": expected " + expected + ", got " + got);
}

void refuse_errno(const std::string& argument, const std::string& expected) {
  refuse(argument, expected, std::strerror(errno));
}

const Type* type_named(std::string_view name) {
  const auto* const found = std::find_if(std::begin(kTypes), std::end(kTypes),
                                         [&](const Type& type) { return name == type.name; });
  return found == std::end(kTypes) ? nullptr : found;
}

std::uint64_t header_bytes(const unsigned char* prefix, std::uint64_t file_bytes,
                           const std::string& file) {
  if (file_bytes < kPrefix) refuse(file, "a safetensors file", text(file_bytes) + " bytes");
  std::uint64_t size = 0;
  for (std::size_t i = kPrefix; i-- > 0;) size = size << 8 | prefix[i];
  if (size > file_bytes - kPrefix) {
    refuse(file, "a header inside of the file", "one of " + text(size) + " bytes");
  }
  if (size > kMaxHeader) {
    refuse(file, "a header of at most " + text(kMaxHeader) + " bytes", text(size));
  }
  return size;
}

Table parse_table(std::string_view header, std::uint64_t file_bytes, const std::string& file) {
  const std::uint64_t data_start = kPrefix + header.size();
  // A table is three levels deep; the parser need not follow any deeper.
  const auto shallow = [&](int depth, json::parse_event_t, const json&) {
    if (depth > 3) refuse(file, "a header of three levels", "a deeper one");
    return true;
  };
  json parsed;
  try {
    parsed = json::parse(header, shallow);
  } catch (const json::exception& error) {
    refuse(file, "a JSON header", error.what());
  }
  if (!parsed.is_object()) refuse(file, "a JSON object as header", parsed.type_name());
  Table table;
  for (const auto& [name, entry] : parsed.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) refuse(file, "metadata in an object", entry.type_name());
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) refuse(file, "metadata of strings", value.type_name());
        table.metadata[key] = value.get_ref<const std::string&>();
      }
    } else {
      table.tensors[name] = parse_tensor(entry, data_start, file + ": " + name);
    }
  }
  check_places(table, data_start, file_bytes, file);
  return table;
}

File::File(const std::string& path)
    // Not blocking: a pipe that nobody writes to is to be refused, not waited for.
    : name_(path.substr(path.rfind('/') + 1)),  // npos + 1 is 0
      descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) refuse_errno(path, "a file that can be read");
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    refuse(path, "a regular file", "another");
  }
  bytes_ = static_cast<std::uint64_t>(status.st_size);
}

File::~File() { ::close(descriptor_); }

void File::read(std::uint64_t offset, void* to, std::size_t bytes) const {
  auto* next = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor_, next, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) refuse_errno(name_, "a file that can be read");
    if (got == 0) refuse(name_, text(bytes) + " more bytes", "the end of the file");
    next += got;
    bytes -= static_cast<std::size_t>(got);
    offset += static_cast<std::uint64_t>(got);
  }
}

Table read_table(const File& file) {
  unsigned char prefix[kPrefix] = {};
  file.read(0, prefix, static_cast<std::size_t>(std::min(kPrefix, file.bytes())));
  std::string header(header_bytes(prefix, file.bytes(), file.name()), '\0');
  file.read(kPrefix, header.data(), header.size());
  return parse_table(header, file.bytes(), file.name());
}

Mapping::Mapping(const File& file) : bytes_(static_cast<std::size_t>(file.bytes())) {
  void* const data =
      ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.descriptor(), 0);
  if (data == MAP_FAILED) refuse_errno(file.name(), "a file that can be mapped");
  data_ = static_cast<unsigned char*>(data);
}

Mapping::~Mapping() { ::munmap(data_, bytes_); }

secateur::MutableTensorView view(const Tensor& tensor, void* data, const std::string& argument) {
  if (!tensor.type->dtype) {
    refuse(argument, "F64, F32, F16 or BF16", tensor.type->name);
  }
  return {data, *tensor.type->dtype, secateur::Dims(tensor.shape)};
}

}  // namespace embed
