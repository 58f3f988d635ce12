#include "workloads.h"

#include <secateur/secateur.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "core/buffer.h"
#include "cpu/dispatch.h"

namespace secateur_bench {
namespace {

using namespace secateur;

constexpr std::size_t kTokens = 197, kHeads = 8, kHeadDim = 64, kGamma = 8, kFfn = 1536;

template <typename T>
std::shared_ptr<std::vector<T>> normal(std::size_t size, unsigned seed) {
  auto values = std::make_shared<std::vector<T>>(size);
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution;
  for (T& value : *values) value = static_cast<T>(distribution(generator));
  return values;
}

bool close(double x, double y, double tolerance) { return std::fabs(x - y) <= tolerance; }

// Σ_r a[r, i] b[r, j]
template <typename T>
double product(const T* a, const T* b, std::size_t rows, std::size_t step) {
  double sum = 0;
  for (std::size_t r = 0; r < rows; ++r) sum += static_cast<double>(a[r * step]) * b[r * step];
  return sum;
}

template <typename T, typename Tile>
Workload tile(const char* name, Tile kernel, std::size_t panel) {
  const auto a = normal<T>(cpu::kRows * panel, 1), b = normal<T>(cpu::kRows * panel, 2);
  const auto c = std::make_shared<std::vector<double>>(panel * panel);
  Workload work;
  work.name = name;
  work.flops = 2.0 * cpu::kRows * static_cast<double>(panel * panel);
  work.bytes = 2.0 * sizeof(T) * static_cast<double>(cpu::kRows * panel);
  work.single = sizeof(T) == 4;
  work.run = [=] {
    std::fill(c->begin(), c->end(), 0.0);
    kernel(a->data(), b->data(), cpu::kRows, c->data(), panel);
  };
  work.correct = [=] {
    bool good = true;
    for (std::size_t i = 0; i < panel; ++i) {
      for (std::size_t j = 0; j < panel; ++j) {
        const double wanted = product(a->data() + i, b->data() + j, cpu::kRows, panel);
        good = good && close((*c)[i * panel + j], wanted, sizeof(T) == 4 ? 1e-3 : 1e-10);
      }
    }
    return good;
  };
  return work;
}

Workload pack() {
  const auto source = normal<float>(kTokens * 3 * kHeads * kHeadDim, 3);
  const auto panel = std::make_shared<std::vector<double>>(kTokens * cpu::kPanelF64);
  const auto rows = std::make_shared<std::vector<std::int64_t>>();
  for (std::size_t n = 0; n < kTokens; ++n) {
    rows->push_back(static_cast<std::int64_t>(n * 3 * kHeads * kHeadDim));
  }
  Workload work;
  work.name = "pack float32 into float64";
  work.bytes = static_cast<double>(kTokens * cpu::kPanelF64 * (sizeof(float) + sizeof(double)));
  work.run = [=] {
    cpu::kernels().panel.pack_f64[static_cast<std::size_t>(DType::f32)](
        source->data(), rows->data(), kTokens, nullptr, cpu::kPanelF64, panel->data());
  };
  work.correct = [=] {
    bool good = true;
    for (std::size_t n = 0; n < kTokens; ++n) {
      for (std::size_t c = 0; c < cpu::kPanelF64; ++c) {
        const auto at = static_cast<std::size_t>((*rows)[n]) + c;
        good = good && (*panel)[n * cpu::kPanelF64 + c] == static_cast<double>((*source)[at]);
      }
    }
    return good;
  };
  return work;
}

// The factor, the congruence, the tridiagonal form; γ vectors brought back and multiplied.
double omega_flops(double d) {
  return d * d * d * (1.0 / 3 + 1 + 1.0 / 3 + 4.0 / 3) + static_cast<double>(kGamma) * 5 * d * d;
}

// q and k of one image, interleaved as in a fused qkv.
struct QueriesAndKeys {
  std::shared_ptr<std::vector<float>> memory = normal<float>(2 * kTokens * kHeads * kHeadDim, 4);

  TensorView view(std::size_t which) const {
    TensorView result(memory->data() + which * kHeads * kHeadDim, DType::f32,
                      {1, kTokens, kHeads, kHeadDim});
    result.strides[0] = 2 * kTokens * kHeads * kHeadDim;
    result.strides[1] = 2 * kHeads * kHeadDim;
    return result;
  }

  // (heads, tokens, head_dim)
  double at(std::size_t which, std::size_t h, std::size_t n, std::size_t i) const {
    return static_cast<double>((*memory)[(n * 2 + which) * kHeads * kHeadDim + h * kHeadDim + i]);
  }

  /// The Gram matrix of a head, in plain loops.
  std::vector<double> gram(std::size_t which, std::size_t h) const {
    std::vector<double> result(kHeadDim * kHeadDim);
    for (std::size_t n = 0; n < kTokens; ++n) {
      for (std::size_t i = 0; i < kHeadDim; ++i) {
        for (std::size_t j = 0; j < kHeadDim; ++j) {
          result[i * kHeadDim + j] += at(which, h, n, i) * at(which, h, n, j);
        }
      }
    }
    return result;
  }
};

// ω of one head by the kernel for one matrix, which shares no code with the lanes.
std::vector<double> omega_alone(const QueriesAndKeys& data, std::size_t h) {
  std::vector<double> q = data.gram(0, h), k = data.gram(1, h), out(kHeadDim);
  Buffer<double> work(cpu::score_workspace(kHeadDim));
  cpu::kernels().score.omega(kHeadDim, kHeadDim, kGamma, q.data(), k.data(), work.data(),
                             out.data());
  return out;
}

// Σ_i ω_i² for the head's scores is not known in advance, but Q Kᵀ's definition is: by power
// iteration the leading triplet, and with γ = 1 the scores are |cos(u, q_i)| |cos(v, k_i)|.
bool leading_triplet_agrees(const QueriesAndKeys& data, std::size_t h,
                            const std::vector<double>& scores) {
  std::vector<double> u(kTokens, 1.0), v(kTokens);
  const auto normalise = [](std::vector<double>& x) {
    const double norm = std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
    for (double& value : x) value /= norm;
  };
  const auto apply = [&](std::size_t from, const std::vector<double>& x, std::vector<double>& y) {
    std::vector<double> middle(kHeadDim, 0.0);
    for (std::size_t n = 0; n < kTokens; ++n) {
      for (std::size_t i = 0; i < kHeadDim; ++i) middle[i] += data.at(from, h, n, i) * x[n];
    }
    for (std::size_t n = 0; n < kTokens; ++n) {
      y[n] = 0;
      for (std::size_t i = 0; i < kHeadDim; ++i) y[n] += data.at(1 - from, h, n, i) * middle[i];
    }
    normalise(y);
  };
  for (int i = 0; i < 2000; ++i) {
    apply(0, u, v);
    apply(1, v, u);
  }
  bool good = true;
  for (std::size_t i = 0; i < kHeadDim; ++i) {
    double left = 0, right = 0, q = 0, k = 0;
    for (std::size_t n = 0; n < kTokens; ++n) {
      left += u[n] * data.at(0, h, n, i);
      right += v[n] * data.at(1, h, n, i);
      q += data.at(0, h, n, i) * data.at(0, h, n, i);
      k += data.at(1, h, n, i) * data.at(1, h, n, i);
    }
    good = good && close(scores[i], std::fabs(left * right) / std::sqrt(q * k), 1e-6);
  }
  return good;
}

Workload score() {
  const QueriesAndKeys data;
  const auto scores = std::make_shared<std::vector<double>>();
  Workload work;
  work.name = "AttentionScorer::update, 8 heads";
  const auto d = static_cast<double>(kHeadDim);
  work.flops = kHeads * (2.0 * kTokens * d * (d + 1) + omega_flops(d));
  work.bytes = 2.0 * kTokens * kHeads * kHeadDim * sizeof(float);
  work.run = [=] {
    AttentionScorer scorer(kHeads, kHeadDim, kGamma);
    scorer.update(data.view(0), data.view(1));
    *scores = scorer.scores();
  };
  work.correct = [=] {
    bool good = true;
    for (std::size_t h = 0; h < kHeads; ++h) {
      const std::vector<double> wanted = omega_alone(data, h);
      for (std::size_t i = 0; i < kHeadDim; ++i) {
        good = good && close((*scores)[h * kHeadDim + i], wanted[i], 1e-9);
      }
    }
    AttentionScorer leading(kHeads, kHeadDim, 1);
    leading.update(data.view(0), data.view(1));
    const std::vector<double> all = leading.scores();
    const auto first = all.begin() + 3 * static_cast<std::ptrdiff_t>(kHeadDim);
    return good &&
           leading_triplet_agrees(data, 3, {first, first + static_cast<std::ptrdiff_t>(kHeadDim)});
  };
  return work;
}

Workload score_lanes() {
  const QueriesAndKeys data;
  const auto& kernels = cpu::kernels().score_lanes;
  const std::size_t lanes = kernels.lanes, size = cpu::lane_matrix(kHeadDim) * lanes;
  struct Memory {
    Buffer<double> q0, q, k, work, out;
  };
  const auto memory = std::make_shared<Memory>(
      Memory{Buffer<double>(size), Buffer<double>(size), Buffer<double>(size),
             Buffer<double>(lanes * cpu::score_lanes_workspace(kHeadDim)),
             Buffer<double>(kHeadDim * lanes)});
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    const std::vector<double> q = data.gram(0, lane), k = data.gram(1, lane);
    for (std::size_t i = 0; i < kHeadDim * kHeadDim; ++i) {
      const std::size_t at = i / kHeadDim * cpu::lane_stride(kHeadDim) + i % kHeadDim;
      memory->q0.data()[at * lanes + lane] = q[i];
      memory->k.data()[at * lanes + lane] = k[i];
    }
  }
  Workload work;
  work.name = "omega, " + std::to_string(lanes) + " lanes";
  work.flops = static_cast<double>(lanes) * omega_flops(kHeadDim);
  work.bytes = static_cast<double>(size * sizeof(double));
  work.run = [=, &kernels] {
    std::memcpy(memory->q.data(), memory->q0.data(), size * sizeof(double));
    kernels.omega(kHeadDim, kGamma, memory->q.data(), memory->k.data(), memory->work.data(),
                  memory->out.data());
  };
  work.correct = [=] {
    bool good = true;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const std::vector<double> wanted = omega_alone(data, lane);
      for (std::size_t i = 0; i < kHeadDim; ++i) {
        good = good && close(memory->out.data()[i * lanes + lane], wanted[i], 1e-9);
      }
    }
    return good;
  };
  return work;
}

Workload moments(const char* name, std::size_t rows, std::size_t dim, RowNorm norm, DType dtype) {
  const auto memory = normal<float>(rows * dim, 5);
  const auto exact = std::make_shared<std::vector<double>>(memory->begin(), memory->end());
  const auto sums = std::make_shared<MomentAccumulator>(static_cast<std::int64_t>(dim));
  const void* data = dtype == DType::f64 ? static_cast<const void*>(exact->data())
                                         : static_cast<const void*>(memory->data());
  const Dims shape{static_cast<std::int64_t>(rows), static_cast<std::int64_t>(dim)};
  Workload work;
  work.name = name;
  work.flops = static_cast<double>(rows * dim * (dim + 1));
  work.bytes =
      static_cast<double>(rows * dim * item_size(dtype)) + 8.0 * static_cast<double>(dim * dim);
  work.single = dtype != DType::f64;
  // Memory is kept, and the sums go on: a run is one batch of many.
  work.run = [=] {
    static_cast<void>(memory);
    static_cast<void>(exact);
    sums->update(TensorView(data, dtype, shape), {norm});
  };
  work.correct = [=] {
    MomentAccumulator once(static_cast<std::int64_t>(dim));
    once.update(TensorView(data, dtype, shape), {norm});
    std::vector<double> x = *exact;
    for (std::size_t r = 0; r < rows && norm != RowNorm::none; ++r) {
      double* row = x.data() + r * dim;
      const double mean = std::accumulate(row, row + dim, 0.0) / static_cast<double>(dim);
      double square = 0;
      for (std::size_t c = 0; c < dim; ++c) square += (row[c] - mean) * (row[c] - mean);
      for (std::size_t c = 0; c < dim; ++c) {
        row[c] = (row[c] - mean) * std::sqrt(static_cast<double>(dim) / square);
      }
    }
    const std::vector<double> mine = once.second_moment();
    bool good = true;
    for (std::size_t i = 0; i < dim; i += 37) {
      for (std::size_t j = 0; j < dim; j += 41) {
        const double wanted = product(x.data() + i, x.data() + j, rows, dim);
        good = good && close(mine[i * dim + j], wanted, work.single ? 5e-3 : 1e-9);
      }
    }
    return good;
  };
  return work;
}

Workload similarity() {
  constexpr std::size_t kRows = 384, kWidth = 384;
  const auto weights = normal<float>(kRows * kWidth, 6);
  const auto scores = std::make_shared<std::vector<double>>();
  Workload work;
  work.name = "value_similarity, 384 rows of 384";
  work.flops = static_cast<double>(kRows * (kRows + 1) * kWidth);
  work.bytes = static_cast<double>(kRows * kWidth * sizeof(float));
  work.run = [=] {
    *scores = value_similarity(TensorView(weights->data(), DType::f32, {kRows, kWidth}));
  };
  work.correct = [=] {
    bool good = true;
    for (std::size_t i = 0; i < kRows; i += 50) {
      double wanted = 0;
      const float* a = weights->data() + i * kWidth;
      for (std::size_t j = 0; j < kRows; ++j) {
        const float* b = weights->data() + j * kWidth;
        if (i != j) {
          wanted += 1 - std::fabs(product(a, b, kWidth, 1)) /
                            std::sqrt(product(a, a, kWidth, 1) * product(b, b, kWidth, 1));
        }
      }
      good = good && close((*scores)[i], wanted, 1e-9);
    }
    return good;
  };
  return work;
}

Workload compact_rows() {
  const auto source = normal<float>(kFfn * kHeadDim * 6, 7);
  const auto memory = std::make_shared<std::vector<float>>(*source);
  const auto keep = std::make_shared<std::vector<std::int64_t>>();
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(kFfn); ++i) {
    if (i % 3 != 1) keep->push_back(i);
  }
  const std::size_t width = kHeadDim * 6;
  Workload work;
  work.name = "compact columns, (384, 1536) to (384, 1024)";
  work.bytes = static_cast<double>(width * (kFfn + keep->size()) * sizeof(float));
  work.run = [=] {
    const MutableTensorView view(
        memory->data(), DType::f32,
        {static_cast<std::int64_t>(width), static_cast<std::int64_t>(kFfn)});
    compact(view, 1, *keep);
  };
  work.correct = [=] {
    *memory = *source;
    work.run();
    bool good = true;
    for (std::size_t r = 0; r < width; ++r) {
      for (std::size_t c = 0; c < keep->size(); ++c) {
        good = good && (*memory)[r * keep->size() + c] ==
                           (*source)[r * kFfn + static_cast<std::size_t>((*keep)[c])];
      }
    }
    return good;
  };
  return work;
}

}  // namespace

std::vector<Workload> workloads() {
  set_threads(1);
  const auto& gram = cpu::kernels().gram;
  std::vector<Workload> all;
  all.push_back(tile<double>("Gram tile, float64", gram.tile_f64, cpu::kPanelF64));
  all.push_back(tile<float>("Gram tile, float32", gram.tile_f32, cpu::kPanelF32));
  all.push_back(pack());
  all.push_back(score_lanes());
  all.push_back(score());
  all.push_back(
      moments("MomentAccumulator::update, (1024, 768)", 1024, 768, RowNorm::none, DType::f32));
  all.push_back(moments("MomentAccumulator::update, (1024, 384), rows as LayerNorm's", 1024, 384,
                        RowNorm::layer, DType::f32));
  all.push_back(moments("MomentAccumulator::update, (512, 384), float64", 512, 384, RowNorm::none,
                        DType::f64));
  all.push_back(similarity());
  all.push_back(compact_rows());
  return all;
}

}  // namespace secateur_bench
