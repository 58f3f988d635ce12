// Prints the instruction set in use, or why there is none.
#include <secateur/error.h>
#include <secateur/runtime.h>

#include <cstdio>

int main() {
  try {
    std::puts(secateur::isa().c_str());
  } catch (const secateur::InvalidArgument& error) {
    std::puts(error.what());
  }
  return 0;
}
