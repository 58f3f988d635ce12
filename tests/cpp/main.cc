#include <gtest/gtest.h>
#include <secateur/runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (const char* wanted = std::getenv("SECATEUR_ISA")) {
    const auto isas = secateur::available_isas();
    if (std::find(isas.begin(), isas.end(), wanted) == isas.end()) {
      std::printf("%s: not on this machine\n", wanted);
      return 77;
    }
  }
  return RUN_ALL_TESTS();
}
