// Σ x xᵀ on tensor cores: tiles of columns over rows of 16-bit numbers, one number in up to three
// of them. For devices from compute capability 8.0 on; for .cu files alone.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "rows.h"

namespace secateur::cuda {

constexpr int kChunk = 8;  ///< elements of a 16-byte copy
constexpr int kLineBytes = 2 * kTile;
constexpr int kWarpSide = 64;  ///< a warp multiplies so many columns by so many

/// A block of threads multiplies kTall kTile columns by kTile. Taller ones read less memory for
/// their products; of others a device takes two at a time, and less lies below the diagonal.
template <int kTall>
__host__ __device__ constexpr int tile_threads() {
  return 128 * kTall;
}

/// How many 16-bit numbers add up to an element, and which of their products count.
template <int kPlanes>
struct Planes;
template <>
struct Planes<1> {
  static constexpr int kProducts = 1;
  static constexpr int kStageRows = 32;
};
/// 22 bits of an element: what is left out of a product is below 2^-22 of it.
template <>
struct Planes<2> {
  static constexpr int kProducts = 3;
  static constexpr int kStageRows = 16;
};
/// 24 bits.
template <>
struct Planes<3> {
  static constexpr int kProducts = 6;
  static constexpr int kStageRows = 16;
};

/// Planes of product number i, the smallest products first.
template <int kPlanes>
__device__ constexpr int left_plane(int i) {
  return kPlanes == 3 ? (i == 0 ? 2 : i == 2 || i == 3 ? 1 : 0) : (kPlanes == 2 && i == 0 ? 1 : 0);
}
template <int kPlanes>
__device__ constexpr int right_plane(int i) {
  return kPlanes == 3 ? (i == 1 ? 2 : i == 2 || i == 4 ? 1 : 0) : (kPlanes == 2 && i == 1 ? 1 : 0);
}

constexpr int kMaxStages = 6;
template <int kPlanes, int kTall>
__host__ __device__ constexpr int stage_bytes() {
  return (kTall + 1) * kPlanes * Planes<kPlanes>::kStageRows * kLineBytes;
}

/// Rows to multiply. Sums s has `splits` parts of `rows` rows each, from number `first` on.
struct TileRows {
  const uint16_t* data;
  const int64_t*
      offsets;    ///< (sums, all splits, rows); null: packed, a split of sums after another
  int64_t pitch;  ///< of packed rows
  int64_t plane;  ///< from an element's first number to its next
  int64_t count;  ///< rows of a sums; those that fill up its last split are not there
  int width;      ///< columns that memory holds
  int rows, first, all;
  int stages;  ///< that shared memory holds, 2 to kMaxStages
};

/// What a launch leaves.
struct TileSums {
  float* products;    ///< (sums, tiles, all splits, kTall kTile, kTile)
  float* columns;     ///< (sums, all splits, tile columns)
  Verdict* verdicts;  ///< (sums)
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

/// Copies `bytes` of 16, and zeros behind them.
__device__ inline void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}
__device__ inline void await_copies(int pending) {
  if (pending >= 4) {
    await_copies<4>();
  } else if (pending == 3) {
    await_copies<3>();
  } else if (pending == 2) {
    await_copies<2>();
  } else if (pending == 1) {
    await_copies<1>();
  } else {
    await_copies<0>();
  }
}

/// Four 8x8 matrices, transposed.
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

/// sum = to + a b, which may be the same.
template <typename T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1, const float (&to)[4]);
template <>
__device__ inline void multiply_add<BFloat>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, const float (&to)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};\n"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(to[0]), "f"(to[1]),
        "f"(to[2]), "f"(to[3]));
}
template <>
__device__ inline void multiply_add<Half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1, const float (&to)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};\n"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(to[0]), "f"(to[1]),
        "f"(to[2]), "f"(to[3]));
}

__device__ inline float2 two_floats(BFloat, uint32_t bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ inline float2 two_floats(Half, uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

/// Tile `index` of one split of sums `s`: products of its columns, and beside the diagonal their
/// sums.
template <typename T, int kPlanes, int kTall>
__device__ inline void multiply_tile(const TileRows& rows, const TileSums& sums, int index,
                                     int split, int s, unsigned char* shared) {
  constexpr int kThreads = tile_threads<kTall>();
  constexpr int kStageRows = Planes<kPlanes>::kStageRows;
  constexpr int kStageBytes = stage_bytes<kPlanes, kTall>();
  constexpr int kPanelBytes = kStageRows * kLineBytes;  // kTile columns of a plane
  constexpr int kLineCopies = kTile / kChunk;
  constexpr int kCopyRows = kThreads / kLineCopies;  // a thread copies every so many rows
  constexpr int kCopies = kStageRows / kCopyRows;
  constexpr int kSteps = kStageRows / 16;
  static_assert(kCopies >= 1 && kCopyRows % 8 == 0 && kSteps * kPlanes <= 3, "see copy");

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int side = tiles_of(rows.width);
  int band = 0, right = 0;
  tile_of(index, side, kTall, &band, &right);
  // Beside the diagonal the right columns are among the left ones.
  const int among = right - band * kTall;
  const bool diagonal = among < kTall;
  const int panels = diagonal ? among + 1 : kTall + 1;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));

  const int64_t begin = static_cast<int64_t>(rows.first + split) * rows.rows;
  const int64_t rest = rows.count - begin;
  const int here = rest < rows.rows ? (rest > 0 ? static_cast<int>(rest) : 0) : rows.rows;
  const int steps = (here + kStageRows - 1) / kStageRows;
  const uint32_t ring = static_cast<uint32_t>(rows.stages * kStageBytes);

  // Copies. A line's 16-byte chunks change places with the row, so that eight rows of the same
  // columns lie in different banks.
  const int chunk = thread % kLineCopies, copy_row = thread / kLineCopies;
  const int left_column = band * kTall * kTile + chunk * kChunk;
  const uint16_t* data = rows.data + left_column;
  const int left_bytes = 2 * (rows.width - left_column);  // and behind them zeros
  const uint32_t copy_to =
      base + static_cast<uint32_t>(copy_row * kLineBytes + (chunk ^ (copy_row % 8)) * 16);
  const int64_t* list =
      rows.offsets == nullptr
          ? nullptr
          : rows.offsets + static_cast<int64_t>(s) * rows.all * rows.rows + begin + copy_row;
  int64_t packed =
      ((static_cast<int64_t>(s) * static_cast<int64_t>(gridDim.y) + split) * rows.rows + copy_row) *
      rows.pitch;
  int64_t next[kCopies];
  // Of a stage after another.
  const auto look_up = [&](int step) {
    if (step >= steps) return;
    if (list != nullptr) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) next[i] = list[i * kCopyRows];
      list += kStageRows;
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        next[i] = packed;
        packed += kCopyRows * rows.pitch;
      }
    }
  };
  uint32_t fill = 0;
  const auto copy = [&](int step) {
    if (step < steps) {
      const uint32_t stage = copy_to + fill;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool there = next[i] != kNoRow;
        const uint16_t* row = data + (there ? next[i] : 0);
        const int row_bytes = there ? left_bytes : 0;
#pragma unroll
        for (int q = 0; q <= kTall; ++q) {
          if (q >= panels) continue;
          // Where there are no bytes, memory is not read.
          const int column = (q < kTall ? q : among) * kTile;
          const int bytes = larger(0, smaller(2 * kChunk, row_bytes - 2 * column));
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) {
            copy_async(stage + static_cast<uint32_t>((q * kPlanes + p) * kPanelBytes +
                                                     i * kCopyRows * kLineBytes),
                       row + p * rows.plane + column, bytes);
          }
        }
      }
      fill += kStageBytes;
      if (fill == ring) fill = 0;
      look_up(step + 1);
    }
    commit_copies();  // also of nothing: groups are counted
  };

  // Fragments: the same matrices of eight rows by eight columns, transposed, for both factors.
  // Warps one below the other are neighbours, so that those that idle leave no scheduler alone.
  const int down = warp / 2 * kWarpSide, across = warp % 2 * kWarpSide;
  const int top = band * kTall * kTile + down, start = right * kTile + across;
  const bool idle = top >= start + kWarpSide || top >= rows.width || start >= rows.width;
  const int matrix = lane / 8, line = lane % 8;
  const int right_panel = diagonal ? among : kTall;
  const uint32_t left_from =
      base + static_cast<uint32_t>(down / kTile * kPlanes * kPanelBytes + down % kTile * 2 +
                                   (line + matrix / 2 * 8) * kLineBytes);
  const uint32_t right_from =
      base + static_cast<uint32_t>(right_panel * kPlanes * kPanelBytes + across * 2 +
                                   (line + matrix % 2 * 8) * kLineBytes);
  const int left_chunk = (matrix % 2) ^ line, right_chunk = (matrix / 2) ^ line;
  constexpr int kFragments = kSteps * kPlanes;
  constexpr auto at = [](int f) {  // fragment f = step kPlanes + plane
    return static_cast<uint32_t>(f % kPlanes * kPanelBytes + f / kPlanes * 16 * kLineBytes);
  };
  float total[4][8][4] = {};
  float2 column_sum = {0, 0};
  const int column_pair = thread % (kTile / 2), column_part = thread / (kTile / 2);

  look_up(0);
  for (int step = 0; step < rows.stages - 1; ++step) copy(step);
  uint32_t use = 0;
  for (int step = 0; step < steps; ++step) {
    await_copies(rows.stages - 2);
    __syncthreads();
    copy(step + rows.stages - 1);
    if (!idle) {
      uint32_t a[kFragments][4][4], b[2][kFragments][4];
      const auto load_right = [&](int j) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          load_transposed(b[j % 2][f], right_from + use + at(f) +
                                           static_cast<uint32_t>(((2 * j) ^ right_chunk) * 16));
        }
      };
      load_right(0);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          load_transposed(a[f][i], left_from + use + at(f) +
                                       static_cast<uint32_t>(((2 * i) ^ left_chunk) * 16));
        }
      }
      // Tensor cores cut off what does not fit beside the largest of a sum. So they add up no more
      // than a stage, and that is added, rounded, to what came before.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < 3) load_right(j + 1);
        float part[4][2][4];
#pragma unroll
        for (int m = 0; m < kSteps * Planes<kPlanes>::kProducts; ++m) {
          const int product = m % Planes<kPlanes>::kProducts;
          const int k = m / Planes<kPlanes>::kProducts * kPlanes;
          const int p = k + left_plane<kPlanes>(product), q = k + right_plane<kPlanes>(product);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint32_t b0 = b[j % 2][q][2 * h], b1 = b[j % 2][q][2 * h + 1];
              if (m == 0) {
                multiply_add<T>(part[i][h], a[p][i], b0, b1, {0, 0, 0, 0});
              } else {
                multiply_add<T>(part[i][h], a[p][i], b0, b1, part[i][h]);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < 8; ++e) total[i][2 * j + e / 4][e % 4] += part[i][e / 4][e % 4];
        }
      }
    }
    if (diagonal) {
      constexpr int kPart = kStageRows / (kThreads / (kTile / 2));
      float2 stage_sum = {0, 0};
#pragma unroll 4
      for (int i = 0; i < kPart; ++i) {
        const int row = column_part * kPart + i;
        const unsigned char* from = shared + use + right_panel * kPlanes * kPanelBytes +
                                    row * kLineBytes + ((column_pair / 4) ^ (row % 8)) * 16 +
                                    column_pair % 4 * 4;
        const auto plane = [&](int p) {
          return two_floats(T{}, *reinterpret_cast<const uint32_t*>(from + p * kPanelBytes));
        };
        float2 value = plane(kPlanes - 1);
#pragma unroll
        for (int p = kPlanes - 2; p >= 0; --p) {
          const float2 one = plane(p);
          value.x += one.x;
          value.y += one.y;
        }
        stage_sum.x += value.x;
        stage_sum.y += value.y;
      }
      column_sum.x += stage_sum.x;
      column_sum.y += stage_sum.y;
    }
    use += kStageBytes;
    if (use == ring) use = 0;
  }

  const int number = rows.first + split;
  if (!idle) {
    float* out =
        sums.products +
        ((static_cast<int64_t>(s) * gridDim.x + index) * rows.all + number) * kTall * kTile * kTile;
    bool faulty = false, fits = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = 16 * i + 8 * half + lane / 4, c = 8 * j + lane % 4 * 2;
          const float2 two = {total[i][j][2 * half], total[i][j][2 * half + 1]};
          *reinterpret_cast<float2*>(out + (down + r) * kTile + across + c) = two;
          if (top != start || (r != c && r != c + 1)) continue;
          const float square = r == c ? two.x : two.y;
          faulty = faulty || !(square < kHighSquare);
          fits = fits || square >= kLowSquare;
        }
      }
    }
    // All that write write the same.
    if (faulty) sums.verdicts[s].faulty = 1;
    if (fits) sums.verdicts[s].fits = 1;
  }
  if (!diagonal) return;
  auto* columns = reinterpret_cast<float*>(shared);
  __syncthreads();
  columns[column_part * kTile + 2 * column_pair] = column_sum.x;
  columns[column_part * kTile + 2 * column_pair + 1] = column_sum.y;
  __syncthreads();
  if (thread >= kTile) return;
  float sum = 0;
  for (int i = 0; i < kThreads / (kTile / 2); ++i) sum += columns[i * kTile + thread];
  sums.columns[((static_cast<int64_t>(s) * rows.all + number) * side + right) * kTile + thread] =
      sum;
}

#endif  // __CUDA_ARCH__ >= 800

}  // namespace secateur::cuda
