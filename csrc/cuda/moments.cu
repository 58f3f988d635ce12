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
// Blocks that add kTile rows of a tile: a warp takes one of them, so that it writes lines.
constexpr int kAddParts = kTile / kWarps;
// Columns from which on tiles of two tile columns by one read less: below that there are too few.
constexpr int kTallDim = 1024;
// Of stages, for every kTile columns of a tile; the second on devices where two such tiles fit.
constexpr int kPipelineBytes = 48 << 10, kDeepPipelineBytes = 80 << 10;
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
  if (blockIdx.x == 0 && threadIdx.x == 0) verdicts[s] = {0, faulty ? 1 : 0, 0, 0};
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

/// The norm of what value(i), i < count, gives a lane of its row.
template <typename Value>
__device__ RowNorm norm_of(const Value& value, int count, int dim, bool center) {
  double mean = 0;
  if (center) {
    double sum = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum += value(i);
    mean = warp_sum(sum) / dim;
  }
  const auto squares = [&](double scale) {
    double sum = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const double scaled = (value(i) - mean) * scale;
      sum += scaled * scaled;
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

template <typename Source>
__device__ RowNorm norm_of(const Source* x, std::int64_t stride, int dim, bool center, int lane) {
  return norm_of([&](int i) { return to_double(x[(lane + 32 * i) * stride]); },
                 (dim - lane + 31) / 32, dim, center);
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

template <typename Source>
struct alignas(2 * sizeof(Source)) Two {
  Source low, high;
};

/// A row's norm, and its elements c and c + 1 of that in registers: a row is read and converted to
/// float64 once.
template <typename Source, int kPairs>
class HeldRow {
 public:
  __device__ HeldRow(const Source* x, std::int64_t stride, int dim, bool center, int lane) {
    const bool pairs =
        stride == 1 && reinterpret_cast<std::uintptr_t>(x) % sizeof(Two<Source>) == 0;
    Source found[kPairs][2];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = 2 * lane + 64 * i;
      if (pairs && c + 1 < dim) {
        const auto two = *reinterpret_cast<const Two<Source>*>(x + c);
        found[i][0] = two.low;
        found[i][1] = two.high;
      } else {
        found[i][0] = c < dim ? x[c * stride] : Source{};
        found[i][1] = c + 1 < dim ? x[(c + 1) * stride] : Source{};
      }
    }
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      held_[i][0] = to_double(found[i][0]);
      held_[i][1] = to_double(found[i][1]);
      sum += held_[i][0] + held_[i][1];
    }
    const double mean = center ? warp_sum(sum) / dim : 0;
    const auto squares = [&](double scale) {
      double square = 0;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int c = 2 * lane + 64 * i;
        const double low = c < dim ? held_[i][0] * scale : 0;
        const double high = c + 1 < dim ? held_[i][1] * scale : 0;
        square += low * low;
        square += high * high;
      }
      return warp_sum(square);
    };
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      held_[i][0] -= mean;
      held_[i][1] -= mean;
    }
    double scale = 1, square = squares(scale);
    if (needs_scale(square)) {
      scale = kRowScale;
      square = squares(scale);
    }
    norm_ = row_norm(dim, mean, scale, square);
  }

  __device__ bool fits() const { return norm_.fits; }
  __device__ float value(int i, int which) const {
    return static_cast<float>(held_[i][which] * norm_.factor) * kHalfScale;
  }

 private:
  double held_[kPairs][2];
  RowNorm norm_;
};

template <typename Format>
__device__ void store(std::uint32_t* out, int c, int width, float low, float high) {
#pragma unroll
  for (int p = 0; p < Format::kPlanes; ++p) {
    const std::uint32_t first = Format::take(&low);
    out[(p * width + c) / 2] = pair(first, Format::take(&high));
  }
}

/// `count` rows from number `first` of each of the sums to (sums, count, planes, width), a warp
/// each. Of normalised rows it holds kPairs 64 elements, or with 0 reads them again.
template <typename Source, typename Format, int kPairs>
__global__ void __launch_bounds__(kThreads, 2)
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
  } else if constexpr (kPairs > 0) {
    const HeldRow<Source, kPairs> held(x, stride, dim, norm.center, lane);
    if (!held.fits() && lane == 0) verdicts[s].faulty = 1;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = 2 * lane + 64 * i;
      if (c >= width) break;
      store<Format>(out, c, width, c < dim ? held.value(i, 0) : 0.0F,
                    c + 1 < dim ? held.value(i, 1) : 0.0F);
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
#pragma unroll 4
    for (int c = 2 * lane; c < width; c += 64) {
      store<Format>(out, c, width, value(c), value(c + 1));
    }
  }
}

template <typename T, int kPlanes, int kTall>
__global__ void __launch_bounds__(tile_threads<kTall>(), 3 - kTall)
    tile_kernel(TileRows rows, TileSums sums) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  multiply_tile<T, kPlanes, kTall>(rows, sums, static_cast<int>(blockIdx.x),
                                   static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                                   shared);
#endif
}

/// What is done with the tiles of `splits`.
struct Addition {
  TileSums from;
  int splits, tall;
  double unit;  ///< of an element
};

/// Adds some rows of a tile, split after split, times the square of the unit, and their columns
/// times the unit.
__device__ void add_tile(const Addition& how, double* values, int dim) {
  const unsigned s = blockIdx.y;
  const int side = tiles_of(dim), parts = kAddParts * how.tall;
  const int index = static_cast<int>(blockIdx.x) / parts;
  const int piece = static_cast<int>(blockIdx.x) % parts, thread = static_cast<int>(threadIdx.x);
  int band = 0, right = 0;
  tile_of(index, side, how.tall, &band, &right);
  const int line = piece * kWarps + thread / 32;
  const std::int64_t i = static_cast<std::int64_t>(band) * how.tall * kTile + line;
  const std::int64_t j = right * kTile + thread % 32;
  const std::int64_t size = static_cast<std::int64_t>(how.tall) * kTile * kTile;
  if (i < dim && right * kTile + kTile > i) {
    const float* products =
        how.from.products +
        (static_cast<std::int64_t>(s) * (gridDim.x / static_cast<unsigned>(parts)) + index) *
            how.splits * size +
        line * kTile + thread % 32;
    double sum[4] = {};
#pragma unroll 4
    for (int split = 0; split < how.splits; ++split) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += static_cast<double>(products[split * size + 32 * k]);
    }
    double* row = values + dim + (i * dim - i * (i + 1) / 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::int64_t at = j + 32 * k;
      if (at >= i && at < dim) row[at] += sum[k] * how.unit * how.unit;
    }
  }
  const int c = right * kTile + thread;
  if (right / how.tall != band || piece != 0 || thread >= kTile || c >= dim) return;
  const float* columns =
      how.from.columns + static_cast<std::int64_t>(s) * how.splits * side * kTile + c;
  double sum = 0;
#pragma unroll 4
  for (int split = 0; split < how.splits; ++split) {
    sum += static_cast<double>(columns[static_cast<std::int64_t>(split) * side * kTile]);
  }
  values[c] += sum * how.unit;
}

/// Adds tiles. Where they do not hold, instead finds the largest magnitude of the rows, Inf where
/// one is not finite; with norms 1, or Inf where float64 may not hold them. The last block of
/// threads refuses what is too large.
template <typename Source>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Source* data, const std::int64_t* offsets, std::int64_t total,
                  std::int64_t stride, int dim, Norm norm, RowNorm* norms, Verdict* verdicts,
                  Targets targets, double max_magnitude, Addition how) {
  const unsigned s = blockIdx.y;
  const DeviceSums::Gate& gate = targets.gates[s];
  if (!is_left(verdicts[s])) {
    if (gate.open()) add_tile(how, targets.values[s], dim);
    return;
  }
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
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(&verdicts[s].done, 1u) + 1 != gridDim.x) return;
  __threadfence();
  const unsigned long long peak = atomicMax(&verdicts[s].peak, 0ull);
  const bool holds = __longlong_as_double(static_cast<long long>(peak)) <= max_magnitude;
  if (gate.open() && !holds) gate.refuse();
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
  Update(const MomentRows& rows, const std::vector<Sums*>& sums, int tall)
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
                      attribute(cudaDevAttrComputeCapabilityMajor, rows.x.device) >= 8),
        tall_(tall) {
    choose_rows();
  }

  void run(double max_magnitude);

 private:
  DeviceSums& sums(unsigned s) const { return *static_cast<DeviceSums*>(sums_[s]); }
  void choose_rows();
  std::size_t lay_out();
  void begin(const Scratch& scratch);
  void prepare();
  void multiply();
  template <typename Format, int kPairs = 0>
  void pack(std::int64_t first, std::int64_t count);
  template <typename T, int kPlanes>
  void multiply_tiles(int first, int splits);
  template <typename T, int kPlanes, int kTall>
  void launch_tiles(TileRows rows, int splits);
  void finish(double max_magnitude);
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
  int tall_;  ///< tile columns that a tile's left side has

  RowChoice choice_{};
  std::int64_t most_ = 0;   ///< of sums 0, which has the most
  std::int64_t total_ = 0;  ///< the same with what fills up the last split
  Splits splits_{};
  int at_once_ = 0;  ///< splits that are packed
  int width_ = 0;    ///< columns of packed rows
  int tiles_ = 0;

  struct {
    std::size_t offsets, verdicts, norms, products, columns, packed;
  } at_{};  ///< in scratch memory
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
  tiles_ = tiles_in(tiles_of(dim_), tall_);
  splits_ = split_rows(total_, static_cast<std::int64_t>(tiles_) * count_,
                       (3 - tall_) * attribute(cudaDevAttrMultiProcessorCount, x.device));
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
std::size_t Update<Source>::lay_out() {
  Parts parts;
  const std::int64_t all = total_ * count_;
  const std::int64_t products = static_cast<std::int64_t>(count_) * splits_.count * tiles_;
  const std::int64_t columns = static_cast<std::int64_t>(count_) * splits_.count * tiles_of(dim_);
  at_.offsets = parts.add<std::int64_t>(all);
  at_.verdicts = parts.add<Verdict>(count_);
  at_.norms = parts.add<RowNorm>(norm_.normalise ? all : 0);
  at_.products = parts.add<float>(products * tall_ * kTile * kTile);
  at_.columns = parts.add<float>(columns * kTile);
  at_.packed = parts.add<std::uint16_t>(static_cast<std::int64_t>(count_) * at_once_ *
                                        splits_.rows * planes_ * width_);
  return parts.bytes();
}

template <typename Source>
void Update<Source>::begin(const Scratch& scratch) {
  offsets_ = part_of<std::int64_t>(scratch, at_.offsets);
  verdicts_ = part_of<Verdict>(scratch, at_.verdicts);
  if (norm_.normalise) norms_ = part_of<RowNorm>(scratch, at_.norms);
  tile_sums_ = {part_of<float>(scratch, at_.products), part_of<float>(scratch, at_.columns),
                verdicts_};
  packed_ = part_of<std::uint16_t>(scratch, at_.packed);
  for (unsigned s = 0; s < count_; ++s) {
    targets_.values[s] = sums(s).values();
    targets_.gates[s] = sums(s).begin(stream_);
    targets_.phases[s] = s < rows_.phases.size() ? rows_.phases[s] % rows_.stride : 0;
  }
}

template <typename Source>
void Update<Source>::run(double max_magnitude) {
  const Scratch scratch(lay_out(), rows_.x.device);
  begin(scratch);
  if (total_ > 0) {
    prepare();
    if (tensor_cores_) multiply();
    finish(max_magnitude);
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
void Update<Source>::prepare() {
  const unsigned blocks = std::min<unsigned>(kRowBlocks, blocks_for(total_, kThreads));
  prepare_kernel<<<dim3(blocks, count_), kThreads, 0, stream_>>>(
      choice_, targets_, total_, !tensor_cores_, offsets_, verdicts_);
  check(cudaGetLastError(), "prepare_kernel");
}

template <typename Source>
void Update<Source>::multiply() {
  if constexpr (!std::is_same<Source, double>::value) {
    for (int first = 0; first < splits_.count; first += at_once_) {
      const int splits = std::min(at_once_, splits_.count - first);
      const std::int64_t row = static_cast<std::int64_t>(first) * splits_.rows,
                         count = static_cast<std::int64_t>(splits) * splits_.rows;
      if (norm_.normalise) {
        if (dim_ <= 6 * 64) {
          pack<TwoHalves, 6>(row, count);
        } else if (dim_ <= 16 * 64) {
          pack<TwoHalves, 16>(row, count);
        } else {
          pack<TwoHalves>(row, count);
        }
        multiply_tiles<Half, 2>(first, splits);
      } else if constexpr (std::is_same<Source, float>::value) {
        pack<ThreeBFloats>(row, count);
        multiply_tiles<BFloat, 3>(first, splits);
      } else {
        if (packs_) pack<AsTheyAre>(row, count);
        multiply_tiles<Source, 1>(first, splits);
      }
    }
  }
}

template <typename Source>
void Update<Source>::finish(double max_magnitude) {
  const unsigned blocks = tensor_cores_
                              ? static_cast<unsigned>(tiles_ * tall_ * kAddParts)
                              : std::min<unsigned>(kRowBlocks, blocks_for(total_, kWarps));
  const Addition how{tile_sums_, splits_.count, tall_,
                     norm_.normalise ? 1 / static_cast<double>(kHalfScale) : 1.0};
  finish_kernel<Source><<<dim3(blocks, count_), kThreads, 0, stream_>>>(
      data_, offsets_, total_, stride_, dim_, norm_, norms_, verdicts_, targets_, max_magnitude,
      how);
  check(cudaGetLastError(), "finish_kernel");
}

template <typename Source>
template <typename Format, int kPairs>
void Update<Source>::pack(std::int64_t first, std::int64_t count) {
  const dim3 grid(blocks_for(count, kWarps), count_);
  pack_kernel<Source, Format, kPairs><<<grid, kThreads, 0, stream_>>>(
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
  if (tall_ == 1) {
    launch_tiles<T, kPlanes, 1>(tile_rows, splits);
  } else {
    launch_tiles<T, kPlanes, 2>(tile_rows, splits);
  }
}

template <typename Source>
template <typename T, int kPlanes, int kTall>
void Update<Source>::launch_tiles(TileRows rows, int splits) {
  constexpr int kBytes = stage_bytes<kPlanes, kTall>();
  // A kilobyte of each block of threads is the system's.
  const bool deep = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, rows_.x.device) >=
                    2 * (kDeepPipelineBytes + 1024);
  rows.stages = std::min(kMaxStages, (deep ? kDeepPipelineBytes : kPipelineBytes) * kTall / kBytes);
  const auto kernel = tile_kernel<T, kPlanes, kTall>;
  const int bytes = rows.stages * kBytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  kernel<<<dim3(static_cast<unsigned>(tiles_), static_cast<unsigned>(splits), count_),
           tile_threads<kTall>(), static_cast<std::size_t>(bytes), stream_>>>(rows, tile_sums_);
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
  const int tall = rows.x.shape[rows.x.rank() - 1] < kTallDim ? 1 : 2;
  with_source(rows.x.dtype,
              [&](auto source) { Update<decltype(source)>(rows, sums, tall).run(max_magnitude); });
}

}  // namespace secateur::cuda
