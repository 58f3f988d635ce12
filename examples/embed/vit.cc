#include "vit.h"

#include <secateur/error.h>
#include <secateur/select.h>
#include <secateur/value_similarity.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace embed {
namespace {

using nlohmann::json;
using Tensors = std::map<std::string, Tensor>;

// Larger than any, and small enough for products of three.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 20;

/// A size in the fields, 0 where it is not there.
std::int64_t size_of(const json& sizes, const std::string& group, const std::string& file) {
  const auto found = sizes.find(group);
  if (found == sizes.end()) return 0;
  if (!found->is_number_unsigned() ||
      found->get<std::uint64_t>() > static_cast<std::uint64_t>(kMaxSize)) {
    refuse(file, "a size of " + group + " from 0 to " + std::to_string(kMaxSize), found->dump());
  }
  return found->get<std::int64_t>();
}

bool has(const Tensors& tensors, const std::string& name) { return tensors.count(name) > 0; }

/// Axis `axis` of a tensor that has to be there has `size` entries.
void check_axis(const Tensors& tensors, const std::string& name, std::size_t rank, std::size_t axis,
                std::int64_t size, const std::string& file) {
  const std::string what = file + ": " + name;
  const auto found = tensors.find(name);
  if (found == tensors.end()) refuse(what, "a tensor", "none");
  const std::vector<std::int64_t>& shape = found->second.shape;
  // Without data a size could be any: nothing that the file does not hold is to be allocated.
  if (shape.size() != rank || shape[axis] != size || found->second.bytes == 0) {
    refuse(what,
           std::to_string(rank) + " axes, axis " + std::to_string(axis) + " of size " +
               std::to_string(size) + ", none of size 0",
           "shape " + json(shape).dump());
  }
  view(found->second, nullptr, what);
}

/// The same for a layer's weight and, where it has one, its bias.
void check_rows(const Tensors& tensors, const std::string& layer, std::int64_t rows,
                const std::string& file) {
  check_axis(tensors, layer + ".weight", 2, 0, rows, file);
  if (has(tensors, layer + ".bias")) check_axis(tensors, layer + ".bias", 1, 0, rows, file);
}

/// The first tensor of a module that stands between a layer's neurons and what reads them.
void refuse_tied(const Tensors& tensors, const std::string& group,
                 const std::vector<std::string>& modules, const std::string& file) {
  for (const std::string& module : modules) {
    const auto found = tensors.lower_bound(module + ".");
    if (found != tensors.end() && found->first.compare(0, module.size() + 1, module + ".") == 0) {
      throw secateur::Unsupported(file + ": expected nothing but linear layers at " + group +
                                  ", got " + found->first);
    }
  }
}

/// Units that stay: as secateur.plan rounds, half to even.
std::int64_t kept_count(std::int64_t size, double fraction) {
  const auto gone = static_cast<std::int64_t>(std::nearbyint(fraction * static_cast<double>(size)));
  return std::max<std::int64_t>(1, size - gone);
}

Choice chosen(std::int64_t heads, std::int64_t size, double fraction, std::vector<double> scores) {
  Choice choice{heads, size, std::move(scores), {}};
  choice.kept = secateur::select({choice.scores.data(), secateur::DType::f64, {heads, size}},
                                 kept_count(size, fraction));
  return choice;
}

/// The indices of all heads in a matrix's rows, from `offset` on; of all of them without a choice.
void add_rows(std::vector<std::int64_t>& rows, std::int64_t offset, std::int64_t heads,
              std::int64_t size, const Choice* choice) {
  const std::int64_t kept =
      choice == nullptr ? size : static_cast<std::int64_t>(choice->kept.size()) / heads;
  for (std::int64_t head = 0; head < heads; ++head) {
    for (std::int64_t i = 0; i < kept; ++i) {
      const std::int64_t index =
          choice == nullptr ? i : choice->kept[static_cast<std::size_t>(head * kept + i)];
      rows.push_back(offset + head * size + index);
    }
  }
}

const Choice* find(const Choices& choices, const std::string& group) {
  const auto found = choices.find(group);
  return found == choices.end() ? nullptr : &found->second;
}

}  // namespace

std::vector<Block> read_blocks(const json& fields, const Tensors& tensors,
                               const std::string& file) {
  const auto sizes = fields.find("sizes");  // end() where the fields are no object
  if (!fields.is_object() || sizes == fields.end() || !sizes->is_object()) {
    refuse(file, "fields with an object of sizes", "none");
  }
  if (fields.value("family", json()) != "vision_transformer") {
    refuse(file, "a model of family vision_transformer", fields.value("family", json()).dump());
  }
  for (const auto& [key, type] : {std::pair("layouts", json::value_t::string),
                                  std::pair("softmax_scales", json::value_t::number_float)}) {
    const json values = fields.value(key, json::object());
    if (!values.is_object() ||
        !std::all_of(values.begin(), values.end(),
                     [wanted = type](const json& value) { return value.type() == wanted; })) {
      refuse(file, std::string("an object of ") + key, values.dump());
    }
  }
  std::vector<Block> blocks;
  for (std::int64_t i = 0;; ++i) {
    const std::string name = "blocks." + std::to_string(i);
    // A block that lost both layers has sizes of 0.
    if (!sizes->contains(name + ".attn") && !sizes->contains(name + ".mlp")) break;
    Block block{name};
    if (size_of(*sizes, name + ".attn", file) > 0) {
      block.heads = size_of(*sizes, name + ".heads", file);
      block.qk = size_of(*sizes, name + ".qk", file);
      block.v = size_of(*sizes, name + ".v", file);
      if (block.heads * block.qk * block.v == 0) {
        refuse(file, "sizes of heads, qk and v of " + name, "none, or 0");
      }
      check_rows(tensors, name + ".attn.qkv", block.heads * (2 * block.qk + block.v), file);
      check_axis(tensors, name + ".attn.proj.weight", 2, 1, block.heads * block.v, file);
    }
    if (size_of(*sizes, name + ".mlp", file) > 0) {
      block.ffn = size_of(*sizes, name + ".ffn", file);
      if (block.ffn == 0) refuse(file, "a size of " + name + ".ffn", "none, or 0");
      check_axis(tensors, name + ".mlp.fc2.weight", 2, 1, block.ffn, file);
    }
    blocks.push_back(block);
  }
  if (blocks.empty()) refuse(file, "at least one block", "none");
  return blocks;
}

void check_ratios(const std::vector<Block>& blocks, const Tensors& tensors, const Ratios& ratios,
                  const std::string& file) {
  for (const double ratio : {ratios.qk, ratios.v, ratios.ffn}) {
    if (!(ratio >= 0 && ratio < 1)) {
      refuse("ratios", "fractions from 0 to below 1", std::to_string(ratio));
    }
  }
  for (const Block& block : blocks) {
    const std::string attn = block.name + ".attn", mlp = block.name + ".mlp";
    if (block.heads > 0 && ratios.qk > 0) {
      refuse_tied(tensors, block.name + ".qk", {attn + ".q_norm", attn + ".k_norm"}, file);
    }
    if (block.heads > 0 && ratios.v > 0) {
      refuse_tied(tensors, block.name + ".v", {attn + ".norm", attn + ".gate"}, file);
    }
    if (block.ffn > 0 && ratios.ffn > 0) {
      refuse_tied(tensors, block.name + ".ffn", {mlp + ".norm", mlp + ".fc1_g", mlp + ".fc1_x"},
                  file);
      check_rows(tensors, mlp + ".fc1", block.ffn, file);  // a gated one has twice as many
    }
  }
}

QueryKeyScorer::QueryKeyScorer(const std::vector<Block>& blocks, std::int64_t gamma) {
  for (const Block& block : blocks) {
    if (block.heads == 0) continue;
    const secateur::AttentionScorer none(block.heads, block.qk, gamma, false, block.name + ".qk");
    layers_.push_back({block.name, none, none});
  }
}

void QueryKeyScorer::add(const Observed& batch) {
  for (Layer& layer : layers_) {
    const auto seen = batch.find(layer.block);
    if (seen == batch.end() || seen->second.q.data == nullptr || seen->second.k.data == nullptr) {
      refuse(layer.block, "queries and keys of every block that has attention", "none");
    }
    std::vector<secateur::AttentionScorer*> turns{&layer.even, &layer.odd};
    if (layer.even.images() > layer.odd.images()) std::swap(turns[0], turns[1]);
    secateur::AttentionScorer::update_in_turn(turns, seen->second.q, seen->second.k);
  }
}

Scores QueryKeyScorer::scores() const {
  Scores scores;
  for (const Layer& layer : layers_) {
    secateur::AttentionScorer all = layer.even;
    all.merge(layer.odd);
    scores[layer.even.name()] = all.scores();
  }
  return scores;
}

Choices choose(const std::vector<Block>& blocks, const Tensors& tensors, const Ratios& ratios,
               const Scores& query_key, const ReadRows& read_rows) {
  Choices choices;
  for (const Block& block : blocks) {
    const std::int64_t heads = block.heads;
    if (heads > 0 && ratios.qk > 0) {
      const std::string group = block.name + ".qk";
      choices[group] = chosen(heads, block.qk, ratios.qk, query_key.at(group));
    }
    if (heads > 0 && ratios.v > 0) {
      const std::string name = block.name + ".attn.qkv.weight";
      const secateur::TensorView rows =
          read_rows(name, tensors.at(name), 2 * heads * block.qk, heads * block.v);
      choices[block.name + ".v"] =
          chosen(heads, block.v, ratios.v, secateur::value_similarity(rows));
    }
    if (block.ffn > 0 && ratios.ffn > 0) {
      const std::string name = block.name + ".mlp.fc1.weight";
      const secateur::TensorView rows = read_rows(name, tensors.at(name), 0, block.ffn);
      choices[block.name + ".ffn"] =
          chosen(1, block.ffn, ratios.ffn, secateur::value_similarity(rows));
    }
  }
  return choices;
}

std::map<std::string, Cut> cuts_of(const std::vector<Block>& blocks, const Choices& choices,
                                   const Tensors& tensors) {
  std::map<std::string, Cut> cuts;
  const auto cut_rows = [&](const std::string& layer, const std::vector<std::int64_t>& keep) {
    cuts[layer + ".weight"] = {0, keep};
    if (has(tensors, layer + ".bias")) cuts[layer + ".bias"] = {0, keep};
  };
  for (const Block& block : blocks) {
    const Choice* const qk = find(choices, block.name + ".qk");
    const Choice* const v = find(choices, block.name + ".v");
    const Choice* const ffn = find(choices, block.name + ".ffn");
    if (qk != nullptr || v != nullptr) {
      std::vector<std::int64_t> rows, columns;
      const std::int64_t inner = block.heads * block.qk;
      add_rows(rows, 0, block.heads, block.qk, qk);
      add_rows(rows, inner, block.heads, block.qk, qk);
      add_rows(rows, 2 * inner, block.heads, block.v, v);
      cut_rows(block.name + ".attn.qkv", rows);
      if (v != nullptr) {
        add_rows(columns, 0, block.heads, block.v, v);
        cuts[block.name + ".attn.proj.weight"] = {1, columns};
      }
    }
    if (ffn != nullptr) {
      cut_rows(block.name + ".mlp.fc1", ffn->kept);
      cuts[block.name + ".mlp.fc2.weight"] = {1, ffn->kept};
    }
  }
  return cuts;
}

Tensors resized(Tensors tensors, const std::map<std::string, Cut>& cuts) {
  for (const auto& [name, cut] : cuts) {
    Tensor& tensor = tensors.at(name);
    tensor.shape[static_cast<std::size_t>(cut.axis)] = static_cast<std::int64_t>(cut.keep.size());
  }
  return tensors;
}

json updated(json fields, const std::vector<Block>& blocks, const Choices& choices) {
  for (const auto& [group, choice] : choices) {
    fields["sizes"][group] = static_cast<std::int64_t>(choice.kept.size()) / choice.heads;
  }
  for (const Block& block : blocks) {
    if (block.heads == 0) continue;
    const std::string attn = block.name + ".attn";
    bool cut = false;
    for (const auto& [group, size] :
         {std::pair(block.name + ".qk", block.qk), std::pair(block.name + ".v", block.v)}) {
      cut = cut || fields["sizes"].value(group, size) != size;
    }
    // timm's own class has a softmax scale of 1/sqrt(head size). The cut module keeps that of the
    // dense one, which the file has to say from now on.
    if (cut && fields.contains("layouts") && fields["layouts"].value(attn, "exact") == "stock") {
      fields["layouts"][attn] = "exact";
      fields["softmax_scales"][attn] = std::pow(static_cast<double>(block.qk), -0.5);
    }
  }
  return fields;
}

}  // namespace embed
