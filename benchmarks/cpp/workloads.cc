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
Workload tile(Tile kernel, std::size_t panel) {
  const auto a = normal<T>(cpu::kRows * panel, 1), b = normal<T>(cpu::kRows * panel, 2);
  const auto c = std::make_shared<std::vector<double>>(panel * panel);
  Workload work;
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

// Against power iteration on Q Kᵀ: with γ = 1 the scores are |cos(u, q_i)| |cos(v, k_i)| for the
// leading triplet.
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

Workload score_one() {
  const QueriesAndKeys data;
  struct Memory {
    std::vector<double> q0, q, k, k0, out;
    Buffer<double> work;
  };
  const auto memory =
      std::make_shared<Memory>(Memory{data.gram(0, 0),
                                      {},
                                      {},
                                      data.gram(1, 0),
                                      std::vector<double>(kHeadDim),
                                      Buffer<double>(cpu::score_workspace(kHeadDim))});
  Workload work;
  work.flops = omega_flops(kHeadDim);
  work.bytes = 2.0 * kHeadDim * kHeadDim * sizeof(double);
  work.run = [=] {
    memory->q = memory->q0;
    memory->k = memory->k0;
    cpu::kernels().score.omega(kHeadDim, kHeadDim, kGamma, memory->q.data(), memory->k.data(),
                               memory->work.data(), memory->out.data());
  };
  work.correct = [=] {
    memory->q = memory->q0;
    memory->k = memory->k0;
    cpu::kernels().score.omega(kHeadDim, kHeadDim, 1, memory->q.data(), memory->k.data(),
                               memory->work.data(), memory->out.data());
    return leading_triplet_agrees(data, 0, memory->out);
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

Workload moments(std::size_t rows, std::size_t dim, RowNorm norm, DType dtype) {
  const auto memory = normal<float>(rows * dim, 5);
  const auto exact = std::make_shared<std::vector<double>>(memory->begin(), memory->end());
  const auto sums = std::make_shared<MomentAccumulator>(static_cast<std::int64_t>(dim));
  const void* data = dtype == DType::f64 ? static_cast<const void*>(exact->data())
                                         : static_cast<const void*>(memory->data());
  const Dims shape{static_cast<std::int64_t>(rows), static_cast<std::int64_t>(dim)};
  Workload work;
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

Workload elimination() {
  constexpr std::size_t kInputs = 384, kOutputs = 96, kRemoved = 192;
  const auto features = normal<double>(2 * kInputs * kInputs, 8);
  const auto inverse = std::make_shared<std::vector<double>>(kInputs * kInputs);
  for (std::size_t i = 0; i < kInputs; ++i) {
    for (std::size_t j = 0; j < kInputs; ++j) {
      const double sum = product(features->data() + i, features->data() + j, 2 * kInputs, kInputs);
      (*inverse)[i * kInputs + j] = sum / (2 * kInputs) + (i == j ? 0.1 : 0);
    }
  }
  const auto weights = normal<double>(kInputs * kOutputs, 9);
  const auto result = std::make_shared<Elimination>();
  const auto side = static_cast<std::int64_t>(kInputs);
  Workload work;
  // Rank-one downdates of half the matrix, and of the weights, over the inputs that remain.
  for (std::size_t n = kInputs; n > kInputs - kRemoved; --n) {
    work.flops += static_cast<double>(n * n + 2 * n * kOutputs);
  }
  work.bytes = static_cast<double>((kInputs + kOutputs) * kInputs * sizeof(double));
  work.run = [=] {
    *result = eliminate(TensorView(inverse->data(), DType::f64, {side, side}),
                        TensorView(weights->data(), DType::f64, {side, kOutputs}), kRemoved);
  };
  work.correct = [=] {
    std::vector<double> a = *inverse, w = *weights;
    std::vector<bool> gone(kInputs, false);
    for (std::size_t step = 0; step < kRemoved; ++step) {
      const auto cost = [&](std::size_t i) {
        const double* row = w.data() + i * kOutputs;
        return product(row, row, kOutputs, 1) / a[i * (kInputs + 1)];
      };
      std::size_t best = kInputs;
      for (std::size_t i = 0; i < kInputs; ++i) {
        if (!gone[i] && (best == kInputs || cost(i) < cost(best))) best = i;
      }
      if (result->order[step] != static_cast<std::int64_t>(best)) return false;
      if (!close(result->costs[step], cost(best), 1e-9 * cost(best))) return false;
      gone[best] = true;
      const std::vector<double> column(
          a.begin() + static_cast<std::ptrdiff_t>(best * kInputs),
          a.begin() + static_cast<std::ptrdiff_t>((best + 1) * kInputs));
      const std::vector<double> row(w.begin() + static_cast<std::ptrdiff_t>(best * kOutputs),
                                    w.begin() + static_cast<std::ptrdiff_t>((best + 1) * kOutputs));
      for (std::size_t i = 0; i < kInputs; ++i) {
        const double factor = column[i] / column[best];
        for (std::size_t j = 0; j < kInputs; ++j) a[i * kInputs + j] -= factor * column[j];
        for (std::size_t o = 0; o < kOutputs; ++o) w[i * kOutputs + o] -= factor * row[o];
      }
    }
    return true;
  };
  return work;
}

Workload compact_columns() {
  const auto source = normal<float>(kFfn * kHeadDim * 6, 7);
  const auto memory = std::make_shared<std::vector<float>>(*source);
  const auto keep = std::make_shared<std::vector<std::int64_t>>();
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(kFfn); ++i) {
    if (i % 3 != 1) keep->push_back(i);
  }
  const std::size_t width = kHeadDim * 6;
  Workload work;
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

std::vector<Maker> workloads() {
  set_threads(1);
  const auto moments_of = [](std::size_t rows, std::size_t dim, RowNorm norm, DType dtype) {
    return [=] { return moments(rows, dim, norm, dtype); };
  };
  return {
      {"Gram tile, float64",
       [] { return tile<double>(cpu::kernels().gram.tile_f64, cpu::kPanelF64); }},
      {"Gram tile, float32",
       [] { return tile<float>(cpu::kernels().gram.tile_f32, cpu::kPanelF32); }},
      {"pack float32 into float64", pack},
      {"omega, " + std::to_string(cpu::kernels().score_lanes.lanes) + " lanes", score_lanes},
      {"omega, one matrix", score_one},
      {"AttentionScorer::update, 8 heads", score},
      {"MomentAccumulator::update, (1024, 768)", moments_of(1024, 768, RowNorm::none, DType::f32)},
      {"MomentAccumulator::update, (1024, 384), LayerNorm's rows",
       moments_of(1024, 384, RowNorm::layer, DType::f32)},
      {"MomentAccumulator::update, (512, 384), float64",
       moments_of(512, 384, RowNorm::none, DType::f64)},
      {"value_similarity, 384 rows of 384", similarity},
      {"eliminate 192 of 384, 96 outputs", elimination},
      {"compact columns, (384, 1536) to (384, 1024)", compact_columns},
  };
}

}  // namespace secateur_bench
