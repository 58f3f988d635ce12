// SNP's importance of value and FFN neurons (Shim et al., ECCV 2024, arXiv:2404.11630).
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

#include <vector>

namespace secateur {

/// For each row of weights, returns Σ over all other rows of 1 − |cos|, which is low for repeated
/// rows. weights: (rows, D), or (heads, head_dim, D) whose rows are compared across all heads. A
/// zero row scores 0 and has cosine 0 with every other row. Returns one float64 per row.
/// Throws InvalidArgument, Unsupported or NumericalError.
SECATEUR_API std::vector<double> value_similarity(const TensorView& weights);

/// The same for activations: cos_ij = C_ij / sqrt(C_ii C_jj) of a symmetric (R, R) second moment.
SECATEUR_API std::vector<double> value_similarity_from_moment(const TensorView& moment);

}  // namespace secateur
