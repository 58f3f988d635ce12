#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "backend.h"
#include "device.h"
#include "mma.h"
#include "rows.h"

namespace secateur::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowBlocks = 1024;
constexpr int kSquareThreads = kLanes * kLanes;
// Blocks that add a tile: four products for each thread.
constexpr int kAddParts = kTile * kTile / (4 * kThreads);
// Of rows that are packed at a time.
constexpr std::int64_t kPackedBytes = std::int64_t{256} << 20;
// Normalised elements, of at most 256 (√dim), are two float16 numbers of this times their value:
// the second is then no subnormal beside a first of about 1.
constexpr float kHalfScale = 128;

/// The sums that an update adds to.
struct Targets {
  double* values[kMaxTurns];
  DeviceSums::Gate gates[kMaxTurns];
  std::int64_t phases[kMaxTurns];
};

struct Norm {
  bool normalise;
  bool center;
};

// Products of float32 have not been added, or cannot be.
__device__ bool is_left(const Verdict& verdict) { return verdict.faulty != 0 || verdict.fits == 0; }

__device__ double peak_of(const Verdict& verdict) {
  return __longlong_as_double(static_cast<long long>(verdict.peak));
}

/// Offsets of (sums, total) rows, and verdicts before anything is known.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(RowChoice choice, Targets targets, std::int64_t total, bool faulty,
                   std::int64_t* offsets, Verdict* verdicts) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const unsigned s = blockIdx.y;
  for (std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; r < total;
       r += step) {
    offsets[s * total + r] = row_offset(choice, s, targets.phases[s], r);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) verdicts[s] = {0, faulty ? 1 : 0, 0};
}

// Every lane of a warp gets the same bits.
__device__ double warp_sum(double x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

__device__ double warp_max(double x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmax(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

template <typename Source>
__device__ RowNorm norm_of(const Source* x, std::int64_t stride, int dim, bool center, int lane) {
  double mean = 0;
  if (center) {
    double sum = 0;
#pragma unroll 4
    for (int c = lane; c < dim; c += 32) sum += to_double(x[c * stride]);
    mean = warp_sum(sum) / dim;
  }
  const auto squares = [&](double scale) {
    double sum = 0;
#pragma unroll 4
    for (int c = lane; c < dim; c += 32) {
      const double value = (to_double(x[c * stride]) - mean) * scale;
      sum += value * value;
    }
    return warp_sum(sum);
  };
  double scale = 1, square = squares(scale);
  if (needs_scale(square)) {
    scale = kRowScale;
    square = squares(scale);
  }
  return row_norm(dim, mean, scale, square);
}

// What rows are packed to: store() writes two neighbours to each of the planes.
__device__ std::uint32_t pair(std::uint32_t low, std::uint32_t high) { return low | high << 16; }

struct AsTheyAre {
  static constexpr int kPlanes = 1;
};

struct TwoHalves {
  static constexpr int kPlanes = 2;
  static __device__ std::uint32_t take(float* x) {
    const __half part = __float2half_rn(*x);
    *x -= __half2float(part);
    return __half_as_ushort(part);
  }
};

struct ThreeBFloats {
  static constexpr int kPlanes = 3;
  static __device__ std::uint32_t take(float* x) {
    const __nv_bfloat16 part = __float2bfloat16_rn(*x);
    *x -= __bfloat162float(part);
    return __bfloat16_as_ushort(part);
  }
};

/// `count` rows from number `first` of each of the sums to (sums, count, planes, width), a warp
/// each.
template <typename Source, typename Format>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const Source* data, const std::int64_t* offsets, std::int64_t total,
                std::int64_t first, std::int64_t count, std::int64_t stride, int dim, int width,
                Norm norm, std::uint16_t* packed, Verdict* verdicts) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= count) return;
  const unsigned s = blockIdx.y;
  const std::int64_t offset = offsets[s * total + first + row];
  auto* out =
      reinterpret_cast<std::uint32_t*>(packed + (s * count + row) * Format::kPlanes * width);
  if (offset == kNoRow) {
    for (int c = lane; c < Format::kPlanes * width / 2; c += 32) out[c] = 0;
    return;
  }
  const Source* x = data + offset;
  if constexpr (std::is_same<Format, AsTheyAre>::value) {
    for (int c = 2 * lane; c < width; c += 64) {
      out[c / 2] =
          pair(c < dim ? x[c * stride].bits : 0, c + 1 < dim ? x[(c + 1) * stride].bits : 0);
    }
  } else {
    RowNorm to{0, 1, true};
    if (norm.normalise) to = norm_of(x, stride, dim, norm.center, lane);
    if (!to.fits && lane == 0) verdicts[s].faulty = 1;
    const auto value = [&](int c) {
      if (c >= dim) return 0.0F;
      if (!norm.normalise) return to_float(x[c * stride]);
      return static_cast<float>((to_double(x[c * stride]) - to.mean) * to.factor) * kHalfScale;
    };
#pragma unroll 2
    for (int c = 2 * lane; c < width; c += 64) {
      float low = value(c), high = value(c + 1);
#pragma unroll
      for (int p = 0; p < Format::kPlanes; ++p) {
        const std::uint32_t first_part = Format::take(&low);
        out[(p * width + c) / 2] = pair(first_part, Format::take(&high));
      }
    }
  }
}

template <typename T, int kPlanes>
__global__ void __launch_bounds__(kTileThreads, 1) tile_kernel(TileRows rows, TileSums sums) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  multiply_tile<T, kPlanes>(rows, sums, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y),
                            static_cast<int>(blockIdx.z), shared);
#endif
}

/// Adds tiles, split after split, times the square of `unit`, and their columns times `unit`.
__global__ void __launch_bounds__(kThreads)
    add_kernel(TileSums from, Targets targets, int dim, int splits, double unit) {
  const unsigned s = blockIdx.z;
  if (is_left(from.verdicts[s]) || !targets.gates[s].open()) return;
  const int side = tiles_of(dim);
  const int index = static_cast<int>(blockIdx.x) / kAddParts;
  const int piece = static_cast<int>(blockIdx.x) % kAddParts,
            thread = static_cast<int>(threadIdx.x);
  int left = 0, right = 0;
  square_of(index, side, &left, &right);
  double* values = targets.values[s];
  const int e = (piece * kThreads + thread) * 4;
  const std::int64_t i = left * kTile + e / kTile, j = right * kTile + e % kTile;
  if (i < dim && j < dim && j + 3 >= i) {
    const float* products =
        from.products +
        (static_cast<std::int64_t>(s) * (gridDim.x / kAddParts) + index) * splits * kTile * kTile +
        e;
    double sum[4] = {};
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float4 four = *reinterpret_cast<const float4*>(
          products + static_cast<std::int64_t>(split) * kTile * kTile);
      sum[0] += static_cast<double>(four.x);
      sum[1] += static_cast<double>(four.y);
      sum[2] += static_cast<double>(four.z);
      sum[3] += static_cast<double>(four.w);
    }
    double* row = values + dim + (i * dim - i * (i + 1) / 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (j + k >= i && j + k < dim) row[j + k] += sum[k] * unit * unit;
    }
  }
  const int c = left * kTile + thread;
  if (left != right || piece != 0 || thread >= kTile || c >= dim) return;
  const float* columns = from.columns + static_cast<std::int64_t>(s) * splits * side * kTile + c;
  double sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) {
    sum += static_cast<double>(columns[static_cast<std::int64_t>(split) * side * kTile]);
  }
  values[c] += sum * unit;
}

/// The largest magnitude of the rows that are left, Inf where one is not finite; with norms 1, or
/// Inf where float64 may not hold them.
template <typename Source>
__global__ void __launch_bounds__(kThreads)
    peak_kernel(const Source* data, const std::int64_t* offsets, std::int64_t total,
                std::int64_t stride, int dim, Norm norm, RowNorm* norms, Verdict* verdicts) {
  const unsigned s = blockIdx.y;
  if (!is_left(verdicts[s])) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  double top = 0;
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       row < total; row += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t offset = offsets[s * total + row];
    if (offset == kNoRow) continue;
    const Source* x = data + offset;
    if (norm.normalise) {
      const RowNorm found = norm_of(x, stride, dim, norm.center, lane);
      if (lane == 0) norms[s * total + row] = found;
      top = found.fits ? fmax(top, 1.0) : HUGE_VAL;
      if (!found.fits) break;
      continue;
    }
    for (int c = lane; c < dim; c += 32) {
      const double magnitude = fabs(to_double(x[c * stride]));
      // Also false for a NaN.
      if (!(magnitude <= top)) top = magnitude < HUGE_VAL ? magnitude : HUGE_VAL;
    }
  }
  top = warp_max(top);
  if (lane == 0) {
    atomicMax(&verdicts[s].peak, static_cast<unsigned long long>(__double_as_longlong(top)));
  }
}

__global__ void refuse_kernel(Targets targets, const Verdict* verdicts, int count,
                              double max_magnitude) {
  const int s = static_cast<int>(threadIdx.x);
  if (s >= count || !is_left(verdicts[s])) return;
  const bool holds = peak_of(verdicts[s]) <= max_magnitude;
  if (targets.gates[s].open() && !holds) targets.gates[s].refuse();
}

/// Which of the rows that are left a kernel takes.
enum class Left { all, fit_float32, fit_float64 };

template <typename Source, typename T>
__global__ void __launch_bounds__(kSquareThreads)
    square_kernel(const Source* data, const std::int64_t* offsets, std::int64_t total,
                  std::int64_t stride, int dim, const RowNorm* norms, const Verdict* verdicts,
                  Left which, Targets targets) {
  __shared__ T strip[2 * strip_rows<T>() * kSide];
  __shared__ double sums[kSide * kSide];
  static_assert(sizeof(strip) + sizeof(sums) <= 48 * 1024, "static shared memory");
  const unsigned s = blockIdx.z;
  if (!is_left(verdicts[s]) || !targets.gates[s].open()) return;
  const bool single = norms != nullptr || fits_float32(peak_of(verdicts[s]));
  if (which != Left::all && single != (which == Left::fit_float32)) return;
  const Block block(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  int left = 0, right = 0;
  square_of(static_cast<int>(blockIdx.x), (dim + kSide - 1) / kSide, &left, &right);
  const RowReader<T, Source> rows{data, offsets + s * total, stride,
                                  norms == nullptr ? nullptr : norms + s * total};
  add_square<T>(block, rows, total, dim, left, right, strip, sums, targets.values[s],
                targets.values[s] + dim);
}

/// Parts of one piece of scratch memory.
class Parts {
 public:
  template <typename T>
  std::size_t add(std::int64_t count) {
    const std::size_t at = bytes_;
    bytes_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return at;
  }
  std::size_t bytes() const { return std::max<std::size_t>(bytes_, 1); }

 private:
  std::size_t bytes_ = 0;
};

template <typename T>
T* part_of(const Scratch& scratch, std::size_t at) {
  return reinterpret_cast<T*>(scratch.as<char>() + at);
}

/// Whether 16-byte copies can take columns from where they lie.
bool is_aligned(const TensorView& x) {
  const std::size_t last = x.rank() - 1;
  if (x.strides[last] != 1 || reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0) return false;
  for (std::size_t axis = 0; axis < last; ++axis) {
    if (x.shape[axis] > 1 && x.strides[axis] % kChunk != 0) return false;
  }
  return true;
}

unsigned blocks_for(std::int64_t count, std::int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

/// An update of all sums.
template <typename Source>
class Update {
 public:
  Update(const MomentRows& rows, const std::vector<Sums*>& sums)
      : rows_(rows),
        sums_(sums),
        count_(static_cast<unsigned>(sums.size())),
        stream_(stream_of(rows.x.device)),
        data_(static_cast<const Source*>(rows.x.data)),
        stride_(rows.x.strides[rows.x.rank() - 1]),
        dim_(static_cast<int>(rows.x.shape[rows.x.rank() - 1])),
        norm_{rows.normalise, rows.center},
        packs_(rows.normalise || std::is_same<Source, float>::value || !is_aligned(rows.x)),
        planes_(rows.normalise                       ? 2
                : std::is_same<Source, float>::value ? 3
                                                     : 1),
        tensor_cores_(!std::is_same<Source, double>::value &&
                      attribute(cudaDevAttrComputeCapabilityMajor, rows.x.device) >= 8) {
    choose_rows();
  }

  void run(double max_magnitude);

 private:
  DeviceSums& sums(unsigned s) const { return *static_cast<DeviceSums*>(sums_[s]); }
  void choose_rows();
  void multiply();
  template <typename Format>
  void pack(std::int64_t first, std::int64_t count);
  template <typename T, int kPlanes>
  void multiply_tiles(int first, int splits);
  template <typename T>
  void multiply_squares(Left which);

  const MomentRows& rows_;
  const std::vector<Sums*>& sums_;
  unsigned count_;
  cudaStream_t stream_;
  const Source* data_;
  std::int64_t stride_;
  int dim_;
  Norm norm_;
  bool packs_;
  int planes_;
  bool tensor_cores_;

  RowChoice choice_{};
  std::int64_t most_ = 0;   ///< of sums 0, which has the most
  std::int64_t total_ = 0;  ///< the same with what fills up the last split
  Splits splits_{};
  int at_once_ = 0;  ///< splits that are packed
  int width_ = 0;    ///< columns of packed rows
  int tiles_ = 0;

  Targets targets_{};
  std::int64_t* offsets_ = nullptr;
  Verdict* verdicts_ = nullptr;
  RowNorm* norms_ = nullptr;
  std::uint16_t* packed_ = nullptr;
  TileSums tile_sums_{};
};

template <typename Source>
void Update<Source>::choose_rows() {
  const TensorView& x = rows_.x;
  const std::size_t last = x.rank() - 1;
  choice_.rows = layout_of(x);
  choice_.rows.rank = static_cast<int>(last);
  choice_.in_turn = rows_.stride > 1 || sums_.size() > 1;
  choice_.turns = static_cast<std::int64_t>(sums_.size());
  choice_.stride = rows_.stride;
  choice_.count = x.numel() / std::max(1, dim_);
  choice_.per_image = 1;
  total_ = choice_.count;
  if (choice_.in_turn) {
    choice_.per_image = (x.shape[1] + rows_.stride - 1) / rows_.stride;
    const std::int64_t images = (x.shape[0] + choice_.turns - 1) / choice_.turns;
    total_ = images * choice_.per_image;
  }
  most_ = total_;
  if (!tensor_cores_ || total_ == 0) return;
  const int side = tiles_of(dim_);
  tiles_ = side * (side + 1) / 2;
  splits_ = split_rows(total_, static_cast<std::int64_t>(tiles_) * count_,
                       attribute(cudaDevAttrMultiProcessorCount, x.device));
  total_ = static_cast<std::int64_t>(splits_.rows) * splits_.count;
  at_once_ = splits_.count;
  if (packs_) {
    width_ = (dim_ + kChunk - 1) / kChunk * kChunk;
    const std::int64_t split_bytes = std::int64_t{2} * count_ * splits_.rows * planes_ * width_;
    at_once_ = static_cast<int>(
        std::min<std::int64_t>(at_once_, std::max<std::int64_t>(1, kPackedBytes / split_bytes)));
  }
  at_once_ = std::min(at_once_, 65535);
}

template <typename Source>
void Update<Source>::run(double max_magnitude) {
  Parts parts;
  const std::int64_t all = total_ * count_;
  const std::size_t offsets = parts.add<std::int64_t>(all), verdicts = parts.add<Verdict>(count_),
                    norms = parts.add<RowNorm>(norm_.normalise ? all : 0);
  const std::int64_t products = static_cast<std::int64_t>(count_) * splits_.count * tiles_;
  const std::int64_t columns = static_cast<std::int64_t>(count_) * splits_.count * tiles_of(dim_);
  const std::size_t tile_products = parts.add<float>(products * kTile * kTile),
                    tile_columns = parts.add<float>(columns * kTile),
                    packed = parts.add<std::uint16_t>(static_cast<std::int64_t>(count_) * at_once_ *
                                                      splits_.rows * planes_ * width_);
  const Scratch scratch(parts.bytes(), rows_.x.device);
  offsets_ = part_of<std::int64_t>(scratch, offsets);
  verdicts_ = part_of<Verdict>(scratch, verdicts);
  if (norm_.normalise) norms_ = part_of<RowNorm>(scratch, norms);
  tile_sums_ = {part_of<float>(scratch, tile_products), part_of<float>(scratch, tile_columns),
                verdicts_};
  packed_ = part_of<std::uint16_t>(scratch, packed);

  for (unsigned s = 0; s < count_; ++s) {
    targets_.values[s] = sums(s).values();
    targets_.gates[s] = sums(s).begin(stream_);
    targets_.phases[s] = s < rows_.phases.size() ? rows_.phases[s] % rows_.stride : 0;
  }
  if (total_ > 0) {
    const unsigned blocks = std::min<unsigned>(kRowBlocks, blocks_for(total_, kThreads));
    prepare_kernel<<<dim3(blocks, count_), kThreads, 0, stream_>>>(
        choice_, targets_, total_, !tensor_cores_, offsets_, verdicts_);
    check(cudaGetLastError(), "prepare_kernel");
    if (tensor_cores_) multiply();
    peak_kernel<Source>
        <<<dim3(std::min<unsigned>(kRowBlocks, blocks_for(total_, kWarps)), count_), kThreads, 0,
           stream_>>>(data_, offsets_, total_, stride_, dim_, norm_, norms_, verdicts_);
    check(cudaGetLastError(), "peak_kernel");
    refuse_kernel<<<1, kMaxTurns, 0, stream_>>>(targets_, verdicts_, static_cast<int>(count_),
                                                max_magnitude);
    check(cudaGetLastError(), "refuse_kernel");
    if (tensor_cores_ || std::is_same<Source, double>::value) {
      multiply_squares<double>(Left::all);
    } else {
      multiply_squares<float>(Left::fit_float32);
      multiply_squares<double>(Left::fit_float64);
    }
  }
  for (unsigned s = 0; s < count_; ++s) sums(s).end();
}

template <typename Source>
void Update<Source>::multiply() {
  if constexpr (!std::is_same<Source, double>::value) {
    for (int first = 0; first < splits_.count; first += at_once_) {
      const int splits = std::min(at_once_, splits_.count - first);
      const std::int64_t row = static_cast<std::int64_t>(first) * splits_.rows,
                         count = static_cast<std::int64_t>(splits) * splits_.rows;
      if (norm_.normalise) {
        pack<TwoHalves>(row, count);
        multiply_tiles<Half, 2>(first, splits);
      } else if constexpr (std::is_same<Source, float>::value) {
        pack<ThreeBFloats>(row, count);
        multiply_tiles<BFloat, 3>(first, splits);
      } else {
        if (packs_) pack<AsTheyAre>(row, count);
        multiply_tiles<Source, 1>(first, splits);
      }
    }
    const auto blocks = static_cast<unsigned>(tiles_) * kAddParts;
    add_kernel<<<dim3(blocks, 1, count_), kThreads, 0, stream_>>>(
        tile_sums_, targets_, dim_, splits_.count,
        norm_.normalise ? 1 / static_cast<double>(kHalfScale) : 1.0);
    check(cudaGetLastError(), "add_kernel");
  }
}

template <typename Source>
template <typename Format>
void Update<Source>::pack(std::int64_t first, std::int64_t count) {
  pack_kernel<Source, Format><<<dim3(blocks_for(count, kWarps), count_), kThreads, 0, stream_>>>(
      data_, offsets_, total_, first, count, stride_, dim_, width_, norm_, packed_, verdicts_);
  check(cudaGetLastError(), "pack_kernel");
}

template <typename Source>
template <typename T, int kPlanes>
void Update<Source>::multiply_tiles(int first, int splits) {
  TileRows tile_rows{};
  tile_rows.data = packs_ ? packed_ : reinterpret_cast<const std::uint16_t*>(data_);
  tile_rows.offsets = packs_ ? nullptr : offsets_;
  tile_rows.pitch = static_cast<std::int64_t>(kPlanes) * width_;
  tile_rows.plane = width_;
  tile_rows.count = most_;
  tile_rows.width = packs_ ? width_ : dim_;
  tile_rows.rows = splits_.rows;
  tile_rows.first = first;
  tile_rows.all = splits_.count;
  constexpr int kBytes = kPipelineBytes / stage_bytes<kPlanes>() * stage_bytes<kPlanes>();
  check(cudaFuncSetAttribute(tile_kernel<T, kPlanes>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kBytes),
        "cudaFuncSetAttribute");
  tile_kernel<T, kPlanes>
      <<<dim3(static_cast<unsigned>(tiles_), static_cast<unsigned>(splits), count_), kTileThreads,
         kBytes, stream_>>>(tile_rows, tile_sums_);
  check(cudaGetLastError(), "tile_kernel");
}

template <typename Source>
template <typename T>
void Update<Source>::multiply_squares(Left which) {
  const auto side = static_cast<unsigned>((dim_ + kSide - 1) / kSide);
  square_kernel<Source, T><<<dim3(side * (side + 1) / 2, 1, count_), kSquareThreads, 0, stream_>>>(
      data_, offsets_, total_, stride_, dim_, norms_, verdicts_, which, targets_);
  check(cudaGetLastError(), "square_kernel");
}

}  // namespace

void moments(const MomentRows& rows, double max_magnitude, const std::vector<Sums*>& sums) {
  const DeviceGuard guard(rows.x.device);
  with_source(rows.x.dtype,
              [&](auto source) { Update<decltype(source)>(rows, sums).run(max_magnitude); });
}

}  // namespace secateur::cuda
