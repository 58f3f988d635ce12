#include <secateur/runtime.h>

#include "../cpu/dispatch.h"

// threads() and set_threads() are in parallel.cc.
namespace secateur {

std::string isa() { return cpu::kernels().isa; }

std::vector<std::string> available_isas() { return cpu::available_isas(); }

std::string version() { return SECATEUR_VERSION; }

}  // namespace secateur
