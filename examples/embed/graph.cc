#include "graph.h"

#include "safetensors.h"

namespace embed {
namespace {

Ort::Session load(const Ort::Env& env, const std::string& path, const std::string& name,
                  int threads) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  // Between two runs the processors are the scorer's, or another graph's.
  options.AddConfigEntry("session.intra_op.allow_spinning", "0");
  try {
    return {env, path.c_str(), options};
  } catch (const Ort::Exception& error) {
    refuse(name, "a graph that onnxruntime loads", error.what());
  }
}

}  // namespace

std::optional<secateur::DType> dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return secateur::DType::f32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return secateur::DType::f16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return secateur::DType::bf16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return secateur::DType::f64;
    default:
      return std::nullopt;
  }
}

std::string name_of(ONNXTensorElementDataType type) {
  const std::optional<secateur::DType> dtype = dtype_of(type);
  return dtype ? secateur::name(*dtype) : "ONNX's type " + std::to_string(type);
}

std::string to_text(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) {
    text += (text.empty() ? "(" : ", ") + (size < 0 ? "any" : std::to_string(size));
  }
  return text.empty() ? "()" : text + ")";
}

Graph::Graph(const std::string& path, int threads)
    : name_(File(path).name()), session_(load(env_, path, name_, threads)) {
  const std::size_t inputs = session_.GetInputCount();
  if (inputs != 1) refuse(name_, "a graph of one input", std::to_string(inputs));
  const Ort::AllocatorWithDefaultOptions allocator;
  input_ = session_.GetInputNameAllocated(0, allocator).get();
  const Ort::TypeInfo info = session_.GetInputTypeInfo(0);
  const std::string what = name_ + ": " + input_;
  if (info.GetONNXType() != ONNX_TYPE_TENSOR) refuse(what, "a tensor", "another type");
  const auto tensor = info.GetTensorTypeAndShapeInfo();
  type_ = tensor.GetElementType();
  shape_ = tensor.GetShape();
  if (shape_.size() != 4) {
    refuse(what, "images, (images, channels, height, width)", to_text(shape_));
  }
  for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
    outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
  }
}

std::vector<Ort::Value> Graph::run(const Ort::Value& images,
                                   const std::vector<std::string>& outputs) {
  const char* const input = input_.c_str();
  std::vector<const char*> names;
  for (const std::string& output : outputs) names.push_back(output.c_str());
  try {
    return session_.Run(Ort::RunOptions{nullptr}, &input, &images, 1, names.data(), names.size());
  } catch (const Ort::Exception& error) {
    const std::vector<std::int64_t> shape = images.GetTensorTypeAndShapeInfo().GetShape();
    refuse(name_, "a graph that runs on images " + to_text(shape), error.what());
  }
}

}  // namespace embed
