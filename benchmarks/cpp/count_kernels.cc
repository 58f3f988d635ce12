// Runs one workload; instructions.py has callgrind count what happens inside secateur_counted.
#include <secateur/error.h>

#include <cstdio>
#include <string>

#include "workloads.h"

extern "C" __attribute__((noinline)) void secateur_counted(const secateur_bench::Workload& work) {
  work.run();
}

int main(int argc, char** argv) {
  const std::string wanted = argc == 2 ? argv[1] : "";
  try {
    if (wanted == "--compiler") {
      std::puts(__VERSION__);
      return 0;
    }
    for (const auto& [name, make] : secateur_bench::workloads()) {
      if (wanted == "--list") std::puts(name.c_str());
      if (wanted != name) continue;
      const secateur_bench::Workload work = make();
      work.run();  // what happens only once is not counted
      secateur_counted(work);
      return 0;
    }
  } catch (const secateur::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  if (wanted == "--list") return 0;
  std::fprintf(stderr, "workload: expected --compiler, --list or a name of the list, got '%s'\n",
               wanted.c_str());
  return 2;
}
