// Runs a ViT in onnxruntime and prunes it: no Python, and nothing between the graph's outputs and
// the scores.
//
//   prune_onnx MODEL GRAPH IMAGES OUT [--qk 0.5] [--v 0] [--ffn 0] [--gamma 8] [--stream]
//              [--no-verify] [--report FILE]
//
// MODEL is what secateur.save wrote, OUT what secateur.load opens. GRAPH is the same model in ONNX,
// with one input, (images, channels, height, width) in float32, and queries and keys among its
// outputs: "blocks.0.q" and "blocks.0.k", ..., (images, tokens, heads, head_dim) each. IMAGES is a
// .safetensors file with the calibration images, "images". The options are those of prune_vit.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "graph.h"
#include "program.h"
#include "prune.h"
#include "safetensors.h"
#include "vit.h"

namespace embed {
namespace {

// Images of a call where the graph leaves that open.
constexpr std::int64_t kBatch = 16;

/// Runs a graph for the queries and keys of blocks.
class Observer {
 public:
  Observer(Graph& graph, const std::vector<Block>& blocks) : graph_(graph) {
    const std::vector<std::string>& there = graph.outputs();
    for (const Block& block : blocks) {
      if (block.heads == 0) continue;
      for (const char* const kind : {".q", ".k"}) {
        const std::string output = block.name + kind;
        if (std::find(there.begin(), there.end(), output) == there.end()) {
          refuse(graph.name(), "an output " + output, "none of that name");
        }
        outputs_.push_back(output);
      }
    }
  }

  /// What the graph gives for a batch, where onnxruntime left it: until the next call.
  Observed run(float* images, const std::vector<std::int64_t>& shape) {
    std::size_t size = 1;
    for (const std::int64_t n : shape) size *= static_cast<std::size_t>(n);
    values_.clear();
    values_ = graph_.run(
        Ort::Value::CreateTensor<float>(memory_, images, size, shape.data(), shape.size()),
        outputs_);
    Observed observed;
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      const std::size_t dot = outputs_[i].rfind('.');
      Attention& layer = observed[outputs_[i].substr(0, dot)];
      (outputs_[i].substr(dot) == ".q" ? layer.q : layer.k) =
          view_of(values_[i], shape[0], graph_.name() + ": " + outputs_[i]);
    }
    return observed;
  }

 private:
  static secateur::TensorView view_of(const Ort::Value& value, std::int64_t images,
                                      const std::string& what) {
    if (!value.IsTensor()) refuse(what, "a tensor", "another type");
    const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
    const std::optional<secateur::DType> dtype = dtype_of(info.GetElementType());
    if (!dtype) {
      refuse(what, "float64, float32, float16 or bfloat16", name_of(info.GetElementType()));
    }
    const std::vector<std::int64_t> shape = info.GetShape();
    if (shape.empty() || shape[0] != images) {
      refuse(what, std::to_string(images) + " images, as it was given", to_text(shape));
    }
    return {value.GetTensorRawData(), *dtype, secateur::Dims(shape)};
  }

  Graph& graph_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::string> outputs_{};
  std::vector<Ort::Value> values_{};
};

/// The images of a file, checked against what the graph takes.
const Tensor& images_in(const Table& table, const Graph& graph, const std::string& what) {
  const auto found = table.tensors.find("images");
  if (found == table.tensors.end()) refuse(what, "a tensor of that name", "none");
  const Tensor& images = found->second;
  if (images.type->dtype != secateur::DType::f32) refuse(what, "F32", images.type->name);
  const std::vector<std::int64_t>&wanted = graph.shape(), &shape = images.shape;
  bool fits = shape.size() == wanted.size() && images.bytes > 0;
  for (std::size_t i = 1; fits && i < shape.size(); ++i) {
    fits = wanted[i] < 0 || shape[i] == wanted[i];
  }
  if (!fits) {
    std::vector<std::int64_t> any = wanted;
    any[0] = -1;
    refuse(what, to_text(any) + ", as " + graph.name() + " takes them", to_text(shape));
  }
  if (wanted[0] >= 0 && (wanted[0] == 0 || shape[0] % wanted[0] != 0)) {
    refuse(what,
           "a multiple of the " + std::to_string(wanted[0]) + " that " + graph.name() +
               " takes at a time",
           std::to_string(shape[0]) + " images");
  }
  return images;
}

Scores scores_of(Graph& graph, const File& file, const std::vector<Block>& blocks,
                 std::int64_t gamma) {
  const Table table = read_table(file);
  const Tensor& images = images_in(table, graph, file.name() + ": images");
  Observer observer(graph, blocks);
  const Mapping memory(file);
  auto* const first = reinterpret_cast<float*>(memory.at(images));
  const std::int64_t count = images.shape[0];
  const std::int64_t step = graph.shape()[0] < 0 ? kBatch : graph.shape()[0];
  const auto size = static_cast<std::int64_t>(images.bytes / sizeof(float)) / count;
  QueryKeyScorer scorer(blocks, gamma);
  for (std::int64_t i = 0; i < count; i += step) {
    std::vector<std::int64_t> shape = images.shape;
    shape[0] = std::min(step, count - i);
    scorer.add(observer.run(first + i * size, shape));
  }
  return scorer.scores();
}

void run(const Options& options) {
  Graph graph(options.files[1]);
  if (graph.type() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    refuse(graph.name() + ": " + graph.input(), "images of float32", name_of(graph.type()));
  }
  const File images(options.files[2]);
  prune(options, [&](const std::vector<Block>& blocks) {
    return scores_of(graph, images, blocks, options.gamma);
  });
}

}  // namespace
}  // namespace embed

int main(int argc, char** argv) {
  return embed::run_program("prune_onnx", [&] {
    embed::run(embed::parse({argv + 1, argv + argc}, {"MODEL", "GRAPH", "IMAGES", "OUT"}));
  });
}
