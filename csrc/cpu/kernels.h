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
  // Columns [begin, end): adds to row_sums A [m], writes slopes A [n] (beta_j in the semi-dual, the
  // mass of the column in the dual), returns the sum of the conjugates.
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

struct Kernels {
  void (*philox_words)(PhiloxStream source, uint64_t call, int64_t calls, uint32_t* words);
  DropoutKernels dropout[kStorageTypes];
  MaskedLinearCrossEntropyKernels masked_linear_cross_entropy[kStorageTypes];
  SparseOtKernels sparse_ot[kStorageTypes];
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
