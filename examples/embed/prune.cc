#include "prune.h"

#include <secateur/compact.h>
#include <secateur/error.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>

#include "container.h"
#include "program.h"

namespace embed {
namespace {

// What is read and written at a time when a file is streamed.
constexpr std::uint64_t kPiece = std::uint64_t{8} << 20;
// Of a row, which is never divided.
constexpr std::uint64_t kMaxRow = std::uint64_t{32} << 20;

/// Rows of a tensor's first axis, and the bytes of each.
struct Rows {
  std::int64_t count;
  std::uint64_t bytes;
};

Rows rows_of(const Tensor& tensor) {
  const std::int64_t count = tensor.shape.empty() ? 1 : tensor.shape[0];
  return {count, count == 0 ? 0 : tensor.bytes / static_cast<std::uint64_t>(count)};
}

/// The model's tensors in the form in which one of the two ways gives them.
class Source {
 public:
  Source() = default;
  virtual ~Source() = default;
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  virtual secateur::TensorView rows(const std::string& name, const Tensor& tensor,
                                    std::int64_t first, std::int64_t count) = 0;
  /// Appends a tensor, or what stays of it.
  virtual void give(const std::string& name, const Tensor& tensor, const Cut* cut,
                    Writer& writer) = 0;
  /// Called last: throws where the data were not those of the checksum.
  virtual void check(const std::string& data_sum) const = 0;
};

void check_sum(const Digests& digests, const std::string& expected, const std::string& file) {
  if (data_sha256(digests) != expected) {
    refuse(file, "a secateur model file", "one whose data do not match their checksum");
  }
}

/// Maps the file and compacts in place, in pages of this process alone.
class Mapped : public Source {
 public:
  Mapped(const File& file, const Table& table, bool verify) : file_(file), memory_(file) {
    if (!verify) return;
    for (const auto& [name, tensor] : table.tensors) {
      Sha256 sum;
      sum.update(memory_.at(tensor), tensor.bytes);
      digests_[name] = sum.hex();
    }
  }

  secateur::TensorView rows(const std::string& name, const Tensor& tensor, std::int64_t first,
                            std::int64_t count) override {
    secateur::TensorView all = view(tensor, memory_.at(tensor), name);
    all.data = memory_.at(tensor) + static_cast<std::uint64_t>(first) * rows_of(tensor).bytes;
    all.shape[0] = count;
    return all;
  }

  void give(const std::string& name, const Tensor& tensor, const Cut* cut,
            Writer& writer) override {
    std::uint64_t bytes = tensor.bytes;
    if (cut != nullptr) {
      const secateur::MutableTensorView whole = view(tensor, memory_.at(tensor), name);
      const secateur::MutableTensorView small = secateur::compact(whole, cut->axis, cut->keep);
      bytes = static_cast<std::uint64_t>(small.numel()) * tensor.type->bytes;
    }
    writer.append(memory_.at(tensor), bytes);
  }

  void check(const std::string& data_sum) const override {
    check_sum(digests_, data_sum, file_.name());
  }

 private:
  const File& file_;
  Mapping memory_;
  Digests digests_{};
};

/// Reads a few rows at a time, compacts them and hands them on.
class Streamed : public Source {
 public:
  explicit Streamed(const File& file) : file_(file) {}

  secateur::TensorView rows(const std::string& name, const Tensor& tensor, std::int64_t first,
                            std::int64_t count) override {
    const std::uint64_t row = rows_of(tensor).bytes;
    buffer_.resize(static_cast<std::size_t>(row * static_cast<std::uint64_t>(count)));
    file_.read(tensor.offset + static_cast<std::uint64_t>(first) * row, buffer_.data(),
               buffer_.size());
    Tensor part = tensor;
    part.shape[0] = count;
    return view(part, buffer_.data(), name);
  }

  void give(const std::string& name, const Tensor& tensor, const Cut* cut,
            Writer& writer) override {
    const Rows rows = rows_of(tensor);
    Sha256 sum;
    if (rows.bytes > kMaxRow) {
      throw secateur::Unsupported(name + ": expected rows of at most " + std::to_string(kMaxRow) +
                                  " bytes, got " + std::to_string(rows.bytes));
    }
    const auto step = static_cast<std::int64_t>(
        std::max<std::uint64_t>(1, kPiece / std::max<std::uint64_t>(1, rows.bytes)));
    buffer_.resize(static_cast<std::size_t>(
        std::min(tensor.bytes, static_cast<std::uint64_t>(step) * rows.bytes)));
    for (std::int64_t first = 0; first < rows.count && tensor.bytes > 0; first += step) {
      const std::int64_t count = std::min(step, rows.count - first);
      const std::size_t bytes = static_cast<std::size_t>(count) * rows.bytes;
      file_.read(tensor.offset + static_cast<std::uint64_t>(first) * rows.bytes, buffer_.data(),
                 bytes);
      sum.update(buffer_.data(), bytes);
      Tensor part = tensor;
      if (!part.shape.empty()) part.shape[0] = count;
      writer.append(buffer_.data(), cut == nullptr ? bytes : compacted(name, part, first, *cut));
    }
    digests_[name] = sum.hex();
  }

  void check(const std::string& data_sum) const override {
    check_sum(digests_, data_sum, file_.name());
  }

 private:
  /// Compacts rows from `first` on in the buffer; returns the bytes that stay.
  std::size_t compacted(const std::string& name, const Tensor& part, std::int64_t first,
                        const Cut& cut) {
    std::vector<std::int64_t> keep = cut.keep;
    if (cut.axis == 0) {
      const auto begin = std::lower_bound(cut.keep.begin(), cut.keep.end(), first);
      keep.assign(begin, std::lower_bound(begin, cut.keep.end(), first + part.shape[0]));
      for (std::int64_t& index : keep) index -= first;
      if (keep.empty()) return 0;
    }
    const secateur::MutableTensorView small =
        secateur::compact(view(part, buffer_.data(), name), cut.axis, keep);
    return static_cast<std::size_t>(small.numel()) * part.type->bytes;
  }

  const File& file_;
  std::vector<unsigned char> buffer_{};
  Digests digests_{};
};

/// The report is written last: under the name of another file it would take its place.
void check_report(const Options& options) {
  namespace fs = std::filesystem;
  const fs::path report = fs::weakly_canonical(options.report);
  for (const std::string& file : options.files) {
    if (fs::weakly_canonical(file) == report) {
      refuse("--report", "a file of its own", options.report);
    }
  }
}

void write_report(const std::string& path, const Choices& choices) {
  nlohmann::json report;
  for (const auto& [group, choice] : choices) {
    report[group] = {{"heads", choice.heads},
                     {"size", choice.size},
                     {"scores", choice.scores},
                     {"kept", choice.kept}};
  }
  std::ofstream file(path);
  file << report.dump() << '\n';
  if (!file.flush()) refuse_errno(path, "a file that can be written");
}

/// The most memory that this process held at a time, in MiB; 0 where the system does not say.
double peak_memory() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.rfind("VmHWM:", 0) == 0) return std::strtod(line.c_str() + 6, nullptr) / 1024;
  }
  return 0;
}

}  // namespace

Options parse(const std::vector<std::string>& arguments, const std::vector<std::string>& files) {
  Options options;
  for (Words words(arguments); words.left();) {
    const std::string& word = words.next();
    if (word == "--qk") {
      options.ratios.qk = words.number();
    } else if (word == "--v") {
      options.ratios.v = words.number();
    } else if (word == "--ffn") {
      options.ratios.ffn = words.number();
    } else if (word == "--gamma") {
      options.gamma = words.whole(1000000);
    } else if (word == "--stream") {
      options.stream = true;
    } else if (word == "--no-verify") {
      options.verify = false;
    } else if (word == "--report") {
      options.report = words.value();
    } else if (word.rfind("--", 0) == 0) {
      refuse("arguments", "--qk, --v, --ffn, --gamma, --stream, --no-verify or --report", word);
    } else {
      options.files.push_back(word);
    }
  }
  if (options.files.size() != files.size()) {
    std::string names;
    for (const std::string& file : files) names += (names.empty() ? "" : " ") + file;
    refuse("arguments", names, std::to_string(options.files.size()) + " files");
  }
  return options;
}

void prune(const Options& options, const ScoreQueryKey& score) {
  if (!options.report.empty()) check_report(options);
  const File model(options.files.front());
  const Table table = read_table(model);
  const Header header = read_header(table, "model", model.name());
  const std::vector<Block> blocks = read_blocks(header.fields, table.tensors, model.name());
  check_ratios(blocks, table.tensors, options.ratios, model.name());
  std::unique_ptr<Source> source;
  if (options.stream) {
    source = std::make_unique<Streamed>(model);
  } else {
    source = std::make_unique<Mapped>(model, table, options.verify);
    if (options.verify) source->check(header.data_sha256);
  }

  const ReadRows read_rows = [&](const std::string& name, const Tensor& tensor, std::int64_t first,
                                 std::int64_t count) {
    return source->rows(name, tensor, first, count);
  };
  const Scores query_key = options.ratios.qk > 0 ? score(blocks) : Scores{};
  const Choices choices = choose(blocks, table.tensors, options.ratios, query_key, read_rows);
  const std::map<std::string, Cut> cuts = cuts_of(blocks, choices, table.tensors);

  Writer writer(options.files.back(), "model", updated(header.fields, blocks, choices),
                resized(table.tensors, cuts));
  for (const auto& [name, smaller] : writer.order()) {
    const auto cut = cuts.find(name);
    source->give(name, table.tensors.at(name), cut == cuts.end() ? nullptr : &cut->second, writer);
  }
  // A stream is only known to be whole at its end; nothing has the name OUT until then.
  if (options.stream && options.verify) source->check(header.data_sha256);
  writer.commit();

  for (const auto& [group, choice] : choices) {
    std::printf("%s: %" PRId64 " of %" PRId64 " kept\n", group.c_str(),
                static_cast<std::int64_t>(choice.kept.size()) / choice.heads, choice.size);
  }
  if (!options.report.empty()) write_report(options.report, choices);
  std::printf("peak memory: %.1f MiB\n", peak_memory());
}

}  // namespace embed
