// Non-owning views of strided memory, which every function of the library reads and writes.
#pragma once

#include <secateur/export.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace secateur {

enum class DType : std::uint8_t { f32, f16, bf16, f64 };

/// Bytes of one element.
SECATEUR_API std::size_t item_size(DType dtype);
/// "float32", "float16", "bfloat16" or "float64".
SECATEUR_API const char* name(DType dtype);

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  /// cuda: the cudaStream_t on which the memory is ready and on which work is enqueued; null for
  /// the default stream. With two views in a call, the stream of the first is used.
  void* stream = nullptr;
};

inline constexpr std::size_t kMaxRank = 8;

/// Up to kMaxRank sizes or strides, stored without allocation.
class SECATEUR_API Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<std::int64_t> values);
  /// Throws InvalidArgument for more than kMaxRank values.
  Dims(const std::int64_t* values, std::size_t count);
  explicit Dims(const std::vector<std::int64_t>& values);

  std::size_t size() const { return size_; }
  std::int64_t operator[](std::size_t i) const { return values_[i]; }
  std::int64_t& operator[](std::size_t i) { return values_[i]; }
  const std::int64_t* begin() const { return values_.data(); }
  const std::int64_t* end() const { return values_.data() + size_; }
  bool operator==(const Dims& other) const;
  bool operator!=(const Dims& other) const { return !(*this == other); }

 private:
  std::array<std::int64_t, kMaxRank> values_{};
  std::size_t size_ = 0;
};

/// "(2, 197, 6, 64)".
SECATEUR_API std::string to_string(const Dims& dims);
/// Row-major strides, in elements. Throws InvalidArgument if they do not fit into 63 bits.
SECATEUR_API Dims contiguous_strides(const Dims& shape);

/// The common part of both views. `strides` counts elements and may be negative or zero.
struct SECATEUR_API TensorGeometry {
  DType dtype = DType::f32;
  Device device{};
  Dims shape{};
  Dims strides{};

  std::size_t rank() const { return shape.size(); }
  /// 0 if any size is 0 or below. Throws InvalidArgument for 2^63 elements or more.
  std::int64_t numel() const;
  /// Row-major without gaps (strides of axes of size 1 do not matter; an empty view is contiguous).
  bool is_contiguous() const;
};

/// Memory to read. The owner keeps it alive and unchanged during the call.
struct SECATEUR_API TensorView : TensorGeometry {
  const void* data = nullptr;

  TensorView() = default;
  /// A row-major view.
  TensorView(const void* memory, DType type, const Dims& sizes, Device where = {});
  /// A strided view. Throws InvalidArgument if shape and strides differ in rank.
  TensorView(const void* memory, DType type, const Dims& sizes, const Dims& steps,
             Device where = {});
};

/// Memory to read and write.
struct SECATEUR_API MutableTensorView : TensorGeometry {
  void* data = nullptr;

  MutableTensorView() = default;
  MutableTensorView(void* memory, DType type, const Dims& sizes, Device where = {});
  MutableTensorView(void* memory, DType type, const Dims& sizes, const Dims& steps,
                    Device where = {});
  operator TensorView() const;  // NOLINT(google-explicit-constructor): like T* to const T*
};

}  // namespace secateur
