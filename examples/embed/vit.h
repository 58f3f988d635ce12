// A ViT in one of secateur's model files: what its layers are, which neurons can leave, and what
// then changes in the file. As secateur.plan(method="snp", ratios=...) and secateur.prune.
#pragma once

#include <secateur/attention_scorer.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "safetensors.h"

namespace embed {

/// One block; a size is 0 where the block has no such layer.
struct Block {
  std::string name;  ///< "blocks.3"
  std::int64_t heads = 0;
  std::int64_t qk = 0;   ///< query/key neurons of a head
  std::int64_t v = 0;    ///< value neurons of a head
  std::int64_t ffn = 0;  ///< hidden units
};

/// The blocks that a header's fields describe, checked against the tensors that they name.
/// Throws secateur::InvalidArgument.
std::vector<Block> read_blocks(const nlohmann::json& fields,
                               const std::map<std::string, Tensor>& tensors,
                               const std::string& file);

/// Fractions removed, from 0 to below 1.
struct Ratios {
  double qk = 0, v = 0, ffn = 0;
};

/// Refuses ratios that are none, and neurons of a kind that is cut where they are tied to something
/// that this program does not cut. Throws secateur::InvalidArgument or Unsupported.
void check_ratios(const std::vector<Block>& blocks, const std::map<std::string, Tensor>& tensors,
                  const Ratios& ratios, const std::string& file);

/// Queries and keys of one layer over images, (images, tokens, heads, head_dim) each, in memory of
/// whoever ran the model.
struct Attention {
  secateur::TensorView q{}, k{};
};
/// What an inference stack saw of a batch of images, by block name.
using Observed = std::map<std::string, Attention>;
/// Mean importance of query/key neurons, (heads, size), by group: "blocks.3.qk".
using Scores = std::map<std::string, std::vector<double>>;

/// Scores query/key neurons over batches of images, with the same bits however the images are
/// divided into batches.
class QueryKeyScorer {
 public:
  QueryKeyScorer(const std::vector<Block>& blocks, std::int64_t gamma);

  /// Adds a batch. Throws secateur::InvalidArgument or NumericalError, and is of no use then.
  void add(const Observed& batch);
  Scores scores() const;

 private:
  // calibrate adds up even and odd images apart, and the sums of floating point numbers depend on
  // their order.
  struct Layer {
    std::string block;
    secateur::AttentionScorer even, odd;
  };

  std::vector<Layer> layers_{};
};

/// What was found for one group of neurons.
struct Choice {
  std::int64_t heads = 1;
  std::int64_t size = 0;             ///< neurons of a head
  std::vector<double> scores{};      ///< (heads, size)
  std::vector<std::int64_t> kept{};  ///< (heads, kept of each), ascending
};
using Choices = std::map<std::string, Choice>;  ///< by group

/// Reads whole rows of a matrix for as long as the next call is not made.
using ReadRows = std::function<secateur::TensorView(const std::string& name, const Tensor& tensor,
                                                    std::int64_t first, std::int64_t count)>;

/// Scores values and FFN channels, and selects. What check_ratios() refuses has been refused;
/// query_key is of all blocks where its neurons are cut. Throws secateur::InvalidArgument.
Choices choose(const std::vector<Block>& blocks, const std::map<std::string, Tensor>& tensors,
               const Ratios& ratios, const Scores& query_key, const ReadRows& read_rows);

/// What stays of a tensor along an axis.
struct Cut {
  std::int64_t axis = 0;
  std::vector<std::int64_t> keep{};
};

/// Cuts by tensor name.
std::map<std::string, Cut> cuts_of(const std::vector<Block>& blocks, const Choices& choices,
                                   const std::map<std::string, Tensor>& tensors);

/// The tensors with the sizes that are left.
std::map<std::string, Tensor> resized(std::map<std::string, Tensor> tensors,
                                      const std::map<std::string, Cut>& cuts);

/// The fields that say so.
nlohmann::json updated(nlohmann::json fields, const std::vector<Block>& blocks,
                       const Choices& choices);

}  // namespace embed
