/* The C interface from C: every function against values known in closed form, and every refusal. */
#include <math.h>
#include <secateur.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

static void check(int holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  fprintf(stderr, "line %d: expected %s; last message: %s\n", line, what, secateur_error_message());
}
#define CHECK(condition) check((condition) != 0, #condition, __LINE__)
#define CHECK_OK(call) CHECK((call) == SECATEUR_OK)

static void check_refused(secateur_status status, secateur_status expected, const char* text,
                          int line) {
  check(status == expected, text, line);
  check(strcmp(secateur_error_message(), text) == 0, text, line);
}
#define CHECK_REFUSED(call, status, text) check_refused(call, status, text, __LINE__)
#define CHECK_INVALID(call, text) CHECK_REFUSED(call, SECATEUR_INVALID_ARGUMENT, text)

static secateur_tensor tensor(void* data, int32_t dtype, int32_t rank, const int64_t* shape) {
  secateur_tensor made;
  CHECK_OK(secateur_tensor_init(&made, data, dtype, rank, shape));
  return made;
}

static secateur_tensor matrix(double* data, int64_t rows, int64_t columns) {
  int64_t shape[2];
  shape[0] = rows;
  shape[1] = columns;
  return tensor(data, SECATEUR_F64, 2, shape);
}

static void test_runtime(void) {
  const char* isa = NULL;
  CHECK_OK(secateur_isa(&isa));
  CHECK(isa != NULL && strlen(isa) >= 4);
  CHECK(strchr(secateur_version(), '.') != NULL);
  CHECK_OK(secateur_set_threads(2));
  CHECK(secateur_threads() == 2);
  CHECK_INVALID(secateur_set_threads(0), "n: expected 1 to 1024, got 0");
  CHECK(secateur_threads() == 2);
  CHECK_INVALID(secateur_isa(NULL), "isa: expected a pointer, got NULL");
}

static void test_tensors(void) {
  const int64_t shape[3] = {2, 3, 5};
  const int64_t large[3] = {2, INT64_C(1) << 40, INT64_C(1) << 40};
  float data[30] = {0};
  secateur_tensor x = tensor(data, SECATEUR_F32, 3, shape);
  CHECK(x.strides[0] == 15 && x.strides[1] == 5 && x.strides[2] == 1);
  CHECK(x.data == data && x.device_type == SECATEUR_CPU && x.rank == 3);
  CHECK_INVALID(secateur_tensor_init(&x, data, 4, 3, shape), "dtype: expected 0 to 3, got 4");
  CHECK_INVALID(secateur_tensor_init(&x, data, 0, 9, shape), "rank: expected 0 to 8, got 9");
  CHECK_INVALID(secateur_tensor_init(&x, data, 0, 3, NULL), "shape: expected a pointer, got NULL");
  CHECK_INVALID(secateur_tensor_init(&x, data, 0, 3, large),
                "shape: expected fewer than 2^63 elements, got (2, 1099511627776, 1099511627776)");
  CHECK(x.shape[2] == 5 && x.strides[0] == 15);
}

/* Two images of three tokens and one head of three channels: queries and keys of the first two are
 * orthogonal, so these are the singular vectors; the third is silent. */
static void test_attention_scorer(void) {
  const int64_t shape[4] = {2, 3, 1, 3};
  const int64_t wrong[4] = {2, 3, 3, 1};
  double q[18] = {1, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0};
  double k[18] = {0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0};
  double scores[3] = {9, 9, 9}, sums[3], grams[3][9], again[3];
  int64_t images = 0, tokens = 0;
  secateur_attention_scorer *scorer = NULL, *other = NULL;
  secateur_tensor queries = tensor(q, SECATEUR_F64, 4, shape);
  secateur_tensor keys = tensor(k, SECATEUR_F64, 4, shape);
  const secateur_tensor bad = tensor(k, SECATEUR_F64, 4, wrong);

  CHECK_INVALID(secateur_attention_scorer_create(0, 3, 8, 1, NULL, &scorer),
                "heads: expected 1 to 65536, got 0");
  CHECK(scorer == NULL);
  CHECK_OK(secateur_attention_scorer_create(1, 3, 8, 1, "first", &scorer));
  CHECK_INVALID(secateur_attention_scorer_scores(scorer, scores, 3),
                "first scores: expected at least one image, got none");
  CHECK_OK(secateur_attention_scorer_update(scorer, &queries, &keys));
  CHECK_OK(secateur_attention_scorer_counts(scorer, &images, &tokens));
  CHECK(images == 2 && tokens == 6);
  CHECK_OK(secateur_attention_scorer_scores(scorer, scores, 3));
  CHECK(fabs(scores[0] - 1) < 1e-12 && fabs(scores[1] - 1) < 1e-12 && scores[2] == 0);
  CHECK_INVALID(secateur_attention_scorer_scores(scorer, scores, 2), "size: expected 3, got 2");
  CHECK_INVALID(secateur_attention_scorer_scores(scorer, NULL, 3),
                "scores: expected a pointer, got NULL");

  /* Refused batches leave no trace. */
  CHECK(secateur_attention_scorer_update(scorer, &queries, &bad) == SECATEUR_INVALID_ARGUMENT);
  CHECK_INVALID(secateur_attention_scorer_update(scorer, &queries, NULL),
                "k: expected a pointer, got NULL");
  keys.dtype = -1;
  CHECK_INVALID(secateur_attention_scorer_update(scorer, &queries, &keys),
                "k.dtype: expected 0 to 3, got -1");
  keys.dtype = SECATEUR_F64;
  keys.rank = 99;
  CHECK_INVALID(secateur_attention_scorer_update(scorer, &queries, &keys),
                "k.rank: expected 0 to 8, got 99");
  keys.rank = 4;
  keys.device_type = SECATEUR_CUDA;
  /* With CUDA, memory of the host is not the device's. */
  CHECK(secateur_attention_scorer_update(scorer, &queries, &keys) == SECATEUR_UNSUPPORTED ||
        secateur_has_cuda());
  keys.device_type = SECATEUR_CPU;
  q[4] = NAN;
  CHECK_REFUSED(secateur_attention_scorer_update(scorer, &queries, &keys), SECATEUR_NUMERICAL_ERROR,
                "first q: expected finite values, got nan at (image 0, token 1, head 0, channel "
                "1)");
  q[4] = 2;
  CHECK_OK(secateur_attention_scorer_scores(scorer, again, 3));
  CHECK(memcmp(scores, again, sizeof scores) == 0);

  /* What is saved and loaded again, and added to itself, has the same mean. */
  CHECK_OK(secateur_attention_scorer_sum(scorer, SECATEUR_SCORE_SUM, sums, 3));
  CHECK(sums[0] == 2 * scores[0] && sums[2] == 0);
  CHECK_OK(secateur_attention_scorer_sum(scorer, SECATEUR_QUERY_GRAM, grams[0], 9));
  CHECK_OK(secateur_attention_scorer_sum(scorer, SECATEUR_KEY_GRAM, grams[1], 9));
  CHECK_OK(secateur_attention_scorer_sum(scorer, SECATEUR_SCORE_GRAM, grams[2], 9));
  CHECK(grams[0][0] == 10 && grams[0][4] == 5 && grams[0][1] == 0 && grams[0][8] == 0);
  CHECK_INVALID(secateur_attention_scorer_sum(scorer, 4, sums, 3), "which: expected 0 to 3, got 4");
  CHECK_OK(secateur_attention_scorer_create(1, 3, 8, 1, NULL, &other));
  CHECK_INVALID(
      secateur_attention_scorer_load(other, images, tokens, sums, grams[0], grams[1], NULL),
      "score_gram: expected a pointer, got NULL");
  CHECK_OK(
      secateur_attention_scorer_load(other, images, tokens, sums, grams[0], grams[1], grams[2]));
  CHECK_OK(secateur_attention_scorer_merge(other, scorer));
  CHECK_OK(secateur_attention_scorer_scores(other, again, 3));
  CHECK(memcmp(scores, again, sizeof scores) == 0);
  CHECK_OK(secateur_attention_scorer_counts(other, &images, NULL));
  CHECK(images == 4);
  secateur_attention_scorer_destroy(other);

  CHECK_OK(secateur_attention_scorer_create(1, 3, 8, 0, NULL, &other));
  CHECK_INVALID(secateur_attention_scorer_merge(other, scorer),
                "other: expected a scorer without moments, got one with");
  CHECK_INVALID(secateur_attention_scorer_load(other, 2, 6, sums, grams[0], NULL, NULL),
                "query_gram: expected NULL for a scorer without moments, got a pointer");
  CHECK_INVALID(secateur_attention_scorer_sum(other, SECATEUR_KEY_GRAM, grams[1], 9),
                "key_gram: expected a scorer with moments, got one without");
  CHECK_OK(secateur_attention_scorer_load(other, 2, 6, sums, NULL, NULL, NULL));
  CHECK_INVALID(secateur_attention_scorer_update(NULL, &queries, &keys),
                "scorer: expected a pointer, got NULL");
  secateur_attention_scorer_destroy(other);
  secateur_attention_scorer_destroy(scorer);
  secateur_attention_scorer_destroy(NULL);
}

/* One image of two tokens, one head, two channels: queries (3, 0), (0, 1) and keys (1, 0), (1, 4).
 */
static void test_grams(void) {
  const int64_t shape[4] = {1, 2, 1, 2}, grams[4] = {1, 1, 2, 2}, mean[3] = {1, 1, 2};
  double q[4] = {3, 0, 0, 1}, k[4] = {1, 0, 1, 4};
  double query[4] = {9, 0, 0, 1}, key[4] = {0, 0, 0, 8}, means[2] = {1, 2};
  double wanted[2], found[2];
  int64_t tokens = 0;
  secateur_attention_scorer *scorer = NULL, *other = NULL;
  const secateur_tensor queries = tensor(q, SECATEUR_F64, 4, shape);
  const secateur_tensor keys = tensor(k, SECATEUR_F64, 4, shape);
  const secateur_tensor query_gram = tensor(query, SECATEUR_F64, 4, grams);
  const secateur_tensor key_gram = tensor(key, SECATEUR_F64, 4, grams);
  const secateur_tensor key_mean = tensor(means, SECATEUR_F64, 3, mean);

  CHECK_OK(secateur_attention_scorer_create(1, 2, 1, 0, NULL, &scorer));
  CHECK_OK(secateur_attention_scorer_create(1, 2, 1, 0, NULL, &other));
  CHECK_OK(secateur_attention_scorer_update(scorer, &queries, &keys));
  CHECK_INVALID(secateur_attention_scorer_update_grams(other, &query_gram, &key_gram, &key_gram, 2),
                "key_mean: expected shape (images >= 1, 1, 2), got (1, 1, 2, 2)");
  CHECK_OK(secateur_attention_scorer_update_grams(other, &query_gram, &key_gram, &key_mean, 2));
  CHECK_OK(secateur_attention_scorer_counts(other, NULL, &tokens));
  CHECK(tokens == 2);
  CHECK_OK(secateur_attention_scorer_scores(scorer, wanted, 2));
  CHECK_OK(secateur_attention_scorer_scores(other, found, 2));
  CHECK(wanted[0] > 0.1 && wanted[0] < 0.9);
  CHECK(fabs(found[0] - wanted[0]) < 1e-12 && fabs(found[1] - wanted[1]) < 1e-12);
  secateur_attention_scorer_destroy(scorer);
  secateur_attention_scorer_destroy(other);
}

static void test_moment_accumulator(void) {
  const int64_t shape[3] = {1, 3, 2};
  float x[6] = {1, 2, 3, -4, 0, 0};
  double sum[2], second[4], again[4];
  int64_t rows = 0;
  secateur_moment_accumulator *moments = NULL, *other = NULL;
  const secateur_tensor values = tensor(x, SECATEUR_F32, 3, shape);

  CHECK_OK(secateur_moment_accumulator_create(2, "ffn", &moments));
  CHECK_OK(secateur_moment_accumulator_update(moments, &values, SECATEUR_ROW_NORM_NONE, 1, 0));
  CHECK_OK(secateur_moment_accumulator_rows(moments, &rows));
  CHECK(rows == 3);
  CHECK_OK(secateur_moment_accumulator_sums(moments, sum, 2, second, 4));
  CHECK(sum[0] == 4 && sum[1] == -2);
  CHECK(second[0] == 10 && second[1] == -10 && second[2] == -10 && second[3] == 20);
  CHECK_INVALID(secateur_moment_accumulator_sums(moments, sum, 2, second, 3),
                "second_moment_size: expected 4, got 3");
  CHECK_OK(secateur_moment_accumulator_sums(moments, NULL, 0, second, 4));

  CHECK_OK(secateur_moment_accumulator_create(2, NULL, &other));
  CHECK_OK(secateur_moment_accumulator_load(other, rows, sum, second));
  CHECK_OK(secateur_moment_accumulator_merge(other, moments));
  CHECK_OK(secateur_moment_accumulator_sums(other, NULL, 0, again, 4));
  CHECK(again[0] == 20 && again[1] == -20 && again[3] == 40);
  CHECK_INVALID(secateur_moment_accumulator_update(other, &values, 3, 1, 0),
                "norm: expected 0 to 2, got 3");
  secateur_moment_accumulator_destroy(other);

  /* RMSNorm of the middle token alone: (3, -4) over sqrt((9 + 16) / 2). */
  CHECK_OK(secateur_moment_accumulator_create(2, NULL, &other));
  CHECK_OK(secateur_moment_accumulator_update(other, &values, SECATEUR_ROW_NORM_RMS, 3, 1));
  CHECK_OK(secateur_moment_accumulator_sums(other, sum, 2, NULL, 0));
  CHECK(fabs(sum[0] - 3 / sqrt(12.5)) < 1e-6 && fabs(sum[1] + 4 / sqrt(12.5)) < 1e-6);
  secateur_moment_accumulator_destroy(other);
  secateur_moment_accumulator_destroy(moments);
}

static void test_functions(void) {
  double rows[6] = {1, 0, 0, 2, -3, 0}; /* (3, 2): the first and last are parallel */
  double moment[4] = {4, 2, 2, 4};
  double inverse[4] = {0.5, 0, 0, 0.25}; /* of inputs whose second moments are 2 and 4 */
  double weights[4] = {3, 0, 1, 1};
  double scores[3], costs[2], values[6] = {0.1, 0.3, 0.2, 3, 1, 2};
  float data[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  const int64_t shape[2] = {3, 4}, columns[2] = {1, 3}, unsorted[2] = {3, 1};
  int64_t indices[4], order[2];
  secateur_tensor x = matrix(rows, 3, 2), c = matrix(moment, 2, 2);

  CHECK_OK(secateur_value_similarity(&x, scores, 3));
  CHECK(fabs(scores[0] - 1) < 1e-12 && fabs(scores[1] - 2) < 1e-12 && fabs(scores[2] - 1) < 1e-12);
  CHECK_INVALID(secateur_value_similarity(&x, scores, 6), "size: expected 3, got 6");
  CHECK_OK(secateur_value_similarity_from_moment(&c, scores, 2));
  CHECK(fabs(scores[0] - 0.5) < 1e-12 && fabs(scores[1] - 0.5) < 1e-12);

  x = matrix(values, 2, 3);
  CHECK_OK(secateur_select(&x, 2, indices, 4));
  CHECK(indices[0] == 1 && indices[1] == 2 && indices[2] == 0 && indices[3] == 2);
  CHECK_INVALID(secateur_select(&x, 4, indices, 4), "keep: expected 1 to 3, got 4");

  /* Alone, each costs its weights' energy times its moment: 9 * 2 and 2 * 4. */
  x = matrix(inverse, 2, 2);
  c = matrix(weights, 2, 2);
  CHECK_OK(secateur_eliminate(&x, &c, 2, order, costs));
  CHECK(order[0] == 1 && order[1] == 0);
  CHECK(fabs(costs[0] - 8) < 1e-12 && fabs(costs[1] - 18) < 1e-12);
  CHECK_INVALID(secateur_eliminate(&x, &c, 3, order, costs), "count: expected 0 to 2, got 3");

  x = tensor(data, SECATEUR_F32, 2, shape);
  CHECK(secateur_compact(&x, 1, unsorted, 2) == SECATEUR_INVALID_ARGUMENT);
  CHECK(secateur_compact(&x, 1, columns, 0) == SECATEUR_INVALID_ARGUMENT);
  CHECK(secateur_compact(&x, 2, columns, 2) == SECATEUR_INVALID_ARGUMENT);
  CHECK(x.shape[1] == 4 && data[1] == 1);
  CHECK_OK(secateur_compact(&x, 1, columns, 2));
  CHECK(x.shape[0] == 3 && x.shape[1] == 2 && x.strides[0] == 2);
  CHECK(data[0] == 1 && data[1] == 3 && data[2] == 5 && data[3] == 7 && data[5] == 11);
}

int main(void) {
  CHECK(strcmp(secateur_error_message(), "") == 0);
  test_runtime();
  test_tensors();
  test_attention_scorer();
  test_grams();
  test_moment_accumulator();
  test_functions();
  if (failures == 0) puts("ok");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
