#include "container.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

namespace embed {
namespace {

using nlohmann::json;

constexpr const char* kKey = "secateur";
constexpr std::uint64_t kFormat = 1;
// Fields are a few levels deep; what recurses over them has a limit.
constexpr int kMaxDepth = 32;

/// Parses JSON that may be anything. Throws json::exception.
json parse(const std::string& text, const std::string& file) {
  return json::parse(text, [&](int depth, json::parse_event_t, const json&) {
    if (depth > kMaxDepth) refuse(file, "fields of a few levels", "deeper ones");
    return true;
  });
}

/// A JSON string as Python's json.dumps writes it, in ASCII.
std::string quoted(const std::string& text) { return json(text).dump(-1, ' ', true); }

std::string member(const json& outer, const char* key) {
  const auto found = outer.find(key);
  return found != outer.end() && found->is_string() ? found->get<std::string>() : "";
}

}  // namespace

std::string table_sha256(const std::string& kind, const std::string& fields,
                         const std::map<std::string, Tensor>& tensors) {
  // The text is that of Python's json.dumps.
  Sha256 sum;
  const auto add = [&](const std::string& text) { sum.update(text.data(), text.size()); };
  add("[" + std::to_string(kFormat) + ", " + quoted(kind) + ", " + quoted(fields) + ", [");
  const char* comma = "";
  for (const auto& [name, tensor] : tensors) {
    add(comma + ("[" + quoted(name)) + ", \"" + tensor.type->torch + "\", [");
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      add((i == 0 ? "" : ", ") + std::to_string(tensor.shape[i]));
    }
    add("]]");
    comma = ", ";
  }
  add("]]");
  return sum.hex();
}

Header read_header(const Table& table, const std::string& kind, const std::string& file) {
  const std::string expected = "a secateur " + kind + " file";
  const auto text = table.metadata.find(kKey);
  if (text == table.metadata.end()) {
    refuse(file, expected, "a safetensors file that secateur did not write");
  }
  json outer;
  Header header;
  try {
    outer = parse(text->second, file);
    if (!outer.is_object() || !outer.contains("format") || !outer["format"].is_number_unsigned()) {
      refuse(file, expected, "one whose header is damaged");
    }
    if (outer["format"].get<std::uint64_t>() > kFormat) {
      refuse(file, expected + " of format " + std::to_string(kFormat) + " or older",
             "format " + outer["format"].dump());
    }
    if (member(outer, "kind") != kind) refuse(file, expected, "a file of another kind");
    if (member(outer, "table_sha256") !=
        table_sha256(kind, member(outer, "fields"), table.tensors)) {
      refuse(file, expected, "one whose header does not match its checksum");
    }
    header.fields = parse(member(outer, "fields"), file);
  } catch (const json::exception& error) {
    refuse(file, expected, std::string("one whose header is damaged (") + error.what() + ")");
  }
  header.data_sha256 = member(outer, "data_sha256");
  return header;
}

std::string data_sha256(const Digests& digests) {
  Sha256 sum;
  for (const auto& [name, digest] : digests) sum.update(digest.data(), digest.size());
  return sum.hex();
}

Writer::Writer(std::string path, const std::string& kind, const json& fields,
               std::map<std::string, Tensor> tensors)
    : path_(std::move(path)),
      kind_(kind),
      fields_(fields.dump(-1, ' ', true)),
      table_sha256_(table_sha256(kind, fields_, tensors)),
      order_(tensors.begin(), tensors.end()) {
  // The widest types first: so all are aligned without gaps.
  std::stable_sort(order_.begin(), order_.end(), [](const auto& a, const auto& b) {
    return a.second.type->bytes > b.second.type->bytes;
  });
  std::uint64_t offset = 0;
  for (auto& [name, tensor] : order_) {
    tensor.bytes = tensor.type->bytes;
    for (const std::int64_t size : tensor.shape) tensor.bytes *= static_cast<std::uint64_t>(size);
    tensor.offset = offset;
    offset += tensor.bytes;
  }
  position_ = header("").size() + 64;
  if (position_ - kPrefix > kMaxHeader) {
    refuse(path_, "a header of at most " + std::to_string(kMaxHeader) + " bytes",
           std::to_string(position_ - kPrefix));
  }

  const std::size_t slash = path_.rfind('/') + 1;  // npos + 1 is 0
  temporary_ = path_.substr(0, slash) + "." + path_.substr(slash) + ".XXXXXX";
  descriptor_ = ::mkstemp(temporary_.data());
  if (descriptor_ < 0) {
    temporary_.clear();
    refuse_errno(path_, "a folder that can be written to");
  }
  // mkstemp's files are their owner's alone; this one is as what it replaces, or like any new one.
  struct stat status{};
  mode_t mode = 0;
  if (::stat(path_.c_str(), &status) == 0) {
    mode = status.st_mode & 07777;
  } else {
    const mode_t mask = ::umask(0);
    ::umask(mask);
    mode = 0666 & ~mask;
  }
  ::fchmod(descriptor_, mode);
  if (!order_.empty()) left_ = order_[0].second.bytes;
  finish_tensors();
}

Writer::~Writer() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

/// With the size in front and blanks behind, so that the data are aligned; `sum` is of the data.
std::string Writer::header(const std::string& sum) const {
  const json outer = {{"format", kFormat},
                      {"kind", kind_},
                      {"fields", fields_},
                      {"table_sha256", table_sha256_},
                      {"data_sha256", sum}};
  json table = {{"__metadata__", {{kKey, outer.dump(-1, ' ', true)}}}};
  for (const auto& [name, tensor] : order_) {
    table[name] = {{"dtype", tensor.type->name},
                   {"shape", tensor.shape},
                   {"data_offsets", {tensor.offset, tensor.offset + tensor.bytes}}};
  }
  std::string text = table.dump(-1, ' ', true);
  const std::size_t whole = text.size() + (64 - sum.size());
  text.append((8 - whole % 8) % 8, ' ');
  const std::uint64_t size = text.size() + (64 - sum.size());
  std::string prefix(kPrefix, '\0');
  for (std::size_t i = 0; i < kPrefix; ++i) prefix[i] = static_cast<char>(size >> 8 * i & 255);
  return prefix + text;
}

void Writer::finish_tensors() {
  while (current_ < order_.size() && left_ == 0) {
    digests_[order_[current_].first] = sum_.hex();
    sum_ = Sha256();
    ++current_;
    left_ = current_ < order_.size() ? order_[current_].second.bytes : 0;
  }
}

void Writer::append(const void* data, std::size_t bytes) {
  if (bytes > left_) refuse(path_, std::to_string(left_) + " bytes", std::to_string(bytes));
  write(position_, data, bytes);
  position_ += bytes;
  sum_.update(data, bytes);
  left_ -= bytes;
  finish_tensors();
}

void Writer::write(std::uint64_t offset, const void* data, std::size_t bytes) {
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t done = ::pwrite(descriptor_, next, bytes, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) refuse_errno(path_, "a file that can be written");
    next += done;
    bytes -= static_cast<std::size_t>(done);
    offset += static_cast<std::uint64_t>(done);
  }
}

void Writer::commit() {
  if (current_ < order_.size()) refuse(path_, "the data of all tensors", "fewer");
  const std::string text = header(data_sha256(digests_));
  write(0, text.data(), text.size());
  if (::fsync(descriptor_) != 0) refuse_errno(path_, "a file that can be written");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    refuse_errno(path_, "a file that can be replaced");
  }
  temporary_.clear();
}

}  // namespace embed
