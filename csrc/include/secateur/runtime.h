// Instruction sets, threads and devices of the library.
#pragma once

#include <secateur/export.h>

#include <string>
#include <vector>

namespace secateur {

/// The instruction set of the kernels in use: "baseline", "avx2", "avx512" or "neon". Chosen once:
/// by the environment variable SECATEUR_ISA, or else the widest that this machine has. Throws
/// InvalidArgument if SECATEUR_ISA is not one of available_isas(); so does every function of the
/// library that computes.
SECATEUR_API std::string isa();

/// The instruction sets that this build contains and this machine can run, narrowest first.
SECATEUR_API std::vector<std::string> available_isas();

/// Number of threads a call may use, including the caller's; by default the number of cores this
/// process may use.
SECATEUR_API int threads();

/// Throws InvalidArgument unless 1 <= n <= 1024. Results do not depend on it.
SECATEUR_API void set_threads(int n);

/// Calls body(data) on up to `threads` threads at once, including the caller's, and returns when
/// all calls have returned. One thread is enough. `body` does not throw.
using Team = void (*)(void (*body)(void*), void* data, int threads);

/// Makes the library use a program's threads instead of its own, which sleep between calls; nullptr
/// for its own. This helps if the program's threads spin while they wait, as OpenMP's do, because
/// two pools on the same cores then slow each other down. Results do not depend on it. A forked
/// child starts with the library's own threads.
SECATEUR_API void set_team(Team team);

/// The last argument of set_team() in this process; nullptr before the first call.
SECATEUR_API Team team();

/// Whether this build computes on CUDA devices. If it does, AttentionScorer::update,
/// MomentAccumulator::update and compact take views of them, on the view's stream.
SECATEUR_API bool has_cuda();

/// "major.minor.patch".
SECATEUR_API std::string version();

}  // namespace secateur
