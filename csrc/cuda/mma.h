// Σ x xᵀ on tensor cores: tiles of columns over rows of 16-bit numbers, one number in up to three
// of them. For devices from compute capability 8.0 on; for .cu files alone.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "rows.h"

namespace secateur::cuda {

constexpr int kTileThreads = 256;  ///< 2 by 4 warps, each of 64 by 32 products
constexpr int kChunk = 8;          ///< elements of a 16-byte copy
constexpr int kLineBytes = 2 * kTile;

/// How many 16-bit numbers add up to an element, and which of their products count.
template <int kPlanes>
struct Planes;
template <>
struct Planes<1> {
  static constexpr int kProducts = 1;
  static constexpr int kStageRows = 64;
};
/// 22 bits of an element: what is left out of a product is below 2^-22 of it.
template <>
struct Planes<2> {
  static constexpr int kProducts = 3;
  static constexpr int kStageRows = 32;
};
/// 24 bits.
template <>
struct Planes<3> {
  static constexpr int kProducts = 6;
  static constexpr int kStageRows = 32;
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

/// Stages of a pipeline that take no more than the 99 KiB of the smaller devices.
constexpr int kPipelineBytes = 96 * 1024;
template <int kPlanes>
__host__ __device__ constexpr int stage_bytes() {
  return 2 * kPlanes * Planes<kPlanes>::kStageRows * kLineBytes;
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
};

/// What a launch leaves.
struct TileSums {
  float* products;    ///< (sums, tiles, all splits, kTile, kTile)
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

/// Four 8x8 matrices, transposed.
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

template <typename T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
__device__ inline void multiply_add<BFloat>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<Half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float2 two_floats(BFloat, uint32_t bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ inline float2 two_floats(Half, uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// Tensor cores cut off what does not fit beside the largest of a sum. So their sums are added,
// rounded, to others before many rows have come; products of bfloat16 are short and fit longest.
template <typename T, int kPlanes>
__device__ constexpr int flush_rows() {
  return kPlanes > 1 ? 32 : 64;
}
template <>
__device__ constexpr int flush_rows<BFloat, 1>() {
  return 128;
}

/// Tile `index` of one split of sums `s`: products of its columns, and on the diagonal their sums.
template <typename T, int kPlanes>
__device__ inline void multiply_tile(const TileRows& rows, const TileSums& sums, int index,
                                     int split, int s, unsigned char* shared) {
  constexpr int kStageRows = Planes<kPlanes>::kStageRows;
  constexpr int kStages = kPipelineBytes / stage_bytes<kPlanes>();
  constexpr int kPlaneBytes = kStageRows * kLineBytes;
  constexpr int kLineCopies = kTile / kChunk;
  constexpr int kCopyRows = kTileThreads / kLineCopies;  // a thread copies every so many rows
  constexpr int kCopies = kStageRows / kCopyRows;
  constexpr int kFlush = flush_rows<T, kPlanes>() / kStageRows;
  static_assert(kStages >= 2 && kFlush >= 1 && kCopyRows % 8 == 0, "see copy and multiply");

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int side = tiles_of(rows.width);
  int left = 0, right = 0;
  square_of(index, side, &left, &right);
  const bool diagonal = left == right;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));

  const int64_t begin = static_cast<int64_t>(rows.first + split) * rows.rows;
  const int64_t rest = rows.count - begin;
  const int here = rest < rows.rows ? (rest > 0 ? static_cast<int>(rest) : 0) : rows.rows;
  const int steps = (here + kStageRows - 1) / kStageRows;

  // Copies. A line's 16-byte chunks change places with the row, so that eight rows of the same
  // columns lie in different banks.
  const int chunk = thread % kLineCopies, copy_row = thread / kLineCopies;
  const int left_column = left * kTile + chunk * kChunk;
  const int right_column = right * kTile + chunk * kChunk;
  const int left_bytes = 2 * larger(0, smaller(kChunk, rows.width - left_column));
  const int right_bytes = 2 * larger(0, smaller(kChunk, rows.width - right_column));
  const uint32_t copy_to =
      base + static_cast<uint32_t>(copy_row * kLineBytes + (chunk ^ (copy_row % 8)) * 16);
  const int64_t* list =
      rows.offsets == nullptr
          ? nullptr
          : rows.offsets + static_cast<int64_t>(s) * rows.all * rows.rows + begin + copy_row;
  const int64_t packed =
      (static_cast<int64_t>(s) * static_cast<int64_t>(gridDim.y) + split) * rows.rows + copy_row;
  int64_t next[kCopies];
  const auto look_up = [&](int step) {
    if (step >= steps) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t row = static_cast<int64_t>(step) * kStageRows + i * kCopyRows;
      next[i] = list != nullptr ? list[row] : (packed + row) * rows.pitch;
    }
  };
  const auto copy = [&](int step) {
    if (step < steps) {
      const uint32_t stage =
          copy_to + static_cast<uint32_t>(step % kStages * stage_bytes<kPlanes>());
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool there = next[i] != kNoRow;
        const uint16_t* row = rows.data + (there ? next[i] : 0);
        const int left_size = there ? left_bytes : 0, right_size = there ? right_bytes : 0;
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          const uint32_t to = stage + static_cast<uint32_t>(i * kCopyRows * kLineBytes);
          const uint16_t* from = row + p * rows.plane;
          copy_async(to + static_cast<uint32_t>(p * kPlaneBytes),
                     left_size > 0 ? from + left_column : rows.data, left_size);
          if (diagonal) continue;
          copy_async(to + static_cast<uint32_t>((kPlanes + p) * kPlaneBytes),
                     right_size > 0 ? from + right_column : rows.data, right_size);
        }
      }
      look_up(step + 1);
    }
    commit_copies();  // also of nothing: groups are counted
  };

  // Fragments: the same matrices of eight rows by eight columns, transposed, for both factors.
  const int down = warp / 4 * 64, across = warp % 4 * 32;
  const int matrix = lane / 8, line = lane % 8;
  const uint32_t left_from = static_cast<uint32_t>((line + matrix / 2 * 8) * kLineBytes);
  const uint32_t right_from = static_cast<uint32_t>((line + matrix % 2 * 8) * kLineBytes);
  float total[4][4][4] = {}, part[4][4][4] = {};
  float2 column = {0, 0};
  const int column_pair = thread % (kTile / 2), column_part = thread / (kTile / 2);

  look_up(0);
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    await_copies<kStages - 2>();
    __syncthreads();
    copy(step + kStages - 1);
    const uint32_t stage = static_cast<uint32_t>(step % kStages * stage_bytes<kPlanes>());
    const uint32_t left_stage = base + stage;
    const uint32_t right_stage =
        left_stage + static_cast<uint32_t>(diagonal ? 0 : kPlanes * kPlaneBytes);
#pragma unroll
    for (int k = 0; k < kStageRows / 16; ++k) {
      uint32_t a[kPlanes][4][4], b[kPlanes][2][4];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const uint32_t at = static_cast<uint32_t>(p * kPlaneBytes + k * 16 * kLineBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int where = (down / 8 + 2 * i + matrix % 2) ^ line;
          load_transposed(a[p][i], left_stage + at + left_from + static_cast<uint32_t>(where * 16));
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int where = (across / 8 + 2 * j + matrix / 2) ^ line;
          load_transposed(b[p][j],
                          right_stage + at + right_from + static_cast<uint32_t>(where * 16));
        }
      }
#pragma unroll
      for (int product = 0; product < Planes<kPlanes>::kProducts; ++product) {
        const int p = left_plane<kPlanes>(product), q = right_plane<kPlanes>(product);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply_add<T>(part[i][j], a[p][i], b[q][j / 2][j % 2 * 2],
                            b[q][j / 2][j % 2 * 2 + 1]);
          }
        }
      }
    }
    if (diagonal) {
      constexpr int kPart = kStageRows / (kTileThreads / (kTile / 2));
#pragma unroll 4
      for (int i = 0; i < kPart; ++i) {
        const int row = column_part * kPart + i;
        const unsigned char* at = shared + stage + row * kLineBytes +
                                  ((column_pair / 4) ^ (row % 8)) * 16 + column_pair % 4 * 4;
        float2 value = {0, 0};
#pragma unroll
        for (int p = kPlanes - 1; p >= 0; --p) {
          const float2 one =
              two_floats(T{}, *reinterpret_cast<const uint32_t*>(at + p * kPlaneBytes));
          value.x += one.x;
          value.y += one.y;
        }
        column.x += value.x;
        column.y += value.y;
      }
    }
    if ((step + 1) % kFlush != 0 && step + 1 != steps) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[i][j][e] += part[i][j][e];
          part[i][j][e] = 0;
        }
      }
    }
  }

  const int number = rows.first + split;
  float* out = sums.products +
               ((static_cast<int64_t>(s) * gridDim.x + index) * rows.all + number) * kTile * kTile;
  bool faulty = false, fits = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = down + 16 * i + 8 * half + lane / 4, c = across + 8 * j + lane % 4 * 2;
        const float2 two = {total[i][j][2 * half], total[i][j][2 * half + 1]};
        *reinterpret_cast<float2*>(out + r * kTile + c) = two;
        if (!diagonal || (r != c && r != c + 1)) continue;
        const float square = r == c ? two.x : two.y;
        faulty = faulty || !(square < kHighSquare);
        fits = fits || square >= kLowSquare;
      }
    }
  }
  if (!diagonal) return;
  // All that write write the same.
  if (faulty) sums.verdicts[s].faulty = 1;
  if (fits) sums.verdicts[s].fits = 1;
  auto* columns = reinterpret_cast<float*>(shared);
  __syncthreads();
  columns[column_part * kTile + 2 * column_pair] = column.x;
  columns[column_part * kTile + 2 * column_pair + 1] = column.y;
  __syncthreads();
  if (thread >= kTile) return;
  float sum = 0;
  for (int i = 0; i < kTileThreads / (kTile / 2); ++i) sum += columns[i * kTile + thread];
  sums.columns[((static_cast<int64_t>(s) * rows.all + number) * side + left) * kTile + thread] =
      sum;
}

#endif  // __CUDA_ARCH__ >= 800

}  // namespace secateur::cuda
