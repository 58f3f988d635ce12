// A model file of a stranger's: read, cut in memory, written, and read again.
#include <secateur/compact.h>
#include <secateur/error.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "container.h"
#include "safetensors.h"
#include "vit.h"

namespace {

using nlohmann::json;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

/// The same header with the checksum that it should have: few mutations get past it otherwise.
void sign(embed::Table& table) {
  const json outer = json::parse(table.metadata["secateur"], nullptr, false);
  if (!outer.is_object() || !outer.contains("fields") || !outer["fields"].is_string()) return;
  const std::string fields = outer["fields"];
  table.metadata["secateur"] =
      json{{"format", 1},
           {"kind", "model"},
           {"fields", fields},
           {"data_sha256", ""},
           {"table_sha256", embed::table_sha256("model", fields, table.tensors)}}
          .dump();
}

/// Queries and keys of two images for every layer.
struct Seen {
  std::vector<std::vector<float>> memory{};
  embed::Observed observed{};

  explicit Seen(const std::vector<embed::Block>& blocks) {
    for (const embed::Block& block : blocks) {
      const std::int64_t inner = block.heads * block.qk;
      if (inner == 0 || inner > 512) continue;
      const secateur::Dims shape{2, 3, block.heads, block.qk};
      for (int i = 0; i < 2; ++i) {
        std::vector<float>& values = memory.emplace_back();
        for (std::int64_t j = 0; j < 6 * inner; ++j) {
          values.push_back(static_cast<float>((j * j + i) % 7 - 3));
        }
        const secateur::TensorView view(values.data(), secateur::DType::f32, shape);
        (i == 0 ? observed[block.name].q : observed[block.name].k) = view;
      }
    }
  }
};

void prune(const embed::Table& table, const embed::Header& header,
           const std::vector<embed::Block>& blocks, std::vector<char>& file) {
  const Seen seen(blocks);
  const auto read_rows = [&](const std::string& name, const embed::Tensor& tensor,
                             std::int64_t first, std::int64_t count) {
    secateur::TensorView rows = embed::view(tensor, file.data() + tensor.offset, name);
    rows.data = file.data() + tensor.offset +
                static_cast<std::uint64_t>(first) * tensor.bytes /
                    static_cast<std::uint64_t>(tensor.shape[0]);
    rows.shape[0] = count;
    return rows;
  };
  embed::Choices choices;
  // Where one kind is refused, the others may do.
  for (const embed::Ratios& ratios :
       {embed::Ratios{0.5, 0, 0}, embed::Ratios{0, 0.5, 0}, embed::Ratios{0, 0, 0.5}}) {
    try {
      embed::check_ratios(blocks, table.tensors, ratios, "file");
      embed::QueryKeyScorer scorer(blocks, 8);
      if (ratios.qk > 0) scorer.add(seen.observed);
      const embed::Scores scores = ratios.qk > 0 ? scorer.scores() : embed::Scores{};
      choices.merge(embed::choose(blocks, table.tensors, ratios, scores, read_rows));
    } catch (const secateur::Error&) {
    }
  }
  const auto cuts = embed::cuts_of(blocks, choices, table.tensors);
  const auto tensors = embed::resized(table.tensors, cuts);
  const json fields = embed::updated(header.fields, blocks, choices);

  static const std::string path = (::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") +
                                  ("/secateur-fuzz-" + std::to_string(::getpid()));
  {
    embed::Writer writer(path, "model", fields, tensors);
    for (const auto& [name, smaller] : writer.order()) {
      const embed::Tensor& tensor = table.tensors.at(name);
      char* const data = file.data() + tensor.offset;
      const auto cut = cuts.find(name);
      if (cut != cuts.end()) {
        const auto small =
            secateur::compact(embed::view(tensor, data, name), cut->second.axis, cut->second.keep);
        require(small.shape == secateur::Dims(smaller.shape), "a compacted tensor's shape");
      }
      writer.append(data, smaller.bytes);
    }
    writer.commit();
  }
  const embed::File written(path);
  ::unlink(path.c_str());
  const embed::Table again = embed::read_table(written);
  const embed::Header read = embed::read_header(again, "model", "written");
  require(read.fields == fields, "the fields that were written");
  require(again.tensors.size() == tensors.size(), "as many tensors");
  for (const auto& [name, tensor] : again.tensors) {
    require(tensor.shape == tensors.at(name).shape, "the shapes that were written");
  }
  require(embed::read_blocks(read.fields, again.tensors, "written").size() == blocks.size(),
          "the blocks that were read");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<char> file(data, data + size);
  unsigned char prefix[embed::kPrefix] = {};
  if (size > 0) std::memcpy(prefix, data, std::min(size, sizeof(prefix)));
  try {
    const std::uint64_t header = embed::header_bytes(prefix, size, "file");
    embed::Table table = embed::parse_table({file.data() + embed::kPrefix, header}, size, "file");
    try {
      embed::read_header(table, "model", "file");
    } catch (const secateur::Error&) {
      sign(table);
    }
    const embed::Header read = embed::read_header(table, "model", "file");
    const std::vector<embed::Block> blocks = embed::read_blocks(read.fields, table.tensors, "file");
    try {
      prune(table, read, blocks, file);
    } catch (const std::exception& error) {
      require(false, error.what());  // a model that was read can be cut, written and read again
    }
  } catch (const secateur::Error&) {
    // What is refused in words is as it should be.
  }
  return 0;
}
