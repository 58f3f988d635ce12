// A graph that onnxruntime runs on the CPU: what the programs share that run a model.
#pragma once

#include <onnxruntime_cxx_api.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace embed {

/// nullopt where the core has no such type.
std::optional<secateur::DType> dtype_of(ONNXTensorElementDataType type);
std::string name_of(ONNXTensorElementDataType type);
/// "(any, 3, 224, 224)": a graph's sizes are -1 where it leaves them open.
std::string to_text(const std::vector<std::int64_t>& shape);

/// A graph with one input, images (images, channels, height, width).
class Graph {
 public:
  /// threads: of onnxruntime, which chooses where it is 0. Throws secateur::InvalidArgument, as
  /// run.
  explicit Graph(const std::string& path, int threads = 0);

  const std::string& name() const { return name_; }  ///< of the file, without the folder
  const std::string& input() const { return input_; }
  ONNXTensorElementDataType type() const { return type_; }
  /// Of the input; -1 where any size will do.
  const std::vector<std::int64_t>& shape() const { return shape_; }
  const std::vector<std::string>& outputs() const { return outputs_; }

  /// The outputs of those names.
  std::vector<Ort::Value> run(const Ort::Value& images, const std::vector<std::string>& outputs);

 private:
  std::string name_;
  // What goes wrong is thrown as well, and is to be one line.
  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "secateur"};
  Ort::Session session_;
  std::string input_{};
  ONNXTensorElementDataType type_{};
  std::vector<std::int64_t> shape_{};
  std::vector<std::string> outputs_{};
};

}  // namespace embed
