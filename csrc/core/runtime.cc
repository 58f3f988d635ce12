#include <secateur/runtime.h>

#include "../cpu/dispatch.h"
#include "../cuda/backend.h"

// threads() and set_threads() are in parallel.cc.
namespace secateur {

std::string isa() { return cpu::kernels().isa; }

std::vector<std::string> available_isas() { return cpu::available_isas(); }

bool has_cuda() { return cuda::built(); }

std::string version() { return SECATEUR_VERSION; }

}  // namespace secateur
