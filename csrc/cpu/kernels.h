// The table of vectorised kernels: what the baseline files (tensors, threads, registration) call,
// and what every instruction set fills in. Plain pointers and sizes only.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "../strided_box.h"

namespace regularizers {

// Storage types of tensors, in the order of the tables below.
enum StorageType { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3, kStorageTypes = 4 };

struct DropoutKernels {
  // to[e] = keep(e) ? scale * from[e] : 0 for logical elements begin <= e < end of one sample.
  void (*sample)(const StridedBox& box, const void* from, void* to, int64_t begin, int64_t end,
                 PhiloxStream source, double p);
  // to[e] = scale * sum over s of (keep_s(e) ? from[s][e] : 0); stream of sample s is s.
  void (*adjoint)(const StridedBox& box, const void* from, int64_t from_sample_stride,
                  int64_t num_samples, void* to, int64_t begin, int64_t end, uint64_t seed,
                  double p);
};

// One call of masked linear cross-entropy. Effective row e = (row, sample) of a chunk sits at
// position (row - chunk_row) * chunk_samples + (sample - chunk_sample). A is the accumulation type
// (double for double, else float).
struct MaskedLinearCrossEntropy {
  // Inputs. class_weight and bias are of type A and padded to padded_classes (with 0); null
  // without.
  int64_t rows, features, classes, num_samples;
  const void* x;       // T [rows, features]
  const void* weight;  // T [classes, features]
  const void* bias;
  const int64_t* target;
  const void* class_weight;
  int64_t ignore_index;
  double label_smoothing;
  double class_weight_sum;
  uint64_t seed;
  DropRule rule;
  double scale;             // 1 / (1 - p)
  const double* row_scale;  // [rows], gradient of the result with respect to the mean loss of one
                            // (row, sample)
  // Scratch, all of type A, but the mask bytes.
  int64_t padded_classes;
  void* weight_by_class;    // panels of classes: [panel][features][width]
  void* weight_by_feature;  // panels of features: [panel][classes][width]
  int64_t chunk_row, chunk_sample, chunk_samples, chunk_capacity;
  void* operand;    // masked features, panels of features: [panel][chunk_capacity][width]
  uint8_t* keep;    // like operand, one byte an element
  void* logits;     // [chunk_capacity][padded_classes], overwritten by the gradient of the logits
  void* widened_x;  // [chunk rows][features], for storage types narrower than A
  // Outputs.
  double* row_loss;   // [rows], summed over samples
  void* grad_x;       // A [rows, features] or null
  void* grad_weight;  // A [classes, features], empty where it is not wanted
  void* grad_bias;    // A [classes], likewise
};

struct MaskedLinearCrossEntropyKernels {
  int64_t panel_width;
  // Panels [begin, end) of the two packed forms of the weight.
  void (*pack_by_class)(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end);
  void (*pack_by_feature)(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end);
  // Rows [begin, end), counted from chunk_row: operand, logits, loss, and with gradients the
  // gradient of logits and of x.
  void (*rows)(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end, bool gradients);
  // Adds the chunk's contribution for feature panels [begin, end) / classes [begin, end).
  void (*weight_gradient)(const MaskedLinearCrossEntropy& problem, int64_t chunk_size,
                          int64_t begin, int64_t end);
  void (*bias_gradient)(const MaskedLinearCrossEntropy& problem, int64_t chunk_size, int64_t begin,
                        int64_t end);
};

// One sweep over one problem of entropic optimal transport; the arithmetic and its notation are in
// sinkhorn_kernels.h. A is the accumulation type of the cost's storage type T. Arrays over columns
// are padded to whole vectors.
struct SinkhornSweep {
  int64_t rows, columns, padded_columns;
  double epsilon;
  const void* cost;  // T [rows, columns], rows cost_stride elements apart
  int64_t cost_stride;
  void* kernel;  // A [rows, kernel_stride], the stored kernel K, or null
  int64_t kernel_stride;
  const void* a;      // A [rows]
  const void* shift;  // A [padded]: beta_j + epsilon log b_j, -inf where b_j = 0 and in the padding
  const void* v;      // A [padded]
  void* alpha;        // A [rows]
  void* row_sum;      // A [rows], r_i
  void* log_u;        // A [rows]; not touched where omega = tau = 1, when u_i = 1 / r_i
  double tau, omega;  // f = f_old + omega (tau F - f_old)
  const double* f_old;  // [rows], for a log_sweep with omega or tau other than 1, or of points
  bool cold;            // f_old does not say where f is going to be
};

// The update of the columns that follows a sweep.
struct SinkhornColumns {
  int64_t columns, padded_columns, blocks;
  double epsilon, tau, omega;
  const void* partial;  // A [blocks, padded], what the sweep's row blocks accumulated
  const void* b;        // A [padded], 0 in the padding
  const void* shift;    // as above
  void* v;              // A [padded]
  void* log_v;          // A [padded]; neither read nor moved where omega = tau = 1
  void* sum;            // A [padded], total of `partial`
  // Results of `measure`.
  double residual_sum, residual_max, mass, lowest_ratio;
  bool underflow;  // some column with b_j > 0 has no usable sum
  // Result of `move`.
  double drift;  // largest |log v_j|
};

struct SinkhornKernels {
  int64_t lanes;
  // Exact log-sum-exp of the columns over rows [begin, end): base [padded] and sum [padded] with
  // sum_i a_i exp((f_i - C_ij) / epsilon) = exp(base_j / epsilon) sum_j; row_shift is
  // f_i + epsilon log a_i.
  void (*column_pass)(const SinkhornSweep& sweep, const void* row_shift, int64_t begin, int64_t end,
                      void* base, void* sum);
  // Rows [begin, end): new alpha, row_sum, log_u, the kernel where it is stored, and the
  // accumulated columns into partial [padded], unless that is null. Adds to the residual of the
  // rows, (sum, max). `scratch` holds kSinkhornStripe padded rows.
  void (*log_sweep)(const SinkhornSweep& sweep, int64_t begin, int64_t end, void* partial,
                    void* scratch, double* residual);
  // The same from the stored kernel.
  void (*kernel_sweep)(const SinkhornSweep& sweep, int64_t begin, int64_t end, void* partial,
                       double* residual);
  // Adds up `partial`, compares with the marginals.
  void (*measure)(SinkhornColumns& columns);
  // v for the new g.
  void (*move)(SinkhornColumns& columns);
  // plan = weight exp((row_shift_i + shift_j - C_ij) / epsilon) for rows [begin, end), of type T.
  void (*plan)(const SinkhornSweep& sweep, const void* row_shift, double weight, int64_t begin,
               int64_t end, void* plan);
};

// Points in place of a cost matrix; see sinkhorn_points_kernels.h.
enum PointCost : int64_t { kSquaredEuclidean = 0, kEuclidean = 1, kCosine = 2 };

struct SinkhornPoints {
  PointCost cost;
  int64_t features;
  double slope;              // kEuclidean: cost scale log2(e) / epsilon
  const void* x;             // A [rows, features], scaled
  const void* y;             // A panels of columns: [panel][features][width]
  const void* row_term;      // A [rows]
  const void* column_term;   // A [padded]
  const void* column_shift;  // A [padded], kEuclidean only
  double unit;               // log2(e) / epsilon
};

struct SinkhornPointsKernels {
  int64_t panel_width, tile_rows;
  // As SinkhornKernels::log_sweep, from points; `scratch` holds tile_rows padded rows. Takes the
  // potentials in f_old for anchors unless the sweep is cold.
  void (*sweep)(const SinkhornSweep& sweep, const SinkhornPoints& points, int64_t begin,
                int64_t end, void* partial, void* scratch, double* residual);
  // product [rows, width of the panels of v] = P v and row_sums [rows] = P 1 for rows [begin, end);
  // v is packed as panels [panel][padded columns][width]. With `over_distance` (kEuclidean), P_ij
  // is divided by |x_i - y_j|, and is 0 where that is 0. `scratch` holds tile_rows times
  // kApplyColumns.
  void (*apply)(const SinkhornSweep& sweep, const SinkhornPoints& points, const void* v,
                int64_t v_panels, bool over_distance, int64_t begin, int64_t end, void* product,
                void* row_sums, void* scratch);
};

constexpr int64_t kApplyColumns = 512;  // columns whose exponentials one step of `apply` keeps

constexpr int64_t kSinkhornStripe = 4;  // rows that are worked off together

// One call of a sliced statistic: projections p = z A of every view of z, and what is made of them
// a slice (column) at a time. View v takes group v / views_per_group of the slices. A is float or
// double.
struct Sketch {
  int64_t views_per_group, rows, features, slices;
  const void* z;                  // [views, rows, features]
  const void* slices_by_slice;    // panels of slices: [group][panel][features][width]
  const void* slices_by_feature;  // panels of features: [group][panel][slices][width]
  int64_t block_panels;           // panels of slices that a task holds at a time
  void* scratch;                  // of one worker, scratch(...) elements
  void* grad_z;                   // [views, rows, features] of one worker, added to; or null
};

// Characteristic sums at `knots` multiples of `spacing`, l = 1, ..., knots. Exactly one of these:
// sums is written; grad_sums is read; neither, and the Epps-Pulley statistic is computed.
struct Characteristic {
  Sketch sketch;
  int64_t knots;
  double spacing;
  double scale;               // of the statistic: 1 / (views x slices)
  const double* knot_weight;  // [knots] w_l phi_l
  const double* knot_target;  // [knots] phi_l
  void* sums;                 // [2][views][knots][slices]: cosine, sine
  const void* grad_sums;      // likewise
  int64_t views;
};

// Squared distance of the order statistics to quantiles.
struct Quantile {
  Sketch sketch;
  double scale;           // 1 / (views x rows x slices)
  const void* quantiles;  // [rows], ascending
};

struct SketchKernels {
  int64_t panel_width;
  void (*pack_columns)(const void* matrix, int64_t rows, int64_t columns, int64_t begin,
                       int64_t end, void* packed);
  void (*pack_rows)(const void* matrix, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                    void* packed);
  // Elements of scratch for one worker.
  int64_t (*characteristic_scratch)(const Characteristic& problem);
  int64_t (*quantile_scratch)(const Quantile& problem);
  // Panels of slices [begin, end) of one view; returns their part of the loss.
  double (*characteristic)(const Characteristic& problem, int64_t view, int64_t begin, int64_t end);
  double (*quantile)(const Quantile& problem, int64_t view, int64_t begin, int64_t end);
};

enum TransportRegularizer : int64_t { kEntropic = 0, kQuadratic = 1 };

// Semi-dual (beta is null) or dual of one regularized transport problem with an m x n plan. A is
// the accumulation type.
struct TransportProblem {
  int64_t rows, columns;  // m, n
  const void* cost;       // T [n][m]: row j is column j of the cost matrix
  const void* alpha;      // A [m]
  const void* beta;       // A [n] or null
  const void* mass;       // A [n], the column sums b
  double gamma;
  int64_t k;  // nonzeros a column may have; at most m
  int64_t regularizer;
};

struct SparseProjection {
  int64_t size, k;
  const void* v;  // T [rows][size]
  const void* z;  // T [rows] or null
  void* out;      // T [rows][size]
};

struct SparseProjectionBackward {
  int64_t size;
  const void* grad;  // T [rows][size]
  const void* out;   // T [rows][size], the projection
  void* grad_v;      // T [rows][size]
  void* grad_z;      // T [rows] or null
};

// Scratch of one task: each holds a row, rounded up to `padding` elements.
struct SparseOtScratch {
  void* score;  // A
  void* value;  // A
  void* peak;   // A, a quarter of a row
  int32_t* index;
};

struct SparseOtKernels {
  int64_t padding;
  // Columns [begin, end): adds to row_sums A [m], writes slopes A [n] (beta_j in the semi-dual,
  // the mass of the column in the dual), returns the sum of the conjugates.
  double (*dual)(const TransportProblem& problem, const SparseOtScratch& scratch, int64_t begin,
                 int64_t end, void* row_sums, void* slopes);
  void (*plan)(const TransportProblem& problem, const SparseOtScratch& scratch, int64_t begin,
               int64_t end, void* plan);
  void (*sparse_plan)(const TransportProblem& problem, const SparseOtScratch& scratch,
                      int64_t begin, int64_t end, void* values, int64_t* indices);
  void (*project)(const SparseProjection& problem, const SparseOtScratch& scratch, int64_t begin,
                  int64_t end);
  void (*project_backward)(const SparseProjectionBackward& problem, int64_t begin, int64_t end);
};

// Rows copied between the caller's order and that of their lengths; see nested_kernels.h.
struct PrefixRows {
  const void* from;
  void* to;
  const int64_t* order;  // [rows]: the caller's index of row i
  const int64_t* kept;   // [rows]: entries that are copied
  const int64_t* width;  // [rows]: entries that are written; behind `kept` zeros
  int64_t from_stride, to_stride;
};

struct PrefixKernels {
  void (*gather)(const PrefixRows& rows, int64_t begin, int64_t end);   // T -> A
  void (*scatter)(const PrefixRows& rows, int64_t begin, int64_t end);  // A -> T
};

// Stretches of rows that are mixed; T is the storage type, A its accumulation type.
struct MixKernels {
  // to[e] = first_weight first[e] + second_weight second[e]
  void (*blend)(const void* first, double first_weight, const void* second, double second_weight,
                void* to, int64_t count);
  // Returns the sum of (first[e] - second[e]) grad[e].
  double (*difference_product)(const void* first, const void* second, const void* grad,
                               int64_t count);
  // to[e] += from[e]
  void (*add)(const void* from, void* to, int64_t count);
};

// Which pixels of the planes [stream][sample][height][width] lie under no block of DropBlock.
struct DropBlockMask {
  int64_t batch, height, width, block_size;
  bool whole_blocks;  // blocks are centred only where they fit
  uint64_t seed;
  DropRule rule;        // of a block's centre
  uint8_t* keep;        // [streams][batch][height * width], 0xFF where kept, else 0
  int64_t* kept;        // [streams][batch]
  int64_t plane_bytes;  // scratch for a plane, its margins and what `spread` reads behind it
};

struct DropBlockKernels {
  // to[j] = keep[j] ? scale * from[j] : 0.
  void (*apply)(const void* from, void* to, const uint8_t* keep, int64_t elements, double scale);
};

struct RowGateKernels {
  // to[j] = residual[j] + factor * x[j]; residual may be null, and factor 0 leaves x alone.
  void (*gate)(const void* x, const void* residual, void* to, int64_t elements, double factor);
};

// One search in a codebook; the arithmetic is in code_search_kernels.h. A is the accumulation type
// of the storage type T.
struct CodeSearch {
  int64_t features, codes;
  const void* tokens;  // T [*, features]: the tokens, or the codebook where a draw begins
  const void* centre;  // A [features], the mean code
  void* panels;        // A [panel][features][width], codes relative to it
  void* offset;        // A [codes, padded to whole panels], -|e_j|^2 / 2
  // Of a draw alone.
  const int64_t* index;   // code of the token at every place
  const int64_t* places;  // which places are drawn; the place is the stream
  uint64_t seed;
  double slope, weight;  // of s_j and of the Gumbel variable
  int64_t* found;        // by place
};

constexpr int64_t kCodeRows = 256;  // tokens that are searched together

struct CodeSearchKernels {
  int64_t panel_width;
  // sums [features] += rows [begin, end) of the codebook.
  void (*add_codes)(const void* codebook, int64_t features, int64_t begin, int64_t end,
                    double* sums);
  // Panels [begin, end) and their offsets.
  void (*pack)(const CodeSearch& search, const void* codebook, int64_t begin, int64_t end);
  // Tokens / drawn places [begin, end), at most kCodeRows, whose rows fit `scratch`.
  void (*nearest)(const CodeSearch& search, int64_t begin, int64_t end, void* scratch);
  void (*draw)(const CodeSearch& search, int64_t begin, int64_t end, void* scratch);
};

// Attention of one (sample, head, list of keys); see subsampled_attention_kernels.h. Rows are
// tokens.
struct AttentionRows {
  const void* data;  // T
  int64_t stride;    // elements from one token to the next
};
struct AttentionOutput {
  void* data;
  int64_t stride;
};

struct Attention {
  int64_t features, value_features, keys;
  const int64_t* key_index;    // [keys], -1 for none
  const int64_t* query_index;  // queries of the list, -1 for none; null: query r is r
  const bool* own;             // [tokens]: sees its own key besides the list; or null
  AttentionRows q, k, v;
  AttentionRows bias;  // of the sample and head, or null
  int64_t bias_column;
  bool causal;
  double scale;
  AttentionOutput out;
  void* lse;  // A [queries], -inf where a query sees nothing
  AttentionRows grad;
  AttentionOutput grad_q, grad_k, grad_v, grad_bias;  // grad_bias may be null
};

struct AttentionKernels {
  int64_t block_rows;
  int64_t (*scratch)(const Attention& problem, bool backward);  // elements of A
  int64_t (*sums)(const Attention& problem);
  void (*forward)(const Attention& problem, void* scratch, int64_t begin, int64_t end);
  void (*backward)(const Attention& problem, void* scratch, int64_t begin, int64_t end, void* sums);
  void (*key_gradients)(const Attention& problem, void* sums, int64_t parts);
};

// All prefixes of a linear classifier; see prefix_scan_kernels.h. A is the accumulation type of T.
struct PrefixScan {
  int64_t features;  // of which prefixes are taken: up to the last that counts
  int64_t classes, padded_classes;
  int64_t x_stride;           // features of a row of x, of the weight and of log_sum_exp
  const void* x;              // T [rows][x_stride]
  const void* class_weights;  // T [classes][x_stride], for the accuracy
  const void* weight;         // A [features][padded_classes], zero in the padding
  const void* bias;           // A [padded_classes], -inf in the padding
  const int64_t* target;      // [rows]
  // Of the loss.
  const int64_t* rows;         // the rows that count
  const double* probs;         // [features]
  void* log_sum_exp;           // A [rows][x_stride]; not written where the probability is 0
  void* row_loss;              // A [rows]
  const double* row_gradient;  // [rows], gradient of the result with respect to a row's loss
  void* grad_x;                // T [rows][x_stride]
};

struct PrefixScanKernels {
  int64_t padding, lanes, tile_rows, checkpoint_steps;
  void (*accuracy)(const PrefixScan& problem, int64_t begin, int64_t end, void* scratch,
                   int64_t* correct);
  void (*loss)(const PrefixScan& problem, int64_t begin, int64_t end, void* scratch);
  // Adds to grad_weight A [features][padded_classes] and grad_bias A [padded_classes].
  void (*loss_gradient)(const PrefixScan& problem, int64_t begin, int64_t end, void* scratch,
                        void* grad_weight, void* grad_bias);
  void (*logits)(const PrefixScan& problem, int64_t begin, int64_t end, void* scratch, void* out,
                 int64_t out_step);
};

// What one optimizer step does to one tensor, with the scalars of its group worked out. A is the
// accumulation type; null where a column is absent.
struct AdamTensor {
  void* param;            // T
  const void* grad;       // T
  void* exp_avg;          // A
  void* exp_avg_sq;       // A
  void* max_exp_avg_sq;   // A, amsgrad
  void* master;           // A, the parameter in full precision
  const void* reference;  // T, what the decay pulls towards
  const uint8_t* mask;    // where the decay acts
  double grad_factor;     // of the raw gradient: unscaling and maximize
  double beta1, beta2, eps;
  double step_size;     // lr / (1 - beta1^t)
  double inverse_root;  // 1 / sqrt(1 - beta2^t)
  double slope, bound;  // the decay: x - clip(slope (x - reference), -bound, bound)
  bool decay_first;     // of the value before the step, as AdamW does, or of that after it
  bool stochastic;      // round to T with the words of `random`
  PhiloxStream random;
};

struct DecayKernels {
  // Elements [begin, end) of one tensor; returns the sum of |parameter| after the step. `begin`
  // is a multiple of kDecayBlock.
  double (*adam)(const AdamTensor& tensor, int64_t begin, int64_t end);
};

constexpr int64_t kDecayBlock = 128;  // elements whose random words are made together

// Log-sum-exp over pairs of points; the arithmetic is in pairwise_kernels.h. A is float or double.
// Arrays over points are padded to `padded`, so that whole vectors can be read.
enum PairKind : int64_t { kInnerProduct = 0, kSquaredDistance = 1, kDistance = 2 };
enum PairRule : int64_t {
  kEveryPair = 0,
  kSameLabel = 1,
  kOtherLabel = 2,
  kLabelWindow = 3,
  kFalselyNearExp = 4,
  kFalselyNearLinear = 5,
  kPairRules = 6
};

constexpr int64_t kPairBlock = 128;  // most rows or columns of a block

struct Pairwise {
  PairKind kind;
  PairRule rule;
  bool own;  // the columns are the rows
  bool exclude_self;
  int64_t rows, columns, features, padded;
  int64_t stride;            // of a block, at least its columns
  double unit;               // scale log2(e)
  const void* x;             // A [rows, features], times -2 for distances
  const void* y;             // A panels of columns: [panel][features][width]
  const void* x_norm;        // A [rows], squared; distances alone
  const void* y_norm;        // A [padded]
  const void* bias;          // A [padded], times log2(e)
  const void* row_label;     // integers as wide as A [padded]
  const void* column_label;  // likewise
  int64_t values;            // of a target
  const void* target;        // A [values, padded]
  const void* prediction;    // likewise
  double window;
  double push;  // kFalselyNearExp: times log2(e)
};

struct PairBlock {
  int64_t row, last_row, column, last_column;  // column: the first of a panel
};

// Of every point in the role of a row: the largest exponent, the sum of powers of 2 relative to it,
// the sum of the scores (all in base 2), and how many pairs; A [padded], the last integers as wide.
struct PairSums {
  void *top, *sum, *total, *count;
};

struct PairGradient {
  const void *logsumexp, *grad_logsumexp, *grad_total;  // A [padded], by row; the first in base 2
  const void *x, *y;  // A panels of features: [panel][points][width]
  int64_t padded_features;
  // Added to. Products A [points, padded_features], null where not wanted; sums A [padded]. Rows
  // and columns of a block write to arrays of their own.
  void *row_product, *column_product;
  void *row_sum, *column_sum;    // of what multiplies the points
  void *row_bias, *column_bias;  // derivatives in the bias
};

struct PairwiseKernels {
  int64_t panel_width;
  // Panels [begin, end) of points, and of features.
  void (*pack_points)(const void* points, int64_t count, int64_t features, int64_t begin,
                      int64_t end, void* packed);
  void (*pack_features)(const void* points, int64_t count, int64_t features, int64_t begin,
                        int64_t end, void* packed);
  // One block; `both`: its pairs count for the columns too (own: as pairs the other way round).
  // `block` holds kPairBlock lines of `stride`.
  void (*forward)(const Pairwise& pairs, const PairBlock& at, bool both, const PairSums& row_sums,
                  const PairSums& column_sums, void* block);
  void (*backward)(const Pairwise& pairs, const PairGradient& gradient, const PairBlock& at,
                   bool both, void* block);
};

// A floating-point format of 2 to 8 bits and how its codes lie in memory.
struct MiniFloatFormat {
  int64_t exp_bits, man_bits, bits;
  int64_t stored_bits;  // `bits`, without gaps, or 8
  int64_t largest;      // code of the largest number, or of infinity where there is one
  int64_t bias;
  bool is_signed, has_inf_nan;
};

struct MiniFloatKernels {
  // The largest finite |x|, or 0.
  double (*largest)(const void* x, int64_t count);
  // Both work off blocks of kMiniFloatBlock numbers, the last one shorter. `encode` tells whether
  // all numbers were finite (true where the format has NaN), `decode` whether all codes are ones.
  bool (*encode)(const MiniFloatFormat& format, const void* x, int64_t count, uint8_t* to);
  bool (*decode)(const MiniFloatFormat& format, const uint8_t* from, int64_t count, void* to);
};

constexpr int64_t kMiniFloatBlock = 128;

struct GradientGate {
  double eps, strength;
  PhiloxStream random;
};

struct GradientGateKernels {
  // Elements [begin, end) of `to`; `begin` is a multiple of a Philox block. `value` may be `task`.
  void (*gate)(const GradientGate& gate, const void* value, const void* task, const void* reg,
               void* to, int64_t begin, int64_t end);
};

struct Kernels {
  void (*philox_words)(PhiloxStream source, uint64_t call, int64_t calls, uint32_t* words);
  DropoutKernels dropout[kStorageTypes];
  MaskedLinearCrossEntropyKernels masked_linear_cross_entropy[kStorageTypes];
  SinkhornKernels sinkhorn[kStorageTypes];
  SinkhornPointsKernels sinkhorn_points[2];  // of float and double: points are widened first
  SketchKernels sketch[2];                   // kFloat, kDouble
  SparseOtKernels sparse_ot[kStorageTypes];
  PrefixKernels prefix[kStorageTypes];
  MixKernels mix[kStorageTypes];
  // Samples [begin, end) of one stream. Scratch comes zeroed: plane_bytes, a byte for every
  // pixel of these samples and a Philox block at either end.
  void (*drop_block_mask)(const DropBlockMask& mask, int64_t stream, int64_t begin, int64_t end,
                          uint8_t* scratch);
  DropBlockKernels drop_block[kStorageTypes];
  RowGateKernels row_gate[kStorageTypes];
  CodeSearchKernels code_search[kStorageTypes];
  AttentionKernels attention[kStorageTypes];
  PrefixScanKernels prefix_scan[kStorageTypes];
  DecayKernels decay[kStorageTypes];
  PairwiseKernels pairwise[2];  // kFloat, kDouble
  MiniFloatKernels mini_float[kStorageTypes];
  GradientGateKernels gradient_gate[kStorageTypes];
};

namespace baseline {
const Kernels& kernels();
}
#if defined(REGULARIZERS_WIDE_X86)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace regularizers
