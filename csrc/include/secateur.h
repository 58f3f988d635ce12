/* The C interface of secateur: the functions of the C++ headers in <secateur/...>, for other
 * languages.
 *
 * Every function that can fail returns a secateur_status. On failure, nothing that the caller owns
 * has been changed, secateur_error_message() tells the reason, and no exception leaves the library.
 * Pointers may not be NULL unless a comment allows it: NULL is refused.
 *
 * Results are written to the caller's memory, whose size in elements is passed and must be exact.
 */
#ifndef SECATEUR_H
#define SECATEUR_H

#include <secateur/export.h>

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum secateur_status {
  SECATEUR_OK = 0,
  SECATEUR_INVALID_ARGUMENT = 1, /* an argument is invalid */
  SECATEUR_UNSUPPORTED = 2,      /* not on this device, or not in this build */
  SECATEUR_NUMERICAL_ERROR = 3,  /* NaN, Inf, or values that do not fit into float64 */
  SECATEUR_OUT_OF_MEMORY = 4,
  SECATEUR_INTERNAL_ERROR = 5, /* a fault of the library itself */
  SECATEUR_DEVICE_ERROR = 6    /* a CUDA device is out of memory or failed */
} secateur_status;

/* Why the last failed call on this thread failed: "<argument>: expected <what>, got <what>"; "" if
 * none has failed. Valid until the next call that fails on this thread. */
SECATEUR_API const char* secateur_error_message(void);

/* Runtime */

/* "major.minor.patch"; valid as long as the library is loaded. */
SECATEUR_API const char* secateur_version(void);
/* Instruction set of the kernels: "baseline", "avx2", "avx512" or "neon"; fails if the environment
 * variable SECATEUR_ISA names one that this machine lacks. Valid while the library is loaded. */
SECATEUR_API secateur_status secateur_isa(const char** isa);
/* Nonzero if this build computes on CUDA devices: scorers' and accumulators' updates and
 * secateur_compact. */
SECATEUR_API int32_t secateur_has_cuda(void);
/* Number of threads a call may use, including the caller's. Results do not depend on it. */
SECATEUR_API int32_t secateur_threads(void);
/* 1 to 1024. */
SECATEUR_API secateur_status secateur_set_threads(int32_t n);

/* Tensors */

/* Values of secateur_tensor.dtype. */
typedef enum secateur_dtype {
  SECATEUR_F32 = 0,
  SECATEUR_F16 = 1,
  SECATEUR_BF16 = 2,
  SECATEUR_F64 = 3
} secateur_dtype;

/* Values of secateur_tensor.device_type. */
typedef enum secateur_device_type { SECATEUR_CPU = 0, SECATEUR_CUDA = 1 } secateur_device_type;

#define SECATEUR_MAX_RANK 8

/* Memory of the caller, which must stay alive and unchanged during a call. Strides count elements
 * and may be negative or zero; data is the element at index 0 of every axis. */
typedef struct secateur_tensor {
  void* data;
  int32_t dtype;       /* secateur_dtype */
  int32_t device_type; /* secateur_device_type */
  int32_t device_index;
  int32_t rank; /* 0 to SECATEUR_MAX_RANK */
  int64_t shape[SECATEUR_MAX_RANK];
  int64_t strides[SECATEUR_MAX_RANK];
  void* stream; /* CUDA: the cudaStream_t to work on; NULL for the default stream */
} secateur_tensor;

/* Fills in a row-major tensor on the CPU. */
SECATEUR_API secateur_status secateur_tensor_init(secateur_tensor* tensor, void* data,
                                                  int32_t dtype, int32_t rank,
                                                  const int64_t* shape);

/* Query/key importance: see <secateur/attention_scorer.h>. Use an object from one thread at a time.
 */

typedef struct secateur_attention_scorer secateur_attention_scorer;

/* gamma: leading singular triplets that count (8 in SNP). moments: nonzero to accumulate Gram
 * matrices too. name: a prefix of every error of this object; may be NULL. */
SECATEUR_API secateur_status secateur_attention_scorer_create(int64_t heads, int64_t head_dim,
                                                              int64_t gamma, int32_t moments,
                                                              const char* name,
                                                              secateur_attention_scorer** scorer);
/* NULL is allowed. */
SECATEUR_API void secateur_attention_scorer_destroy(secateur_attention_scorer* scorer);
/* q, k: (images, tokens, heads, head_dim). */
SECATEUR_API secateur_status secateur_attention_scorer_update(secateur_attention_scorer* scorer,
                                                              const secateur_tensor* q,
                                                              const secateur_tensor* k);
/* The same by Gram matrices in float64, on the CPU: of queries, and of keys minus their mean over
 * an image's tokens, (images, heads, head_dim, head_dim) each; and that mean, (images, heads,
 * head_dim). */
SECATEUR_API secateur_status secateur_attention_scorer_update_grams(
    secateur_attention_scorer* scorer, const secateur_tensor* query_gram,
    const secateur_tensor* key_gram, const secateur_tensor* key_mean, int64_t tokens);
/* Adds the sums of another scorer of the same sizes. */
SECATEUR_API secateur_status secateur_attention_scorer_merge(
    secateur_attention_scorer* scorer, const secateur_attention_scorer* other);
/* Images seen and their tokens; either may be NULL. */
SECATEUR_API secateur_status secateur_attention_scorer_counts(
    const secateur_attention_scorer* scorer, int64_t* images, int64_t* tokens);
/* Mean scores, heads * head_dim. */
SECATEUR_API secateur_status secateur_attention_scorer_scores(
    const secateur_attention_scorer* scorer, double* scores, size_t size);

/* The accumulated sums of a scorer, for saving and loading. */
typedef enum secateur_scorer_sum {
  SECATEUR_SCORE_SUM = 0,  /* heads * head_dim */
  SECATEUR_QUERY_GRAM = 1, /* heads * head_dim * head_dim, symmetric: with moments only */
  SECATEUR_KEY_GRAM = 2,
  SECATEUR_SCORE_GRAM = 3
} secateur_scorer_sum;

/* One sum over images, row-major. `which` is a secateur_scorer_sum. */
SECATEUR_API secateur_status secateur_attention_scorer_sum(const secateur_attention_scorer* scorer,
                                                           int32_t which, double* values,
                                                           size_t size);
/* Replaces everything accumulated. The Grams are NULL without moments; only their upper triangles
 * are read. */
SECATEUR_API secateur_status secateur_attention_scorer_load(
    secateur_attention_scorer* scorer, int64_t images, int64_t tokens, const double* score_sum,
    const double* query_gram, const double* key_gram, const double* score_gram);

/* Moments of features: see <secateur/moment_accumulator.h>. Use an object from one thread at a
 * time. */

typedef struct secateur_moment_accumulator secateur_moment_accumulator;

/* How a row is normalised before it is accumulated. */
typedef enum secateur_row_norm {
  SECATEUR_ROW_NORM_NONE = 0,
  SECATEUR_ROW_NORM_RMS = 1,
  SECATEUR_ROW_NORM_LAYER = 2
} secateur_row_norm;

SECATEUR_API secateur_status secateur_moment_accumulator_create(
    int64_t dim, const char* name, secateur_moment_accumulator** accumulator);
/* NULL is allowed. */
SECATEUR_API void secateur_moment_accumulator_destroy(secateur_moment_accumulator* accumulator);
/* x: (..., dim). norm is a secateur_row_norm. With a stride above 1, x is (images, tokens, dim) and
 * of image b only the tokens n = phase + b (mod stride) are used. */
SECATEUR_API secateur_status secateur_moment_accumulator_update(
    secateur_moment_accumulator* accumulator, const secateur_tensor* x, int32_t norm,
    int64_t stride, int64_t phase);
SECATEUR_API secateur_status secateur_moment_accumulator_merge(
    secateur_moment_accumulator* accumulator, const secateur_moment_accumulator* other);
SECATEUR_API secateur_status
secateur_moment_accumulator_rows(const secateur_moment_accumulator* accumulator, int64_t* rows);
/* Sum of the rows, dim, and of their outer products, dim * dim, symmetric. Either may be NULL with
 * a size of 0. */
SECATEUR_API secateur_status
secateur_moment_accumulator_sums(const secateur_moment_accumulator* accumulator, double* sum,
                                 size_t sum_size, double* second_moment, size_t second_moment_size);
/* Replaces everything accumulated; only the upper triangle of the second moment, dim * dim, is
 * read. */
SECATEUR_API secateur_status
secateur_moment_accumulator_load(secateur_moment_accumulator* accumulator, int64_t rows,
                                 const double* sum, const double* second_moment);

/* Functions */

/* See <secateur/value_similarity.h>. weights: (rows, D) or (heads, head_dim, D); one score per row.
 */
SECATEUR_API secateur_status secateur_value_similarity(const secateur_tensor* weights,
                                                       double* scores, size_t size);
/* moment: (rows, rows), symmetric. */
SECATEUR_API secateur_status secateur_value_similarity_from_moment(const secateur_tensor* moment,
                                                                   double* scores, size_t size);
/* The `keep` highest of each row of scores (groups, n), ascending: groups * keep indices. */
SECATEUR_API secateur_status secateur_select(const secateur_tensor* scores, int64_t keep,
                                             int64_t* indices, size_t size);
/* See <secateur/eliminate.h>. inverse: (n, n); weights: (n, outputs); `count` inputs in the order
 * of their removal, and the cost of each. */
SECATEUR_API secateur_status secateur_eliminate(const secateur_tensor* inverse,
                                                const secateur_tensor* weights, int64_t count,
                                                int64_t* order, double* costs);
/* Keeps `count` indices, ascending, along an axis, in place (<secateur/compact.h>); the tensor is
 * then the view of the kept elements. */
SECATEUR_API secateur_status secateur_compact(secateur_tensor* tensor, int32_t dim,
                                              const int64_t* keep, size_t count);

#ifdef __cplusplus
}
#endif

#endif /* SECATEUR_H */
