// Scaling by powers of two, which changes no mantissa.
#pragma once

#include <algorithm>
#include <cmath>

namespace secateur {

/// Brings a largest magnitude into [1, 2), so that neither squares nor fourth powers overflow; 1
/// for zero. Below 2^-1000 it stops short, where the factor itself would overflow.
inline double normalising_factor(double peak) {
  return peak > 0 ? std::ldexp(1.0, -std::max(std::ilogb(peak), -1000)) : 1.0;
}

}  // namespace secateur
