// Each kernel next to what one core of this machine can do at most, measured in the same run.
#include <benchmark/benchmark.h>
#include <secateur/runtime.h>

#include <cstdio>

#include "peak.h"
#include "workloads.h"

int main(int argc, char** argv) {
  using secateur_bench::Workload;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  std::printf(
      "%s; peak of one core: %.1f GFLOP/s float64, %.1f GFLOP/s float32, memcpy %.1f GB/s\n",
      secateur::isa().c_str(), secateur_bench::peak_flops(false) * 1e-9,
      secateur_bench::peak_flops(true) * 1e-9, secateur_bench::peak_bandwidth() * 1e-9);
  for (const auto& [name, make] : secateur_bench::workloads()) {
    const Workload work = make();
    work.run();
    if (!work.correct()) {
      std::fprintf(stderr, "%s: expected the result of plain loops, got another\n", name.c_str());
      return 1;
    }
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      // Just before: the clock of a shared machine is another every minute.
      const double peak = secateur_bench::peak_flops(work.single);
      const double bandwidth = secateur_bench::peak_bandwidth();
      for (auto _ : state) work.run();
      using benchmark::Counter;
      const auto rate = [](double amount) {
        return Counter(amount, Counter::kIsIterationInvariantRate);
      };
      if (work.flops > 0) {
        state.counters["GFLOP/s"] = rate(work.flops * 1e-9);
        state.counters["of_peak"] = rate(work.flops / peak);
      }
      state.counters["GB/s"] = rate(work.bytes * 1e-9);
      state.counters["of_memcpy"] = rate(work.bytes / bandwidth);
    })->Unit(benchmark::kMicrosecond);
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
