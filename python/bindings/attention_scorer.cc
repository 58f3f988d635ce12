#include <pybind11/stl.h>
#include <secateur/attention_scorer.h>

#include "array.h"
#include "bindings.h"
#include "guarded.h"
#include "state.h"

namespace secateur::python {
namespace {

using Scorer = Guarded<AttentionScorer>;

std::string label(const Scorer& self, const char* argument) {
  const std::string& name = self.fixed().name();
  return name.empty() ? argument : name + " " + argument;
}

std::vector<std::string> state_keys(const Scorer& self) {
  std::vector<std::string> keys{"images", "tokens", "score_sum"};
  if (self.fixed().moments()) {
    keys.insert(keys.end(), {"query_gram", "key_gram", "score_gram"});
  }
  return keys;
}

struct Shapes {
  explicit Shapes(const Scorer& self) : heads(self.fixed().heads()), dim(self.fixed().head_dim()) {}

  std::vector<py::ssize_t> scores() const { return {heads, dim}; }
  std::vector<py::ssize_t> full() const { return {heads, dim, dim}; }
  std::vector<py::ssize_t> packed() const { return {heads, dim * (dim + 1) / 2}; }

  py::ssize_t heads;
  py::ssize_t dim;
};

py::dict get_state(Scorer& self) {
  AttentionScorerState state = self.run([](const AttentionScorer& s) { return s.state(); });
  const Shapes shapes(self);
  py::dict result;
  result["images"] = count_to_numpy(state.images);
  result["tokens"] = count_to_numpy(state.tokens);
  result["score_sum"] = to_numpy(std::move(state.score_sum), shapes.scores());
  if (self.fixed().moments()) {
    result["query_gram"] = to_numpy(std::move(state.query_gram), shapes.packed());
    result["key_gram"] = to_numpy(std::move(state.key_gram), shapes.packed());
    result["score_gram"] = to_numpy(std::move(state.score_gram), shapes.packed());
  }
  return result;
}

void set_state(Scorer& self, py::handle object) {
  const StateReader reader(object, state_keys(self));
  const Shapes shapes(self);
  AttentionScorerState state;
  state.images = reader.count("images");
  state.tokens = reader.count("tokens");
  state.score_sum = reader.sums("score_sum", shapes.scores());
  if (self.fixed().moments()) {
    state.query_gram = reader.sums("query_gram", shapes.packed());
    state.key_gram = reader.sums("key_gram", shapes.packed());
    state.score_gram = reader.sums("score_gram", shapes.packed());
  }
  self.run([&](AttentionScorer& scorer) { scorer.load_state(std::move(state)); });
}

py::str repr(Scorer& self) {
  const AttentionScorer& scorer = self.fixed();
  const auto images = self.run([](const AttentionScorer& s) { return s.images(); });
  return py::str(
             "AttentionScorer(heads={}, head_dim={}, gamma={}, moments={}, name={!r}): {} images")
      .format(scorer.heads(), scorer.head_dim(), scorer.gamma(), scorer.moments(), scorer.name(),
              images);
}

/// One of the three moments as an (H, d, d) array.
template <std::vector<double> (AttentionScorer::*moment)() const>
py::array_t<double> gram(Scorer& self) {
  return to_numpy(self.run([](const AttentionScorer& s) { return (s.*moment)(); }),
                  Shapes(self).full());
}

}  // namespace

void register_attention_scorer(py::module_& module) {
  py::class_<Scorer>(module, "AttentionScorer",
                     R"(Scores the query/key neurons of one attention layer over a stream of images.

SNP's importance (Shim et al., ECCV 2024, arXiv:2404.11630): the sum over the ``gamma`` leading
singular triplets of QKᵀ of |cos(u_j, q_i)| |cos(v_j, k_i)|, in float64, averaged over images.
Neurons and heads of zero norm score 0. The sums have the same bits however the images are split
into batches and for any number of threads. Threads may share an object; their calls take turns.

Args:
    heads: attention heads, 1 to 65536.
    head_dim: neurons per head, 1 to 4096.
    gamma: singular triplets that count, at least 1.
    moments: also accumulate QᵀQ, K_cᵀK_c and their elementwise product.
    name: put in front of every error of this object, such as the layer's module path.

Raises:
    InvalidArgument: a number out of its range.
)")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, bool, std::string>(),
           py::arg("heads"), py::arg("head_dim"), py::arg("gamma") = 8, py::kw_only(),
           py::arg("moments") = false, py::arg("name") = "")
      .def_property_readonly("heads", [](const Scorer& s) { return s.fixed().heads(); })
      .def_property_readonly("head_dim", [](const Scorer& s) { return s.fixed().head_dim(); })
      .def_property_readonly("gamma", [](const Scorer& s) { return s.fixed().gamma(); })
      .def_property_readonly("moments", [](const Scorer& s) { return s.fixed().moments(); })
      .def_property_readonly("name", [](const Scorer& s) { return s.fixed().name(); })
      .def_property_readonly(
          "images",
          [](Scorer& self) {
            return self.run([](const AttentionScorer& s) { return s.images(); });
          },
          "Images seen.")
      .def(
          "update",
          [](Scorer& self, py::handle q, py::handle k) {
            const Array queries(q, label(self, "q"));
            const Array keys(k, label(self, "k"));
            self.run([&](AttentionScorer& s) { s.update(queries.view(), keys.view()); });
          },
          py::arg("q"), py::arg("k"), R"(Adds a batch of images, without a copy and without the GIL.

Args:
    q: queries (images, tokens, heads, head_dim), any strides; float32, float16, bfloat16, float64.
        On a CUDA device where runtime.has_cuda() (head_dim at most 128): computed there, on torch's
        current stream (that of another framework: the default one), and waited for.
    k: keys, the same shape and device; on CUDA the same dtype.

Raises:
    InvalidArgument: not an array, or another shape, dtype or device.
    Unsupported: on a device that this build does not compute on.
    NumericalError: a NaN or Inf (named by its place); with moments, a magnitude above 1e60.
        The object is then as it was before the call.
)")
      .def_static(
          "update_in_turn",
          [](const std::vector<Scorer*>& scorers, py::handle q, py::handle k, bool wait) {
            const auto held = Scorer::held(scorers);
            const bool named = !scorers.empty() && scorers[0] != nullptr;
            const Array queries(q, named ? label(*scorers[0], "q") : "q");
            const Array keys(k, named ? label(*scorers[0], "k") : "k");
            Scorer::run_all(scorers, [&](const std::vector<AttentionScorer*>& objects) {
              AttentionScorer::update_in_turn(objects, queries.view(), keys.view(), wait);
            });
          },
          py::arg("scorers"), py::arg("q"), py::arg("k"), py::kw_only(), py::arg("wait") = true,
          R"(Adds image i of a batch to scorer i mod n; on a CUDA device in one pass over all of them.

Args:
    scorers: 1 to 8 different ones, of the same heads, head_dim, gamma and moments.
    q: queries, as update() takes them.
    k: keys.
    wait: False, on a CUDA device: return when the work is enqueued. What update() would raise for
        values is then raised by wait(), or by whatever asks for the sums: the scorer is then as it
        was before the first batch of its that held such values. The memory of q and k must stay as
        it is until their stream has got there.

Raises:
    InvalidArgument: no scorers, too many, the same one twice, or of different sizes; and as
        update() raises it.
    Unsupported: as update().
    NumericalError: as update(); scorers whose own images are sound may have them.
)")
      .def(
          "wait", [](Scorer& self) { self.run([](const AttentionScorer& s) { s.wait(); }); },
          R"(Waits for what update_in_turn() has enqueued.

Raises:
    NumericalError: a value that was not finite (or, with moments, too large).
    Error: the device failed.
)")
      .def(
          "update_grams",
          [](Scorer& self, py::handle query_gram, py::handle key_gram, py::handle key_mean,
             std::int64_t tokens) {
            const Array queries(query_gram, label(self, "query_gram"));
            const Array keys(key_gram, label(self, "key_gram"));
            const Array means(key_mean, label(self, "key_mean"));
            self.run([&](AttentionScorer& s) {
              s.update_grams(queries.view(), keys.view(), means.view(), tokens);
            });
          },
          py::arg("query_gram"), py::arg("key_gram"), py::arg("key_mean"), py::arg("tokens"),
          R"(Adds a batch of images by its Gram matrices, without the GIL.

For queries and keys that are where the core does not compute. In float64 from the first product,
or the scores of trained models are lost to rounding.

Args:
    query_gram: QᵀQ (images, heads, head_dim, head_dim), on the CPU; the upper triangle is read.
    key_gram: K_cᵀK_c, keys less their mean over the image's tokens, the same shape.
    key_mean: that mean, (images, heads, head_dim).
    tokens: of each image, at least 1.

Raises:
    InvalidArgument: not an array, another shape or dtype, or tokens below 1.
    Unsupported: not on the CPU.
    NumericalError: a NaN or Inf (named by its place), or a magnitude above 1e130.
        The object is then as it was before the call.
)")
      .def(
          "merge",
          [](Scorer& self, Scorer& other) {
            self.run_with(other, [](AttentionScorer& s, const AttentionScorer& o) { s.merge(o); });
          },
          py::arg("other"), R"(Adds what another scorer has seen.

Raises:
    InvalidArgument: other heads, head_dim, gamma or moments.
)")
      .def(
          "scores",
          [](Scorer& self) {
            return to_numpy(self.run([](const AttentionScorer& s) { return s.scores(); }),
                            Shapes(self).scores());
          },
          R"(Mean importance over images, (heads, head_dim).

Raises:
    InvalidArgument: no image has been seen.
)")
      .def("query_gram", &gram<&AttentionScorer::query_gram>,
           R"(Σ QᵀQ over images, (heads, head_dim, head_dim).

Raises:
    InvalidArgument: a scorer without moments.
)")
      .def("key_gram", &gram<&AttentionScorer::key_gram>,
           R"(Σ K_cᵀK_c over images, keys centred over each image's tokens.

Raises:
    InvalidArgument: a scorer without moments.
)")
      .def("score_gram", &gram<&AttentionScorer::score_gram>,
           R"(Σ (QᵀQ)∘(K_cᵀK_c) over images: inner products of the neurons' rank-one score maps.

Raises:
    InvalidArgument: a scorer without moments.
)")
      .def("state", &get_state, R"(Everything accumulated, as arrays to save.

Returns:
    ``images`` and ``tokens`` (1,) int64; ``score_sum`` (heads, head_dim); with moments
    ``query_gram``, ``key_gram``, ``score_gram`` (heads, d(d+1)/2): upper triangles, row by row.
)")
      .def("load_state", &set_state, py::arg("state"),
           R"(Replaces everything accumulated by what state() gave.

Raises:
    InvalidArgument: keys, shapes, dtypes or counts that do not fit this object.
    NumericalError: a value that is not finite. Nothing is replaced then.
)")
      .def("__repr__", &repr);
}

}  // namespace secateur::python
