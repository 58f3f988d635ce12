// Calls of the C interface in any order and with any arguments that its contract allows: sizes and
// strides may be nonsense, the memory behind them is there.
#include <secateur.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s; last message: %s\n", what, secateur_error_message());
  std::abort();
}

/// Bytes that decide; zeros when there are no more.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : next_(data), end_(data + size) {}

  bool any() const { return next_ != end_; }
  std::uint8_t byte() { return any() ? *next_++ : std::uint8_t{0}; }
  /// low to high, both of them too.
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(byte()) % (high - low + 1);
  }
  /// Mostly something useful, now and then any number of 64 bits.
  std::int64_t number(std::int64_t low, std::int64_t high) {
    if (byte() < 250) return between(low, high);
    std::uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return static_cast<std::int64_t>(value);
  }
  void fill(void* memory, std::size_t size) {
    auto* to = static_cast<std::uint8_t*>(memory);
    const std::uint8_t first = byte();
    // Small whole numbers, or bits as they come, NaN among them.
    if (first < 128) {
      for (std::size_t i = 0; i < size; ++i) {
        to[i] = static_cast<std::uint8_t>(i % 4 == 3 ? 63 : (first + i * i) % 61);
      }
      return;
    }
    const std::size_t given = std::min(size, static_cast<std::size_t>(end_ - next_));
    std::fill_n(std::copy_n(next_, given, to), size - given, std::uint8_t{0});
    next_ += given;
  }

 private:
  const std::uint8_t* next_;
  const std::uint8_t* end_;
};

/// A tensor whose every element is in memory that ends with the last of them.
struct Tensor {
  secateur_tensor view{};
  std::unique_ptr<std::uint8_t[]> memory{};

  explicit Tensor(Bytes& bytes, std::int64_t rank) {
    constexpr std::int64_t kMost = 1 << 14;  // elements from the first to the last in memory
    view.dtype =
        static_cast<std::int32_t>(bytes.byte() < 250 ? bytes.between(0, 3) : bytes.number(-1, 5));
    view.device_type = bytes.byte() < 252 ? 0 : static_cast<std::int32_t>(bytes.number(0, 2));
    view.rank = static_cast<std::int32_t>(bytes.byte() < 245 ? rank : bytes.number(-1, 9));
    const bool contiguous = bytes.byte() < 128;
    std::int64_t low = 0, high = 0, step = 1;
    bool empty = false;
    for (std::int64_t i = std::clamp<std::int64_t>(view.rank, 0, SECATEUR_MAX_RANK); i-- > 0;) {
      const std::int64_t size = bytes.byte() < 250 ? bytes.between(1, 9) : bytes.between(-1, 40);
      std::int64_t stride = contiguous ? step : bytes.between(-30, 30);
      if (high - low + std::llabs(stride) * std::max<std::int64_t>(0, size - 1) > kMost) stride = 0;
      view.shape[i] = size;
      view.strides[i] = stride;
      step *= std::max<std::int64_t>(1, size);
      if (step > kMost) step = 1;
      empty = empty || size <= 0;
      (stride < 0 ? low : high) += stride * std::max<std::int64_t>(0, size - 1);
    }
    const std::size_t item = view.dtype == SECATEUR_F32                                  ? 4
                             : view.dtype == SECATEUR_F16 || view.dtype == SECATEUR_BF16 ? 2
                                                                                         : 8;
    const std::size_t elements = empty ? 0 : static_cast<std::size_t>(high - low + 1);
    memory.reset(new std::uint8_t[elements * item]);
    bytes.fill(memory.get(), elements * item);
    view.data = memory.get() + static_cast<std::size_t>(empty ? 0 : -low) * item;
    if (bytes.byte() > 252) view.data = nullptr;
  }
};

/// A status that the header names, and words with every failure.
bool done(secateur_status status) {
  require(status >= SECATEUR_OK && status <= SECATEUR_OUT_OF_MEMORY,
          "a status other than internal");
  if (status != SECATEUR_OK) require(*secateur_error_message() != 0, "a message");
  return status == SECATEUR_OK;
}

/// Results of exactly the size that is given.
template <typename T>
struct Room {
  explicit Room(std::size_t count) : size(count), values(new T[count]) {}
  std::size_t size;
  std::unique_ptr<T[]> values;
};

std::size_t size_near(Bytes& bytes, std::int64_t right) {
  const bool wrong = bytes.byte() > 240;
  return static_cast<std::size_t>(
      std::clamp<std::int64_t>(wrong ? bytes.between(0, 64) : right, 0, 1 << 14));
}

struct Scorer {
  secateur_attention_scorer* handle = nullptr;
  std::int64_t heads = 0, dim = 0;
  bool moments = false;

  Scorer() = default;
  Scorer(const Scorer&) = delete;
  Scorer& operator=(const Scorer&) = delete;
  ~Scorer() { secateur_attention_scorer_destroy(handle); }

  void create(Bytes& bytes) {
    secateur_attention_scorer_destroy(handle);
    handle = nullptr;
    heads = bytes.number(0, 5);
    dim = bytes.number(0, 19);
    // What is asked for is allocated: at most this much here.
    if (heads > 64) heads = 64;
    if (dim > 64) dim = 64;
    moments = bytes.byte() % 2 == 1;
    const char* const name = bytes.byte() % 2 == 1 ? "layer" : nullptr;
    const std::int64_t gamma = bytes.number(0, 20);
    if (!done(secateur_attention_scorer_create(heads, dim, gamma, moments, name, &handle))) {
      heads = dim = 0;
    }
  }

  std::int64_t images() const {
    std::int64_t count = 0;
    return handle != nullptr && done(secateur_attention_scorer_counts(handle, &count, nullptr))
               ? count
               : 0;
  }

  void update(Bytes& bytes) {
    Tensor q(bytes, 4), k(bytes, 4);
    if (bytes.byte() < 200) {
      // What fits: the harness would never guess it.
      const std::int64_t shape[4] = {bytes.between(1, 3), bytes.between(1, 9), heads, dim};
      const std::size_t count = static_cast<std::size_t>(
          shape[0] * shape[1] * std::max<std::int64_t>(0, heads) * std::max<std::int64_t>(0, dim));
      for (Tensor* tensor : {&q, &k}) {
        tensor->memory.reset(new std::uint8_t[count * 4]);
        bytes.fill(tensor->memory.get(), count * 4);
        done(secateur_tensor_init(&tensor->view, tensor->memory.get(), SECATEUR_F32, 4, shape));
      }
    }
    const std::int64_t before = images();
    const bool whole = done(secateur_attention_scorer_update(handle, &q.view, &k.view));
    if (handle != nullptr) {
      require(images() == before + (whole ? q.view.shape[0] : 0), "images that were counted");
    }
  }

  void read(Bytes& bytes) {
    const std::int64_t units = heads * dim, grams = units * dim;
    const auto which = static_cast<std::int32_t>(bytes.number(0, 3));
    Room<double> sum(size_near(bytes, which == SECATEUR_SCORE_SUM ? units : grams));
    done(secateur_attention_scorer_sum(handle, which, sum.values.get(), sum.size));
    Room<double> scores(size_near(bytes, units));
    done(secateur_attention_scorer_scores(handle, scores.values.get(), scores.size));
  }

  void load(Bytes& bytes) {
    if (handle == nullptr) return;
    const auto units = static_cast<std::size_t>(heads * dim);
    Room<double> sums[4] = {Room<double>(units),
                            Room<double>(units * static_cast<std::size_t>(dim)),
                            Room<double>(units * static_cast<std::size_t>(dim)),
                            Room<double>(units * static_cast<std::size_t>(dim))};
    for (Room<double>& sum : sums) bytes.fill(sum.values.get(), sum.size * sizeof(double));
    const bool grams = bytes.byte() < 200 ? moments : bytes.byte() % 2 == 1;
    done(secateur_attention_scorer_load(
        handle, bytes.number(-1, 9), bytes.number(-1, 99), sums[0].values.get(),
        grams ? sums[1].values.get() : nullptr, grams ? sums[2].values.get() : nullptr,
        grams ? sums[3].values.get() : nullptr));
  }
};

struct Moments {
  secateur_moment_accumulator* handle = nullptr;
  std::int64_t dim = 0;

  Moments() = default;
  Moments(const Moments&) = delete;
  Moments& operator=(const Moments&) = delete;
  ~Moments() { secateur_moment_accumulator_destroy(handle); }

  void create(Bytes& bytes) {
    secateur_moment_accumulator_destroy(handle);
    handle = nullptr;
    dim = std::min<std::int64_t>(bytes.number(0, 9), 64);
    if (!done(secateur_moment_accumulator_create(dim, nullptr, &handle))) dim = 0;
  }

  void update(Bytes& bytes) {
    Tensor x(bytes, bytes.between(1, 4));
    const auto norm = static_cast<std::int32_t>(bytes.number(0, 2));
    const std::int64_t stride = bytes.number(1, 3), phase = bytes.number(0, 3);
    done(secateur_moment_accumulator_update(handle, &x.view, norm, stride, phase));
  }

  void read(Bytes& bytes) {
    Room<double> sum(size_near(bytes, dim)), second(size_near(bytes, dim * dim));
    done(secateur_moment_accumulator_sums(handle, sum.values.get(), sum.size, second.values.get(),
                                          second.size));
    std::int64_t rows = 0;
    done(secateur_moment_accumulator_rows(handle, &rows));
  }

  void load(Bytes& bytes) {
    if (handle == nullptr) return;
    const auto n = static_cast<std::size_t>(dim);
    Room<double> sum(n), second(n * n);
    bytes.fill(sum.values.get(), n * sizeof(double));
    bytes.fill(second.values.get(), n * n * sizeof(double));
    done(secateur_moment_accumulator_load(handle, bytes.number(-1, 9), sum.values.get(),
                                          second.values.get()));
  }
};

std::int64_t elements(const secateur_tensor& tensor) {
  std::int64_t count = 1;
  for (std::int32_t i = 0; i < tensor.rank && i < SECATEUR_MAX_RANK; ++i) count *= tensor.shape[i];
  return count;
}

void select(Bytes& bytes) {
  const Tensor scores(bytes, 2);
  const std::int64_t keep = bytes.number(0, 9);
  const std::int64_t groups = scores.view.shape[0];
  Room<std::int64_t> kept(size_near(bytes, keep > 0 && keep < 1 << 10 ? groups * keep : 0));
  if (!done(secateur_select(&scores.view, keep, kept.values.get(), kept.size))) return;
  for (std::size_t i = 0; i < kept.size; ++i) {
    const bool first = i % static_cast<std::size_t>(keep) == 0;
    require(kept.values[i] >= (first ? 0 : kept.values[i - 1] + 1), "ascending indices");
    require(kept.values[i] < scores.view.shape[1], "indices in range");
  }
}

void similarity(Bytes& bytes) {
  const Tensor weights(bytes, bytes.between(2, 3));
  const std::int64_t last = weights.view.rank >= 1 && weights.view.rank <= SECATEUR_MAX_RANK
                                ? weights.view.shape[weights.view.rank - 1]
                                : 1;
  Room<double> scores(size_near(bytes, last == 0 ? 0 : elements(weights.view) / last));
  done(secateur_value_similarity(&weights.view, scores.values.get(), scores.size));
  Room<double> others(size_near(bytes, weights.view.shape[0]));
  done(secateur_value_similarity_from_moment(&weights.view, others.values.get(), others.size));
}

void eliminate(Bytes& bytes) {
  Tensor inverse(bytes, 2), weights(bytes, 2);
  const std::int64_t n = bytes.between(1, 9);
  std::vector<double> matrix(static_cast<std::size_t>(n * n)),
      rows(static_cast<std::size_t>(n * 2));
  if (bytes.byte() < 200) {
    bytes.fill(rows.data(), rows.size() * sizeof(double));
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        const double value = i == j ? 1.0 + bytes.byte() : 0.01 * static_cast<double>(bytes.byte());
        matrix[static_cast<std::size_t>(i * n + j)] = value;
        matrix[static_cast<std::size_t>(j * n + i)] = value;
      }
    }
    const std::int64_t square[2] = {n, n}, shape[2] = {n, 2};
    done(secateur_tensor_init(&inverse.view, matrix.data(), SECATEUR_F64, 2, square));
    done(secateur_tensor_init(&weights.view, rows.data(), SECATEUR_F64, 2, shape));
  }
  const std::int64_t count = bytes.number(0, 9);
  Room<std::int64_t> order(static_cast<std::size_t>(std::clamp<std::int64_t>(count, 0, 1 << 10)));
  Room<double> costs(order.size);
  if (!done(secateur_eliminate(&inverse.view, &weights.view, count, order.values.get(),
                               costs.values.get()))) {
    return;
  }
  std::vector<std::int64_t> seen(order.values.get(), order.values.get() + order.size);
  std::sort(seen.begin(), seen.end());
  require(std::adjacent_find(seen.begin(), seen.end()) == seen.end(), "each input once");
}

void compact(Bytes& bytes) {
  Tensor tensor(bytes, bytes.between(1, 4));
  const auto dim = static_cast<std::int32_t>(bytes.number(0, 3));
  std::vector<std::int64_t> keep;
  std::int64_t index = bytes.between(-1, 2);
  for (std::int64_t left = bytes.between(0, 9); left > 0; --left) {
    keep.push_back(index);
    index += bytes.between(bytes.byte() > 250 ? 0 : 1, 3);
  }
  keep.reserve(1);  // a pointer even where there is none to keep
  const secateur_tensor before = tensor.view;
  if (done(secateur_compact(&tensor.view, dim, keep.data(), keep.size()))) {
    require(tensor.view.shape[dim] == static_cast<std::int64_t>(keep.size()), "a new size");
    require(tensor.view.data == before.data, "the same memory");
  } else {
    require(std::memcmp(&tensor.view, &before, sizeof(before)) == 0, "an unchanged view");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  Scorer scorer, other;
  Moments moments, more;
  // Enough for calls in any order, and few enough for many runs.
  for (int calls = 0; calls < 24 && bytes.any(); ++calls) {
    switch (bytes.between(0, 15)) {
      case 0:
        scorer.create(bytes);
        break;
      case 1:
        other.create(bytes);
        break;
      case 2:
      case 3:
        scorer.update(bytes);
        break;
      case 4:
        other.update(bytes);
        break;
      case 5:
        done(secateur_attention_scorer_merge(scorer.handle, other.handle));
        break;
      case 6:
        scorer.read(bytes);
        break;
      case 7:
        scorer.load(bytes);
        break;
      case 8:
        moments.create(bytes);
        more.create(bytes);
        break;
      case 9:
        moments.update(bytes);
        break;
      case 10:
        done(secateur_moment_accumulator_merge(more.handle, moments.handle));
        more.read(bytes);
        break;
      case 11:
        moments.load(bytes);
        moments.read(bytes);
        break;
      case 12:
        select(bytes);
        break;
      case 13:
        similarity(bytes);
        break;
      case 14:
        eliminate(bytes);
        break;
      default:
        compact(bytes);
    }
  }
  return 0;
}
