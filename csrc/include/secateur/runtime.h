// What the library runs on.
#pragma once

#include <secateur/export.h>

#include <string>
#include <vector>

namespace secateur {

/// The instruction set of the kernels in use: "baseline", "avx2", "avx512" or "neon". Chosen once:
/// the environment variable SECATEUR_ISA, or the widest that this machine has.
/// Throws InvalidArgument when SECATEUR_ISA names none of available_isas(); so does every function
/// of the library that computes.
SECATEUR_API std::string isa();

/// What this build holds and this machine can run, narrowest first.
SECATEUR_API std::vector<std::string> available_isas();

/// Threads a call may use, the caller's included; from the start the cores this process may use.
SECATEUR_API int threads();

/// Throws InvalidArgument unless 1 <= n <= 1024. Results do not depend on it.
SECATEUR_API void set_threads(int n);

/// Calls body(data) on up to `threads` threads at once, the caller's among them, and returns when
/// all calls have. One thread is enough. `body` does not throw.
using Team = void (*)(void (*body)(void*), void* data, int threads);

/// Has the library work on a program's own threads in place of its own, which sleep between calls;
/// nullptr for its own. Worth it where those threads spin while they wait, as OpenMP's do: two
/// pools on the same cores then stand in each other's way. Results do not depend on it. A forked
/// child begins with the library's own.
SECATEUR_API void set_team(Team team);

/// What set_team() was last given in this process; nullptr from the start.
SECATEUR_API Team team();

/// Whether this build computes on CUDA devices. Where it does, AttentionScorer::update,
/// MomentAccumulator::update and compact take views of them, on the view's stream.
SECATEUR_API bool has_cuda();

/// "major.minor.patch".
SECATEUR_API std::string version();

}  // namespace secateur
