// Runs one workload; instructions.py has callgrind count what happens inside secateur_counted.
#include <secateur/error.h>

#include <cstdio>
#include <cstring>

#include "workloads.h"

extern "C" __attribute__((noinline)) void secateur_counted(const secateur_bench::Workload& work) {
  work.run();
}

int main(int argc, char** argv) {
  try {
    for (const auto& work : secateur_bench::workloads()) {
      if (argc == 1) std::puts(work.name.c_str());
      if (argc != 2 || work.name != argv[1]) continue;
      work.run();  // what happens only once is not counted
      secateur_counted(work);
      return work.correct() ? 0 : 1;
    }
  } catch (const secateur::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  if (argc == 1) return 0;
  std::fprintf(stderr, "workload: expected a name that is listed without arguments, got '%s'\n",
               argv[1]);
  return 2;
}
