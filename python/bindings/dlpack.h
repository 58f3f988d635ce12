// DLPack: how tensors of any framework come in without a copy. The only file that knows it.
// Structures: https://github.com/dmlc/dlpack (Apache-2.0), version 1, which keeps its ABI.
#pragma once

#include <pybind11/pybind11.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "fail.h"

namespace secateur::python {
namespace dlpack {

namespace py = pybind11;

// Names and layout of these are DLPack's.
enum DeviceCode : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kRocmHost = 11 };
enum TypeCode : std::uint8_t { kInt, kUInt, kFloat, kOpaque, kBfloat, kComplex, kBool };
constexpr std::uint64_t kReadOnly = 1, kIsCopied = 2;

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLPackVersion {
  std::uint32_t major;
  std::uint32_t minor;
};
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor dl_tensor;
};
// Up to the last function that is called here; frameworks append to it.
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;
  int (*allocate)(DLTensor*, DLManagedTensorVersioned**, void*,
                  void (*)(void*, const char*, const char*));
  int (*from_py_object)(void* object, DLManagedTensorVersioned** out);
  int (*to_py_object)(DLManagedTensorVersioned* tensor, void** out);
  int (*view_of_py_object)(void* object, DLTensor* out);
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

/// A tensor that its framework has exported; gives it back on destruction (with the GIL held).
class Tensor {
 public:
  /// Throws InvalidArgument or Unsupported, naming the argument.
  Tensor(py::handle object, const std::string& argument) {
    refuse_negative_view(object, argument);
    if (!from_exchange_api(object, argument)) from_capsule(object, argument);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() = default;

  /// Writing to it would not reach the owner's memory, or is not allowed.
  bool read_only() const {
    return versioned_ != nullptr && (versioned_->flags & (kReadOnly | kIsCopied)) != 0;
  }

  MutableTensorView view(const std::string& argument) const {
    const DLTensor& tensor = versioned_ != nullptr ? versioned_->dl_tensor : legacy_->dl_tensor;
    const auto rank = static_cast<std::size_t>(tensor.ndim);
    check_rank(rank, argument);
    const Dims shape(tensor.shape, rank);
    const Dims strides =
        tensor.strides == nullptr ? contiguous_strides(shape) : Dims(tensor.strides, rank);
    // Null data (nothing exported, or an empty tensor) stays null.
    char* data = static_cast<char*>(tensor.data);
    if (data != nullptr) data += tensor.byte_offset;
    Device where = device(tensor.device, argument);
    where.stream = stream_;
    return {data, dtype(tensor.dtype, argument), shape, strides, where};
  }

 private:
  struct Release {
    template <typename Managed>
    void operator()(Managed* tensor) const {
      if (tensor->deleter != nullptr) tensor->deleter(tensor);
    }
  };

  // 0.3 µs where __dlpack__ takes 17, and takes tensors that require grad.
  bool from_exchange_api(py::handle object, const std::string& argument) {
    const py::object capsule =
        py::getattr(py::type::handle_of(object), "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
    auto* api =
        static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api != nullptr && api->version.major > 1) api = api->previous;
    if (api == nullptr || api->version.major != 1) return false;
    DLManagedTensorVersioned* exported = nullptr;
    if (api->from_py_object(object.ptr(), &exported) != 0) refuse(object, argument);
    versioned_.reset(exported);
    const DLDevice& where = versioned_->dl_tensor.device;
    if (where.device_type == kCuda &&
        (api->current_work_stream == nullptr ||
         api->current_work_stream(where.device_type, where.device_id, &stream_) != 0)) {
      refuse(object, argument);
    }
    return true;
  }

  /// For __dlpack__: the stream that the tensor is to be ready on, torch's current one or else the
  /// default stream; None where there are no streams.
  py::object choose_stream(const py::object& source) {
    if (!py::hasattr(source, "__dlpack_device__")) return py::none();
    const auto where = py::cast<std::pair<int, int>>(source.attr("__dlpack_device__")());
    if (where.first != kCuda) return py::none();
    const std::string module = py::str(py::type::handle_of(source).attr("__module__"));
    if (module.rfind("torch", 0) == 0) {
      const py::object current =
          py::module_::import("torch").attr("cuda").attr("current_stream")(where.second);
      const auto handle = py::cast<std::uintptr_t>(current.attr("cuda_stream"));
      stream_ = reinterpret_cast<void*>(handle);
    }
    // The default stream is DLPack's 1.
    return py::int_(stream_ == nullptr ? 1 : reinterpret_cast<std::uintptr_t>(stream_));
  }

  void from_capsule(py::handle object, const std::string& argument) {
    if (!py::hasattr(object, "__dlpack__")) {
      fail<InvalidArgument>(argument, "an array or tensor (numpy, torch, anything with __dlpack__)",
                            type_name(object));
    }
    py::object source = py::reinterpret_borrow<py::object>(object);
    py::object capsule;
    try {
      if (py::bool_(py::getattr(source, "requires_grad", py::bool_(false)))) {
        source = source.attr("detach")();
      }
      py::dict options;
      const py::object stream = choose_stream(source);
      if (!stream.is_none()) options["stream"] = stream;
      try {
        capsule =
            source.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0), **options);
      } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;  // older than max_version
        capsule = source.attr("__dlpack__")(**options);
      }
    } catch (py::error_already_set& error) {
      error.restore();
      refuse(object, argument);
    }
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      auto* tensor = static_cast<DLManagedTensorVersioned*>(
          PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      if (tensor->version.major != 1) {
        fail<InvalidArgument>(argument, "a tensor of DLPack 1",
                              "DLPack " + std::to_string(tensor->version.major));
      }
      PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
      versioned_.reset(tensor);
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      legacy_.reset(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor")));
      PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    } else {
      fail<InvalidArgument>(argument, "a DLPack capsule from __dlpack__", type_name(capsule));
    }
  }

  /// Turns the exporter's Python error, which is set, into one of ours.
  [[noreturn]] static void refuse(py::handle object, const std::string& argument) {
    const py::error_already_set error;
    if (!is_refusal(error)) throw error;
    const std::string device = py::str(py::getattr(object, "device", py::str("cpu")));
    if (device.rfind("cpu", 0) != 0) {
      fail<Unsupported>(argument, "a tensor on the CPU", "one on " + device);
    }
    // torch appends a stack trace to some of its messages.
    const std::string reason = py::str(error.value());
    fail<InvalidArgument>(argument, "a strided CPU tensor",
                          type_name(object) + " (" + reason.substr(0, reason.find('\n')) + ")");
  }

  // torch exports the memory of a lazily negated tensor as it is, with the other sign.
  static void refuse_negative_view(py::handle object, const std::string& argument) {
    const py::object is_neg = py::getattr(object, "is_neg", py::none());
    if (is_neg.is_none() || !is_neg().cast<bool>()) return;
    fail<InvalidArgument>(argument, "values in memory", "a negative view (see resolve_neg)");
  }

  static Device device(const DLDevice& device, const std::string& argument) {
    switch (device.device_type) {
      case kCpu:
      case kCudaHost:
      case kRocmHost:
        return {};
      case kCuda:
        return {DeviceType::cuda, device.device_id};
      default:
        fail<Unsupported>(argument, "a tensor on the CPU",
                          "one on DLPack device type " + std::to_string(device.device_type));
    }
  }

  static DType dtype(const DLDataType& type, const std::string& argument) {
    if (type.lanes == 1) {
      if (type.code == kFloat && type.bits == 64) return DType::f64;
      if (type.code == kFloat && type.bits == 32) return DType::f32;
      if (type.code == kFloat && type.bits == 16) return DType::f16;
      if (type.code == kBfloat && type.bits == 16) return DType::bf16;
    }
    static constexpr const char* kNames[] = {"int",    "uint",    "float", "opaque",
                                             "bfloat", "complex", "bool"};
    const std::string kind = type.code <= kBool ? kNames[type.code] : "float";
    refuse_dtype(argument, type.code == kBool ? kind : kind + std::to_string(type.bits));
  }

  void* stream_ = nullptr;  ///< of a CUDA tensor; null for the default stream
  std::unique_ptr<DLManagedTensorVersioned, Release> versioned_;
  std::unique_ptr<DLManagedTensor, Release> legacy_;
};

}  // namespace dlpack
}  // namespace secateur::python
