// Greedy backward elimination of a layer's inputs: the optimal brain surgeon for groups.
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <vector>

namespace secateur {

struct Elimination {
  std::vector<std::int64_t> order;  ///< (count): the inputs, in the order of their removal
  std::vector<double> costs;        ///< (count): the least-squares error that each adds
};

/// Removes `count` inputs of a linear layer greedily, each time the one that the others compensate
/// best (ties: the lower index). A smaller count returns a prefix of the same order.
///
/// inverse: (n, n), symmetric positive definite, the inverse of the inputs' ridged second moment or
/// covariance C; of two elements that differ by rounding, either may count. weights: (n, outputs),
/// row j holds the weights of input j. Removing j costs ‖w_j‖² / [C⁻¹]_jj, replaces w_i by w_i −
/// [C⁻¹]_ij / [C⁻¹]_jj w_j, and C⁻¹ by the inverse of C without row and column j (Hassibi & Stork,
/// NIPS 1992; for groups, arXiv:2608.17657). The running sum of costs is tr((W − Ŵ)ᵀ C (W − Ŵ)) for
/// the best Ŵ on the inputs that remain.
///
/// Computed in float64, with the same bits for any number of threads. A diagonal entry of C⁻¹
/// shrinks with every removal, for a positive definite C down to 1 / C_ii and never to 0; its
/// absolute error is of the order of ε times its original value. If no more than n ε of that value
/// remains, the input is a linear combination of others to working precision: C⁻¹ no longer
/// determines the cost of its removal, and a larger ridge is needed.
/// Throws InvalidArgument (shapes, 0 <= count <= n, asymmetry, a diagonal that is not positive),
/// Unsupported, or NumericalError: NaN, Inf, costs beyond float64, or a diagonal lost as above or
/// because the matrix is not positive definite.
SECATEUR_API Elimination eliminate(const TensorView& inverse, const TensorView& weights,
                                   std::int64_t count);

}  // namespace secateur
