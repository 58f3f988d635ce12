// The C interface: arguments checked and exceptions caught here, all else in the C++ functions.
#include <secateur.h>
#include <secateur/secateur.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "packed.h"

struct secateur_attention_scorer {
  secateur::AttentionScorer scorer;
};

struct secateur_moment_accumulator {
  secateur::MomentAccumulator accumulator;
};

namespace secateur {
namespace {

// Of fixed size: a message is kept even where there is no memory left.
struct Message {
  char text[1024];
};

Message& message() {
  static thread_local Message last{};
  return last;
}

secateur_status failed(secateur_status status, const char* text) noexcept {
  char* out = message().text;
  std::strncpy(out, text, sizeof(Message) - 1);
  out[sizeof(Message) - 1] = '\0';
  return status;
}

/// Runs body, and turns what it throws into a status and a message.
template <typename Body>
secateur_status guarded(const Body& body) noexcept {
  try {
    body();
    return SECATEUR_OK;
  } catch (const InvalidArgument& error) {
    return failed(SECATEUR_INVALID_ARGUMENT, error.what());
  } catch (const Unsupported& error) {
    return failed(SECATEUR_UNSUPPORTED, error.what());
  } catch (const NumericalError& error) {
    return failed(SECATEUR_NUMERICAL_ERROR, error.what());
  } catch (const Error& error) {
    return failed(SECATEUR_DEVICE_ERROR, error.what());
  } catch (const std::bad_alloc&) {
    return failed(SECATEUR_OUT_OF_MEMORY, "memory: expected enough, got none");
  } catch (const std::length_error&) {
    return failed(SECATEUR_OUT_OF_MEMORY, "memory: expected enough, got none");
  } catch (const std::exception& error) {
    return failed(SECATEUR_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(SECATEUR_INTERNAL_ERROR, "secateur: expected a known exception, got another");
  }
}

template <typename T>
T& required(T* pointer, const char* argument) {
  if (pointer == nullptr) fail<InvalidArgument>(argument, "a pointer", "NULL");
  return *pointer;
}

std::string text_or_empty(const char* text) { return text == nullptr ? std::string() : text; }

/// Values of a C enum, which any integer may be given for.
int checked_enum(int32_t value, int32_t last, const std::string& argument) {
  check_range(value, 0, last, argument);
  return value;
}

MutableTensorView mutable_view(const secateur_tensor* tensor, const char* argument) {
  const secateur_tensor& from = required(tensor, argument);
  const std::string name = argument;
  const int dtype = checked_enum(from.dtype, SECATEUR_F64, name + ".dtype");
  const int device = checked_enum(from.device_type, SECATEUR_CUDA, name + ".device_type");
  check_range(from.rank, 0, SECATEUR_MAX_RANK, name + ".rank");
  const auto rank = static_cast<std::size_t>(from.rank);
  return {from.data,
          static_cast<DType>(dtype),
          {from.shape, rank},
          {from.strides, rank},
          {static_cast<DeviceType>(device), from.device_index, from.stream}};
}

TensorView view(const secateur_tensor* tensor, const char* argument) {
  return mutable_view(tensor, argument);
}

void check_size(std::size_t size, std::size_t expected, const char* argument) {
  if (size != expected) {
    fail<InvalidArgument>(argument, std::to_string(expected), std::to_string(size));
  }
}

template <typename T>
void give(const std::vector<T>& values, T* out, std::size_t size, const char* argument) {
  required(out, argument);
  check_size(size, values.size(), "size");
  std::copy(values.begin(), values.end(), out);
}

/// The upper triangles of `count` full matrices.
std::vector<double> packed(const double* full, std::size_t count, std::size_t n) {
  std::vector<double> out;
  out.reserve(count * packed_size(n));
  for (std::size_t matrix = 0; matrix < count; ++matrix) {
    for (std::size_t i = 0; i < n; ++i) {
      const double* row = full + (matrix * n + i) * n;
      out.insert(out.end(), row + i, row + n);
    }
  }
  return out;
}

static_assert(static_cast<int>(DType::f32) == SECATEUR_F32);
static_assert(static_cast<int>(DType::f16) == SECATEUR_F16);
static_assert(static_cast<int>(DType::bf16) == SECATEUR_BF16);
static_assert(static_cast<int>(DType::f64) == SECATEUR_F64);
static_assert(static_cast<int>(DeviceType::cpu) == SECATEUR_CPU);
static_assert(static_cast<int>(DeviceType::cuda) == SECATEUR_CUDA);
static_assert(static_cast<int>(RowNorm::none) == SECATEUR_ROW_NORM_NONE);
static_assert(static_cast<int>(RowNorm::rms) == SECATEUR_ROW_NORM_RMS);
static_assert(static_cast<int>(RowNorm::layer) == SECATEUR_ROW_NORM_LAYER);
static_assert(kMaxRank == SECATEUR_MAX_RANK);

}  // namespace
}  // namespace secateur

using secateur::AttentionScorer;
using secateur::guarded;
using secateur::MomentAccumulator;
using secateur::required;
using secateur::view;

const char* secateur_error_message(void) { return secateur::message().text; }

const char* secateur_version(void) {
  static const std::string text = secateur::version();
  return text.c_str();
}

secateur_status secateur_isa(const char** isa) {
  return guarded([&] {
    required(isa, "isa");
    static const std::string text = secateur::isa();
    *isa = text.c_str();
  });
}

int32_t secateur_has_cuda(void) { return secateur::has_cuda() ? 1 : 0; }

int32_t secateur_threads(void) { return secateur::threads(); }

secateur_status secateur_set_threads(int32_t n) {
  return guarded([&] { secateur::set_threads(n); });
}

secateur_status secateur_tensor_init(secateur_tensor* tensor, void* data, int32_t dtype,
                                     int32_t rank, const int64_t* shape) {
  return guarded([&] {
    required(tensor, "tensor");
    secateur::checked_enum(dtype, SECATEUR_F64, "dtype");
    secateur::check_range(rank, 0, SECATEUR_MAX_RANK, "rank");
    if (rank > 0) required(shape, "shape");
    const auto axes = static_cast<std::size_t>(rank);
    const secateur::Dims sizes(shape, axes);
    const secateur::Dims strides = secateur::contiguous_strides(sizes);
    *tensor = {};
    tensor->data = data;
    tensor->dtype = dtype;
    tensor->device_type = SECATEUR_CPU;
    tensor->rank = rank;
    std::copy(sizes.begin(), sizes.end(), tensor->shape);
    std::copy(strides.begin(), strides.end(), tensor->strides);
  });
}

// AttentionScorer

secateur_status secateur_attention_scorer_create(int64_t heads, int64_t head_dim, int64_t gamma,
                                                 int32_t moments, const char* name,
                                                 secateur_attention_scorer** scorer) {
  return guarded([&] {
    required(scorer, "scorer");
    *scorer = new secateur_attention_scorer{
        AttentionScorer(heads, head_dim, gamma, moments != 0, secateur::text_or_empty(name))};
  });
}

void secateur_attention_scorer_destroy(secateur_attention_scorer* scorer) { delete scorer; }

secateur_status secateur_attention_scorer_update(secateur_attention_scorer* scorer,
                                                 const secateur_tensor* q,
                                                 const secateur_tensor* k) {
  return guarded([&] { required(scorer, "scorer").scorer.update(view(q, "q"), view(k, "k")); });
}

secateur_status secateur_attention_scorer_update_grams(secateur_attention_scorer* scorer,
                                                       const secateur_tensor* query_gram,
                                                       const secateur_tensor* key_gram,
                                                       const secateur_tensor* key_mean,
                                                       int64_t tokens) {
  return guarded([&] {
    required(scorer, "scorer")
        .scorer.update_grams(view(query_gram, "query_gram"), view(key_gram, "key_gram"),
                             view(key_mean, "key_mean"), tokens);
  });
}

secateur_status secateur_attention_scorer_merge(secateur_attention_scorer* scorer,
                                                const secateur_attention_scorer* other) {
  return guarded([&] { required(scorer, "scorer").scorer.merge(required(other, "other").scorer); });
}

secateur_status secateur_attention_scorer_counts(const secateur_attention_scorer* scorer,
                                                 int64_t* images, int64_t* tokens) {
  return guarded([&] {
    const auto& state = required(scorer, "scorer").scorer.state();
    if (images != nullptr) *images = state.images;
    if (tokens != nullptr) *tokens = state.tokens;
  });
}

secateur_status secateur_attention_scorer_scores(const secateur_attention_scorer* scorer,
                                                 double* scores, size_t size) {
  return guarded(
      [&] { secateur::give(required(scorer, "scorer").scorer.scores(), scores, size, "scores"); });
}

secateur_status secateur_attention_scorer_sum(const secateur_attention_scorer* scorer,
                                              int32_t which, double* values, size_t size) {
  return guarded([&] {
    const AttentionScorer& from = required(scorer, "scorer").scorer;
    switch (secateur::checked_enum(which, SECATEUR_SCORE_GRAM, "which")) {
      case SECATEUR_SCORE_SUM:
        return secateur::give(from.state().score_sum, values, size, "values");
      case SECATEUR_QUERY_GRAM:
        return secateur::give(from.query_gram(), values, size, "values");
      case SECATEUR_KEY_GRAM:
        return secateur::give(from.key_gram(), values, size, "values");
      default:
        return secateur::give(from.score_gram(), values, size, "values");
    }
  });
}

secateur_status secateur_attention_scorer_load(secateur_attention_scorer* scorer, int64_t images,
                                               int64_t tokens, const double* score_sum,
                                               const double* query_gram, const double* key_gram,
                                               const double* score_gram) {
  return guarded([&] {
    AttentionScorer& to = required(scorer, "scorer").scorer;
    const auto heads = static_cast<std::size_t>(to.heads());
    const auto dim = static_cast<std::size_t>(to.head_dim());
    secateur::AttentionScorerState state;
    state.images = images;
    state.tokens = tokens;
    const double* sums = &required(score_sum, "score_sum");
    state.score_sum.assign(sums, sums + heads * dim);
    const auto gram = [&](const double* given, const char* argument) {
      if (to.moments()) return secateur::packed(&required(given, argument), heads, dim);
      if (given != nullptr) {
        secateur::fail<secateur::InvalidArgument>(argument, "NULL for a scorer without moments",
                                                  "a pointer");
      }
      return std::vector<double>();
    };
    state.query_gram = gram(query_gram, "query_gram");
    state.key_gram = gram(key_gram, "key_gram");
    state.score_gram = gram(score_gram, "score_gram");
    to.load_state(std::move(state));
  });
}

// MomentAccumulator

secateur_status secateur_moment_accumulator_create(int64_t dim, const char* name,
                                                   secateur_moment_accumulator** accumulator) {
  return guarded([&] {
    required(accumulator, "accumulator");
    *accumulator =
        new secateur_moment_accumulator{MomentAccumulator(dim, secateur::text_or_empty(name))};
  });
}

void secateur_moment_accumulator_destroy(secateur_moment_accumulator* accumulator) {
  delete accumulator;
}

secateur_status secateur_moment_accumulator_update(secateur_moment_accumulator* accumulator,
                                                   const secateur_tensor* x, int32_t norm,
                                                   int64_t stride, int64_t phase) {
  return guarded([&] {
    MomentAccumulator& to = required(accumulator, "accumulator").accumulator;
    const int checked = secateur::checked_enum(norm, SECATEUR_ROW_NORM_LAYER, "norm");
    to.update(view(x, "x"), {static_cast<secateur::RowNorm>(checked), stride, phase});
  });
}

secateur_status secateur_moment_accumulator_merge(secateur_moment_accumulator* accumulator,
                                                  const secateur_moment_accumulator* other) {
  return guarded([&] {
    required(accumulator, "accumulator").accumulator.merge(required(other, "other").accumulator);
  });
}

secateur_status secateur_moment_accumulator_rows(const secateur_moment_accumulator* accumulator,
                                                 int64_t* rows) {
  return guarded([&] {
    const MomentAccumulator& from = required(accumulator, "accumulator").accumulator;
    required(rows, "rows") = from.rows();
  });
}

secateur_status secateur_moment_accumulator_sums(const secateur_moment_accumulator* accumulator,
                                                 double* sum, size_t sum_size,
                                                 double* second_moment, size_t second_moment_size) {
  return guarded([&] {
    const MomentAccumulator& from = required(accumulator, "accumulator").accumulator;
    const auto dim = static_cast<std::size_t>(from.dim());
    secateur::check_size(sum_size, sum == nullptr ? 0 : dim, "sum_size");
    secateur::check_size(second_moment_size, second_moment == nullptr ? 0 : dim * dim,
                         "second_moment_size");
    if (second_moment != nullptr) {
      secateur::unpack(from.state().second_moment.data(), dim, second_moment);
    }
    if (sum != nullptr) std::copy(from.sum().begin(), from.sum().end(), sum);
  });
}

secateur_status secateur_moment_accumulator_load(secateur_moment_accumulator* accumulator,
                                                 int64_t rows, const double* sum,
                                                 const double* second_moment) {
  return guarded([&] {
    MomentAccumulator& to = required(accumulator, "accumulator").accumulator;
    const auto dim = static_cast<std::size_t>(to.dim());
    const double* sums = &required(sum, "sum");
    secateur::MomentAccumulatorState state;
    state.rows = rows;
    state.sum.assign(sums, sums + dim);
    state.second_moment = secateur::packed(&required(second_moment, "second_moment"), 1, dim);
    to.load_state(std::move(state));
  });
}

// Functions

secateur_status secateur_value_similarity(const secateur_tensor* weights, double* scores,
                                          size_t size) {
  return guarded([&] {
    secateur::give(secateur::value_similarity(view(weights, "weights")), scores, size, "scores");
  });
}

secateur_status secateur_value_similarity_from_moment(const secateur_tensor* moment, double* scores,
                                                      size_t size) {
  return guarded([&] {
    secateur::give(secateur::value_similarity_from_moment(view(moment, "moment")), scores, size,
                   "scores");
  });
}

secateur_status secateur_select(const secateur_tensor* scores, int64_t keep, int64_t* indices,
                                size_t size) {
  return guarded([&] {
    secateur::give(secateur::select(view(scores, "scores"), keep), indices, size, "indices");
  });
}

secateur_status secateur_eliminate(const secateur_tensor* inverse, const secateur_tensor* weights,
                                   int64_t count, int64_t* order, double* costs) {
  return guarded([&] {
    required(order, "order");
    required(costs, "costs");
    const secateur::Elimination found =
        secateur::eliminate(view(inverse, "inverse"), view(weights, "weights"), count);
    std::copy(found.order.begin(), found.order.end(), order);
    std::copy(found.costs.begin(), found.costs.end(), costs);
  });
}

secateur_status secateur_compact(secateur_tensor* tensor, int32_t dim, const int64_t* keep,
                                 size_t count) {
  return guarded([&] {
    const secateur::MutableTensorView from = secateur::mutable_view(tensor, "tensor");
    const int64_t* first = count == 0 ? nullptr : &required(keep, "keep");
    const secateur::MutableTensorView left =
        secateur::compact(from, dim, std::vector<std::int64_t>(first, first + count));
    std::copy(left.shape.begin(), left.shape.end(), tensor->shape);
    std::copy(left.strides.begin(), left.strides.end(), tensor->strides);
  });
}
