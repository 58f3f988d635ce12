// Times an exported model in onnxruntime, alone or beside its dense model.
//
//   run_onnx MODEL [DENSE] [--batch N] [--threads N] [--seconds 5 | --runs N]
//
// MODEL and DENSE are ONNX files with one input, (images, channels, height, width), of which the
// number of images may be open: --batch (1, or what the files take). A run is as many batches of
// random images as fill 20 ms. The two run in turn, so that a slow minute of the machine slows
// both; the ratio is the median over pairs of neighbouring runs.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "graph.h"
#include "program.h"
#include "safetensors.h"

namespace embed {
namespace {

using Clock = std::chrono::steady_clock;

// Of a run: shorter ones would measure the clock and the scheduler.
constexpr double kShortest = 0.02;
// Seconds where the arguments do not tell.
constexpr double kSeconds = 5;
// Values of a batch, 4 GiB in float32: a file may name any size.
constexpr double kLargest = 1 << 30;

struct Options {
  std::vector<std::string> files{};
  std::int64_t batch = 0;  ///< 0: as the files say
  int threads = 0;         ///< 0: onnxruntime chooses
  double seconds = 0;      ///< 0: runs counts
  std::int64_t runs = 0;   ///< 0: seconds counts
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (Words words(arguments); words.left();) {
    const std::string& word = words.next();
    if (word == "--batch") {
      options.batch = words.whole(1000000);
    } else if (word == "--threads") {
      options.threads = static_cast<int>(words.whole(1024));
    } else if (word == "--seconds") {
      options.seconds = words.number();
      if (!(options.seconds > 0 && options.seconds <= 1e6)) {
        refuse(word, "more than 0 and at most 1000000", std::to_string(options.seconds));
      }
    } else if (word == "--runs") {
      options.runs = words.whole(1000000);
    } else if (word.rfind("--", 0) == 0) {
      refuse("arguments", "--batch, --threads, --seconds or --runs", word);
    } else {
      options.files.push_back(word);
    }
  }
  if (options.files.empty() || options.files.size() > 2) {
    refuse("arguments", "MODEL [DENSE]", std::to_string(options.files.size()) + " files");
  }
  if (options.seconds > 0 && options.runs > 0) refuse("arguments", "--seconds or --runs", "both");
  if (options.runs == 0 && !(options.seconds > 0)) options.seconds = kSeconds;
  return options;
}

/// Random images in the graph's type.
Ort::Value random_images(const Graph& graph, const std::vector<std::int64_t>& shape) {
  double size = 1;
  for (const std::int64_t n : shape) size *= static_cast<double>(n);
  const std::string what = graph.name() + ": " + graph.input();
  if (!(size > 0 && size <= kLargest)) {
    refuse(what, "1 to 2^30 values a batch", "images " + to_text(shape));
  }
  const Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value images = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), graph.type());
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto fill = [&](auto* values) {
    using Value = std::remove_pointer_t<decltype(values)>;
    std::generate_n(values, static_cast<std::size_t>(size),
                    [&] { return static_cast<Value>(normal(random)); });
  };
  switch (graph.type()) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      fill(images.GetTensorMutableData<float>());
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      fill(images.GetTensorMutableData<double>());
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      fill(images.GetTensorMutableData<Ort::Float16_t>());
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      fill(images.GetTensorMutableData<Ort::BFloat16_t>());
      break;
    default:
      refuse(what, "float64, float32, float16 or bfloat16", name_of(graph.type()));
  }
  return images;
}

/// A graph and a batch of images for it.
class Contender {
 public:
  Contender(const std::string& path, int threads) : graph_(path, threads) {
    const std::vector<std::int64_t>& shape = graph_.shape();
    if (std::any_of(shape.begin() + 1, shape.end(), [](std::int64_t n) { return n < 0; })) {
      refuse(graph_.name() + ": " + graph_.input(), "channels, height and width of one size",
             to_text(shape));
    }
  }

  /// Images of a batch; -1 where any number will do.
  std::int64_t batch() const { return graph_.shape()[0]; }
  const std::vector<std::int64_t>& shape() const { return shape_; }

  /// Runs a few batches of this many images, and finds how many a run has.
  void warm_up(std::int64_t batch) {
    if (this->batch() >= 0 && this->batch() != batch) {
      refuse(graph_.name(), "a graph for batches of " + std::to_string(batch),
             "one for batches of " + std::to_string(this->batch()));
    }
    shape_ = graph_.shape();
    shape_[0] = batch;
    images_ = random_images(graph_, shape_);
    // onnxruntime plans its memory in the first.
    for (int i = 0; i < 3; ++i) seconds();
    loops_ = static_cast<int>(std::ceil(std::max(1.0, kShortest / std::max(seconds(), 1e-6))));
  }

  /// Seconds of a batch, the mean over a run.
  double seconds() {
    const Clock::time_point start = Clock::now();
    for (int i = 0; i < loops_; ++i) graph_.run(images_, graph_.outputs());
    return std::chrono::duration<double>(Clock::now() - start).count() / loops_;
  }

 private:
  Graph graph_;
  std::vector<std::int64_t> shape_{};
  Ort::Value images_{nullptr};
  int loops_ = 1;
};

double median(std::vector<double> values) {
  const std::size_t half = values.size() / 2;
  std::sort(values.begin(), values.end());
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

/// What the arguments say, or a file that takes one size alone, or 1.
std::int64_t batch_of(const Options& options, const std::deque<Contender>& contenders) {
  if (options.batch > 0) return options.batch;
  for (const Contender& contender : contenders) {
    if (contender.batch() >= 0) return contender.batch();
  }
  return 1;
}

void run(const Options& options) {
  std::deque<Contender> contenders;
  for (const std::string& file : options.files) contenders.emplace_back(file, options.threads);
  const std::int64_t batch = batch_of(options, contenders);
  for (Contender& contender : contenders) contender.warm_up(batch);

  std::vector<std::vector<double>> times(contenders.size());
  std::vector<double> ratios;
  const Clock::time_point start = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  do {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      times[i].push_back(contenders[i].seconds());
    }
    if (times.size() == 2) ratios.push_back(times[1].back() / times[0].back());
  } while (options.runs > 0 ? times[0].size() < static_cast<std::size_t>(options.runs)
                            : elapsed() < options.seconds);

  const std::string threads = options.threads > 0 ? std::to_string(options.threads) : "default";
  std::printf("onnxruntime %s, threads: %s, runs: %zu\n", Ort::GetVersionString().c_str(),
              threads.c_str(), times[0].size());
  for (std::size_t i = 0; i < times.size(); ++i) {
    std::printf("%s: %.1f images/s, images %s\n", options.files[i].c_str(),
                static_cast<double>(batch) / median(times[i]),
                to_text(contenders[i].shape()).c_str());
  }
  if (!ratios.empty()) std::printf("ratio: %.3f, the median of pairs\n", median(ratios));
}

}  // namespace
}  // namespace embed

int main(int argc, char** argv) {
  return embed::run_program("run_onnx", [&] { embed::run(embed::parse({argv + 1, argv + argc})); });
}
