// Prunes a ViT from file to file: no Python, no framework.
//
//   prune_vit MODEL BUFFERS OUT [--qk 0.5] [--v 0] [--ffn 0] [--gamma 8] [--stream]
//             [--no-verify] [--report FILE]
//
// MODEL is what secateur.save wrote, OUT what secateur.load opens. BUFFERS stands for the memory of
// an inference stack: a .safetensors file with the queries and keys of calibration images,
// "blocks.0.q" and "blocks.0.k", ..., (images, tokens, heads, head_dim) each.
// --qk, --v and --ffn are the fractions of query/key neurons, value neurons and FFN channels that
// leave. --stream is for models larger than memory: it holds a few MiB of the model at a time, and
// with --v or --ffn what scores them, one layer's weights and their copy in float64.
#include <string>

#include "program.h"
#include "prune.h"
#include "safetensors.h"
#include "vit.h"

namespace embed {
namespace {

/// Queries and keys where they are: in the mapped file.
Observed observed_in(const Mapping& memory, const Table& table, const std::string& file) {
  Observed observed;
  for (const auto& [name, tensor] : table.tensors) {
    const std::size_t dot = name.rfind('.');
    const std::string kind = dot == std::string::npos ? "" : name.substr(dot + 1);
    if (kind != "q" && kind != "k") continue;
    Attention& layer = observed[name.substr(0, dot)];
    (kind == "q" ? layer.q : layer.k) = view(tensor, memory.at(tensor), file + ": " + name);
  }
  return observed;
}

void run(const Options& options) {
  const File buffers(options.files[1]);
  const Table seen = read_table(buffers);
  prune(options, [&](const std::vector<Block>& blocks) {
    const Mapping memory(buffers);
    QueryKeyScorer scorer(blocks, options.gamma);
    scorer.add(observed_in(memory, seen, buffers.name()));
    return scorer.scores();
  });
}

}  // namespace
}  // namespace embed

int main(int argc, char** argv) {
  return embed::run_program("prune_vit", [&] {
    embed::run(embed::parse({argv + 1, argv + argc}, {"MODEL", "BUFFERS", "OUT"}));
  });
}
