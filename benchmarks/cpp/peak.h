// What one core of this machine can do at most.
#pragma once

namespace secateur_bench {

/// Multiply-adds from registers to registers in vectors as wide as the machine has, in flop/s: what
/// a matrix product of ideal blocking would reach. The best of several short runs.
double peak_flops(bool single);

/// Bytes a second that memcpy reads and writes, of blocks far beyond the caches.
double peak_bandwidth();

}  // namespace secateur_bench
