// All prefixes of a linear classifier in one pass: z_k = b + sum over d < k of x_d W_d is a running
// sum over features, so the logits of all D prefixes cost one product, not D.
//
// W is transposed once, to [features][padded classes]; the padding has weight 0 and bias -inf,
// which no maximum and no sum of exponentials sees.
#pragma once

#include <cstring>

#include "elementary.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

// --- Accuracy: rows in lanes, a block of classes in registers ------------------------------------
//
// For a block of classes the logits of kLanes rows stay in registers over all features; what a step
// leaves behind is one vector: whether a class beats the target. The target's own logits are found
// first, by the same operations in the same order, hence with the same bits. A row is right if no
// class is above its target, and none before it is level: what argmax does.

#if defined(__AVX512F__)
constexpr int kClassBlock = 16;
#else
constexpr int kClassBlock = 8;
#endif

// to[d][lane] = rows[lane][d], with zeros for absent rows.
template <typename T>
static inline void transpose_rows(const T* const* rows, int64_t features, Accumulate<T>* to) {
  using A = Accumulate<T>;
  constexpr int64_t kBlock = 64;
  for (int64_t first = 0; first < features; first += kBlock) {
    const int64_t last = first + kBlock < features ? first + kBlock : features;
    for (int j = 0; j < kLanes<A>; ++j) {
      for (int64_t d = first; d < last; ++d) {
        to[d * kLanes<A> + j] = rows[j] == nullptr ? A(0) : widen(rows[j][d]);
      }
    }
  }
}

// Adds a block of classes to beaten [features][kLanes]. In a mixed block some lane has its target,
// so that classes before and after it are told apart one by one.
template <typename A, bool MIXED>
static inline void beat_targets(const PrefixScan& problem, int64_t first, const A* x, const A* own,
                                Vector<LaneInteger<A>> target, Vector<LaneInteger<A>>* beaten) {
  using I = LaneInteger<A>;
  const A* bias = static_cast<const A*>(problem.bias) + first;
  const A* weight = static_cast<const A*>(problem.weight) + first;
  const Vector<I> block_before = target > broadcast(static_cast<I>(first));
  Vector<A> z[kClassBlock];
#pragma GCC unroll 16
  for (int c = 0; c < kClassBlock; ++c) {
    z[c] = broadcast(bias[c]);
  }
  for (int64_t d = 0; d < problem.features; ++d, weight += problem.padded_classes) {
    const Vector<A> value = load(x + d * kLanes<A>), level = load(own + d * kLanes<A>);
#pragma GCC unroll 16
    for (int c = 0; c < kClassBlock; ++c) {
      z[c] += value * broadcast(weight[c]);
    }
    Vector<I> beats = beaten[d];
    if constexpr (MIXED) {
#pragma GCC unroll 16
      for (int c = 0; c < kClassBlock; ++c) {
        const Vector<I> before = target > broadcast(static_cast<I>(first + c));
        beats |= (z[c] > level) | ((z[c] == level) & before);
      }
    } else {
      Vector<A> largest[4] = {z[0], z[1], z[2], z[3]};
#pragma GCC unroll 16
      for (int c = 4; c < kClassBlock; ++c) {
        largest[c % 4] = largest[c % 4] < z[c] ? z[c] : largest[c % 4];
      }
      largest[0] = largest[0] < largest[1] ? largest[1] : largest[0];
      largest[2] = largest[2] < largest[3] ? largest[3] : largest[2];
      largest[0] = largest[0] < largest[2] ? largest[2] : largest[0];
      beats |= (largest[0] > level) | ((largest[0] == level) & block_before);
    }
    beaten[d] = beats;
  }
}

// Adds the rows [begin, end) that are right with the first d + 1 features to correct[d]. Scratch
// holds 4 x features x kLanes elements of A.
template <typename T>
static void prefix_accuracy(const PrefixScan& problem, int64_t begin, int64_t end, void* scratch,
                            int64_t* correct) {
  using A = Accumulate<T>;
  using I = LaneInteger<A>;
  const int64_t features = problem.features, size = features * kLanes<A>;
  A* x = static_cast<A*>(scratch);
  A* target_weight = x + size;
  A* own = target_weight + size;
  Vector<I>* beaten = reinterpret_cast<Vector<I>*>(own + size);
  for (int64_t row = begin; row < end; row += kLanes<A>) {
    const T* rows[kLanes<A>] = {};
    const T* weights[kLanes<A>] = {};
    Vector<I> target, present = {};
    Vector<A> z = {};
    for (int j = 0; j < kLanes<A>; ++j) {
      const int64_t i = row + j < end ? row + j : end - 1;
      const int64_t y = problem.target[i];
      target[j] = static_cast<I>(y);
      z[j] = static_cast<const A*>(problem.bias)[y];
      rows[j] = static_cast<const T*>(problem.x) + i * problem.x_stride;
      weights[j] = static_cast<const T*>(problem.class_weights) + y * problem.x_stride;
      present[j] = row + j < end;
    }
    transpose_rows<T>(rows, features, x);
    transpose_rows<T>(weights, features, target_weight);
    for (int64_t d = 0; d < features; ++d) {
      z += load(x + d * kLanes<A>) * load(target_weight + d * kLanes<A>);
      store(own + d * kLanes<A>, z);
      beaten[d] = Vector<I>{};
    }
    for (int64_t first = 0; first < problem.padded_classes; first += kClassBlock) {
      bool mixed = false;
      for (int j = 0; j < kLanes<A>; ++j) {
        mixed |= target[j] >= first && target[j] < first + kClassBlock;
      }
      if (mixed) {
        beat_targets<A, true>(problem, first, x, own, target, beaten);
      } else {
        beat_targets<A, false>(problem, first, x, own, target, beaten);
      }
    }
    for (int64_t d = 0; d < features; ++d) {
      const Vector<A> level = load(own + d * kLanes<A>);
      const Vector<I> right = ~beaten[d] & (level == level) & present;  // NaN is never right
      int64_t count = 0;
      for (int j = 0; j < kLanes<A>; ++j) {
        count += right[j];
      }
      correct[d] += count;
    }
  }
}

// --- Loss: classes in lanes, a few rows at a time ------------------------------------------------

constexpr int kScanRows = 4;
// Steps between stored logits. Backward walks down by subtraction, so its logits carry the
// rounding of at most this many steps.
constexpr int64_t kCheckpointSteps = 64;

// z_r += (or -=) x_rd W_d; returns the maximum of each row in `largest`, where that is asked for.
template <typename A, int ROWS, bool MAXIMUM>
static inline void add_feature(const A* weight, int64_t width, const A (&x)[ROWS], A* z,
                               A (&largest)[ROWS]) {
  Vector<A> top[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    top[r] = broadcast(static_cast<A>(-__builtin_inff()));
  }
  for (int64_t c = 0; c < width; c += kLanes<A>) {
    const Vector<A> w = load(weight + c);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vector<A> sum = load(z + r * width + c) + broadcast(x[r]) * w;
      store(z + r * width + c, sum);
      if constexpr (MAXIMUM) {
        top[r] = top[r] < sum ? sum : top[r];
      }
    }
  }
  if constexpr (MAXIMUM) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      largest[r] = max_lanes<A>(top[r]);
    }
  }
}

template <typename A, int ROWS>
static inline void log_sum_exp(const A* z, int64_t width, const A (&largest)[ROWS],
                               A (&result)[ROWS]) {
  constexpr A kLog2e = static_cast<A>(1.4426950408889634074);
  Vector<A> sum[ROWS] = {};
  for (int64_t c = 0; c < width; c += kLanes<A>) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      sum[r] += exp2((load(z + r * width + c) - broadcast(largest[r])) * kLog2e);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const A total = sum_lanes<A>(sum[r]);
    result[r] = largest[r] + static_cast<A>(__builtin_log(static_cast<double>(total)));
  }
}

template <typename A>
static inline void start_logits(const PrefixScan& problem, int rows, A* z) {
  for (int r = 0; r < rows; ++r) {
    std::memcpy(z + r * problem.padded_classes, problem.bias,
                sizeof(A) * static_cast<size_t>(problem.padded_classes));
  }
}

template <typename T, int ROWS>
static inline void loss_of_rows(const PrefixScan& problem, const int64_t* rows, void* scratch) {
  using A = Accumulate<T>;
  A* z = static_cast<A*>(scratch);
  const int64_t width = problem.padded_classes;
  start_logits(problem, ROWS, z);
  const A* weight = static_cast<const A*>(problem.weight);
  double loss[ROWS] = {};
  for (int64_t d = 0; d < problem.features; ++d, weight += width) {
    A x[ROWS], largest[ROWS], result[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      x[r] = widen(static_cast<const T*>(problem.x)[rows[r] * problem.x_stride + d]);
    }
    const double probability = problem.probs[d];
    if (probability == 0.0) {
      add_feature<A, ROWS, false>(weight, width, x, z, largest);
      continue;
    }
    add_feature<A, ROWS, true>(weight, width, x, z, largest);
    log_sum_exp<A, ROWS>(z, width, largest, result);
    for (int r = 0; r < ROWS; ++r) {
      static_cast<A*>(problem.log_sum_exp)[rows[r] * problem.x_stride + d] = result[r];
      const A own = z[r * width + problem.target[rows[r]]];
      loss[r] += probability * (static_cast<double>(result[r]) - static_cast<double>(own));
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    static_cast<A*>(problem.row_loss)[rows[r]] = static_cast<A>(loss[r]);
  }
}

// G_d = sum over k >= d of g_k runs down from the last feature, with g_k = p_k (softmax(z_k) - e_y)
// times the row's own gradient; dx_d = <G_d, W_d>, dW_d += x_d G_d, db += G_0.
template <typename T, int ROWS>
static inline void gradient_of_rows(const PrefixScan& problem, const int64_t* rows, void* scratch,
                                    void* grad_weight, void* grad_bias) {
  using A = Accumulate<T>;
  constexpr A kLog2e = static_cast<A>(1.4426950408889634074);
  const int64_t width = problem.padded_classes, features = problem.features, size = ROWS * width;
  A* z = static_cast<A*>(scratch);
  A* gradient = z + size;
  A* checkpoints = gradient + size;  // z after features 64, 128, ...
  const A* weight = static_cast<const A*>(problem.weight);
  const auto inputs = [&](int64_t d, A(&x)[ROWS]) {
    for (int r = 0; r < ROWS; ++r) {
      x[r] = widen(static_cast<const T*>(problem.x)[rows[r] * problem.x_stride + d]);
    }
  };
  A x[ROWS], unused[ROWS];
  start_logits(problem, ROWS, z);
  for (int64_t d = 0; d < features; ++d) {
    inputs(d, x);
    add_feature<A, ROWS, false>(weight + d * width, width, x, z, unused);
    if ((d + 1) % kCheckpointSteps == 0) {
      std::memcpy(checkpoints + (d / kCheckpointSteps) * size, z,
                  sizeof(A) * static_cast<size_t>(size));
    }
  }
  std::memset(gradient, 0, sizeof(A) * static_cast<size_t>(size));
  for (int64_t d = features - 1; d >= 0; --d) {
    if ((d + 1) % kCheckpointSteps == 0) {
      std::memcpy(z, checkpoints + (d / kCheckpointSteps) * size,
                  sizeof(A) * static_cast<size_t>(size));
    }
    inputs(d, x);
    A scale[ROWS], shift[ROWS];
    const bool counts = problem.probs[d] != 0.0;
    for (int r = 0; counts && r < ROWS; ++r) {
      scale[r] = static_cast<A>(problem.probs[d] * problem.row_gradient[rows[r]]);
      shift[r] = static_cast<const A*>(problem.log_sum_exp)[rows[r] * problem.x_stride + d];
      gradient[r * width + problem.target[rows[r]]] -= scale[r];
    }
    const A* w_row = weight + d * width;
    A* sums = static_cast<A*>(grad_weight) + d * width;
    Vector<A> dot[ROWS] = {};
    for (int64_t c = 0; c < width; c += kLanes<A>) {
      const Vector<A> w = load(w_row + c);
      Vector<A> sum = load(sums + c);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vector<A> logit = load(z + r * width + c);
        Vector<A> g = load(gradient + r * width + c);
        if (counts) {
          g += broadcast(scale[r]) * exp2((logit - broadcast(shift[r])) * kLog2e);
          store(gradient + r * width + c, g);
        }
        store(z + r * width + c, logit - broadcast(x[r]) * w);
        dot[r] += g * w;
        sum += broadcast(x[r]) * g;
      }
      store(sums + c, sum);
    }
    for (int r = 0; r < ROWS; ++r) {
      static_cast<T*>(problem.grad_x)[rows[r] * problem.x_stride + d] =
          narrow<T>(sum_lanes<A>(dot[r]));
    }
  }
  A* bias_sums = static_cast<A*>(grad_bias);
  for (int64_t c = 0; c < width; c += kLanes<A>) {
    Vector<A> sum = load(bias_sums + c);
    for (int r = 0; r < ROWS; ++r) {
      sum += load(gradient + r * width + c);
    }
    store(bias_sums + c, sum);
  }
}

// Rows problem.rows[begin, end). Scratch: kScanRows x padded classes.
template <typename T>
static void prefix_loss(const PrefixScan& problem, int64_t begin, int64_t end, void* scratch) {
  int64_t i = begin;
  for (; i + kScanRows <= end; i += kScanRows) {
    loss_of_rows<T, kScanRows>(problem, problem.rows + i, scratch);
  }
  for (; i < end; ++i) {
    loss_of_rows<T, 1>(problem, problem.rows + i, scratch);
  }
}

// Scratch: kScanRows x padded classes x (2 + features / kCheckpointSteps).
template <typename T>
static void prefix_loss_gradient(const PrefixScan& problem, int64_t begin, int64_t end,
                                 void* scratch, void* grad_weight, void* grad_bias) {
  int64_t i = begin;
  for (; i + kScanRows <= end; i += kScanRows) {
    gradient_of_rows<T, kScanRows>(problem, problem.rows + i, scratch, grad_weight, grad_bias);
  }
  for (; i < end; ++i) {
    gradient_of_rows<T, 1>(problem, problem.rows + i, scratch, grad_weight, grad_bias);
  }
}

// out[d][row][c] = z after feature d. Scratch: padded classes.
template <typename T>
static void prefix_logits(const PrefixScan& problem, int64_t begin, int64_t end, void* scratch,
                          void* out, int64_t out_step) {
  using A = Accumulate<T>;
  A* z = static_cast<A*>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    start_logits(problem, 1, z);
    const A* weight = static_cast<const A*>(problem.weight);
    T* to = static_cast<T*>(out) + row * problem.classes;
    for (int64_t d = 0; d < problem.features;
         ++d, weight += problem.padded_classes, to += out_step) {
      const A x[1] = {widen(static_cast<const T*>(problem.x)[row * problem.x_stride + d])};
      A unused[1];
      add_feature<A, 1, false>(weight, problem.padded_classes, x, z, unused);
      for (int64_t c = 0; c < problem.classes; ++c) {
        to[c] = narrow<T>(z[c]);
      }
    }
  }
}

template <typename T>
static constexpr PrefixScanKernels prefix_scan_kernels() {
  using A = Accumulate<T>;
  constexpr int64_t kWidth = kClassBlock > kLanes<A> ? kClassBlock : kLanes<A>;
  return {kWidth,
          kLanes<A>,
          kScanRows,
          kCheckpointSteps,
          prefix_accuracy<T>,
          prefix_loss<T>,
          prefix_loss_gradient<T>,
          prefix_logits<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
