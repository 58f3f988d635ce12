// Where elements of strided views lie, for kernels that go over them in row-major order.
#pragma once

#include "block.h"

namespace secateur::cuda {
inline namespace SECATEUR_SIDE {

constexpr int kAxes = 8;  // secateur::kMaxRank

/// Shape and strides as a kernel's argument.
struct Layout {
  int rank;
  int64_t shape[kAxes];
  int64_t strides[kAxes];
};

/// In elements, of a row-major index.
SECATEUR_DEVICE inline int64_t offset_of(const Layout& layout, int64_t index) {
  int64_t offset = 0;
  for (int axis = layout.rank - 1; axis >= 0; --axis) {
    offset += index % layout.shape[axis] * layout.strides[axis];
    index /= layout.shape[axis];
  }
  return offset;
}

/// A move of kept slices towards the front: (kept, outer, inner) elements, the axis first in
/// strided memory and between outer and inner axes where the result is packed. In that order every
/// element moves from a place that no earlier one moves to.
struct Moves {
  bool packed;
  int64_t kept, size;    ///< of the axis, afterwards and before
  int64_t outer, inner;  ///< packed: elements around the axis
  int64_t step;          ///< strided: of the axis
  Layout lines;          ///< strided: the other axes
  const int64_t* keep;
};

SECATEUR_DEVICE inline void move_of(const Moves& moves, int64_t index, int64_t* from, int64_t* to) {
  if (moves.packed) {
    const int64_t inner = index % moves.inner, slice = index / moves.inner;
    const int64_t kept = slice % moves.kept, outer = slice / moves.kept;
    *from = (outer * moves.size + moves.keep[kept]) * moves.inner + inner;
    *to = index;
    return;
  }
  const int64_t lines = moves.outer * moves.inner;
  const int64_t kept = index / lines, base = offset_of(moves.lines, index % lines);
  *from = base + moves.keep[kept] * moves.step;
  *to = base + kept * moves.step;
}

}  // namespace SECATEUR_SIDE
}  // namespace secateur::cuda
