// Masked linear cross-entropy: the loss of z = r (m * x) W^T + b for many masks m of one x, and its
// gradients.
//
//   l_e  = sum_c t_c (lse(z_e) - z_ec)        t target row, e effective row: (row i, sample s)
//   g_ec = (softmax(z_e)_c sum_k t_k - t_c) row_scale_i
//   dW   = r sum_e g_e (m_e * x_i)^T
//   dx_i = r sum_s m_s * (g_s W)
//   db   = sum_e g_e
//
// The operand (m * x) is made once for a chunk of effective rows, in panels that the products read
// as they lie; the logits of the chunk turn into their own gradient in place. Nothing of size rows
// x samples leaves the chunk. A loader makes the operand rows, a target row gives t; both are
// template parameters of the row pass.
#pragma once

#include "elementary.h"
#include "gemm.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

template <typename T>
static void pack_by_feature(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end) {
  pack_columns(static_cast<const T*>(problem.weight), problem.classes, problem.features, begin, end,
               static_cast<Accumulate<T>*>(problem.weight_by_feature));
}

template <typename T>
static void pack_by_class(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end) {
  pack_rows(static_cast<const T*>(problem.weight), problem.classes, problem.features, begin, end,
            static_cast<Accumulate<T>*>(problem.weight_by_class));
}

// Loaders. load(row, sample, ...) writes operand rows: features masked in, zeros masked out, and
// the mask as bytes.
struct BernoulliLoader {
  // Makes the operand of one effective row; `features` are the row's values of type A.
  template <typename A>
  static inline void load(const MaskedLinearCrossEntropy& problem, const A* features, int64_t row,
                          int64_t sample, int64_t position) {
    const int64_t panel_stride = problem.chunk_capacity * kPanelWidth<A>;
    A* operand = static_cast<A*>(problem.operand) + position * kPanelWidth<A>;
    uint8_t* keep = problem.keep + position * kPanelWidth<A>;
    const uint32_t last_dropped = problem.rule.last_dropped;
    const PhiloxStream source{problem.seed, static_cast<uint32_t>(sample), 0};
    // Words of kBlockElements + kPanelWidth elements: a panel that starts in one block may end in
    // the next.
    const int64_t first_element = row * problem.features;
    int64_t next_call = first_element / kWordsPerCall;
    int64_t available = 0;
    const uint32_t* word = nullptr;
    alignas(64) uint32_t words[2 * kBlockElements];
    int64_t skip = first_element % kWordsPerCall;
    for (int64_t d = 0; d < problem.features;
         d += kPanelWidth<A>, operand += panel_stride, keep += panel_stride) {
      if (available < kPanelWidth<A>) {
        for (int64_t j = 0; j < available; ++j) {
          words[j] = word[j];
        }
        philox_block(source, static_cast<uint64_t>(next_call), words + available);
        next_call += kBlockCalls;
        word = words + skip;
        available += kBlockElements - skip;
        skip = 0;
      }
      const int64_t count = panel_columns<A>(d / kPanelWidth<A>, problem.features);
      if (count == kPanelWidth<A>) {
#pragma omp simd
        for (int j = 0; j < kPanelWidth<A>; ++j) {
          const bool kept = word[j] > last_dropped;
          operand[j] = kept ? features[d + j] : A(0);
          keep[j] = kept ? 0xFF : 0;
        }
      } else {
        for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
          const bool kept = j < count && word[j] > last_dropped;
          operand[j] = kept ? features[d + j] : A(0);
          keep[j] = kept ? 0xFF : 0;
        }
      }
      word += kPanelWidth<A>;
      available -= kPanelWidth<A>;
    }
  }
};

// Nothing is masked: every sample is the row itself.
struct IdentityLoader {
  template <typename A>
  static inline void load(const MaskedLinearCrossEntropy& problem, const A* features, int64_t,
                          int64_t, int64_t position) {
    const int64_t panel_stride = problem.chunk_capacity * kPanelWidth<A>;
    A* operand = static_cast<A*>(problem.operand) + position * kPanelWidth<A>;
    uint8_t* keep = problem.keep + position * kPanelWidth<A>;
    for (int64_t d = 0; d < problem.features;
         d += kPanelWidth<A>, operand += panel_stride, keep += panel_stride) {
      for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
        operand[j] = d + j < problem.features ? features[d + j] : A(0);
        keep[j] = 0xFF;
      }
    }
  }
};

// Target row of an index y with label smoothing eps and class weights w, as in F.cross_entropy:
// t_c = (1 - eps) w_y [c = y] + eps w_c / C; all zero on an ignored row.
template <typename A>
struct SmoothedIndex {
  const A* class_weight;  // null: all ones
  int64_t index;
  bool ignored;
  A on_target, per_class, total;

  inline SmoothedIndex(const MaskedLinearCrossEntropy& problem, int64_t row) {
    class_weight = static_cast<const A*>(problem.class_weight);
    index = problem.target[row];
    ignored = index == problem.ignore_index;
    if (ignored) {
      on_target = per_class = total = A(0);
      return;
    }
    const A weight = class_weight == nullptr ? A(1) : class_weight[index];
    on_target = static_cast<A>(1.0 - problem.label_smoothing) * weight;
    per_class = static_cast<A>(problem.label_smoothing / static_cast<double>(problem.classes));
    total = on_target + per_class * static_cast<A>(problem.class_weight_sum);
  }

  // sum_c t_c z_c
  inline A dot(const A* logits, int64_t classes) const {
    A sum = on_target * logits[index];
    if (per_class != A(0)) {
      A smooth = A(0);
      if (class_weight == nullptr) {
#pragma omp simd reduction(+ : smooth)
        for (int64_t c = 0; c < classes; ++c) {
          smooth += logits[c];
        }
      } else {
#pragma omp simd reduction(+ : smooth)
        for (int64_t c = 0; c < classes; ++c) {
          smooth += class_weight[c] * logits[c];
        }
      }
      sum += per_class * smooth;
    }
    return sum;
  }

  // gradient_c -= scale t_c
  inline void subtract(A* gradient, int64_t classes, A scale) const {
    gradient[index] -= scale * on_target;
    if (per_class != A(0)) {
      const A each = scale * per_class;
#pragma omp simd
      for (int64_t c = 0; c < classes; ++c) {
        gradient[c] -= each * (class_weight == nullptr ? A(1) : class_weight[c]);
      }
    }
  }
};

// z = r h W^T + b for positions [begin, end) of the chunk.
template <typename A>
static inline void logits(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end) {
  const A* operand = static_cast<const A*>(problem.operand);
  const A* bias = static_cast<const A*>(problem.bias);
  const A scale = static_cast<A>(problem.scale);
  A* out = static_cast<A*>(problem.logits);
  const int64_t panel_stride = problem.chunk_capacity * kPanelWidth<A>;
  for (int64_t c = 0; c < problem.classes; c += kPanelWidth<A>) {
    const A* packed = static_cast<const A*>(problem.weight_by_class) + c * problem.features;
    with_vectors(panel_vectors<A>(c / kPanelWidth<A>, problem.classes), [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      for_row_tiles(begin, end, [&](auto height, int64_t e) {
        constexpr int kRows = decltype(height)::value;
        Tile<A, kRows, kVectors> tile;
        tile.clear();
        const A* rows = operand + e * kPanelWidth<A>;
        for (int64_t d = 0; d < problem.features; d += kPanelWidth<A>, rows += panel_stride) {
          const int64_t depth = panel_columns<A>(d / kPanelWidth<A>, problem.features);
          tile.accumulate(depth, rows, kPanelWidth<A>, 1, packed + d * kPanelWidth<A>);
        }
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const int64_t column = c + v * kLanes<A>;
            store(out + (e + m) * problem.padded_classes + column,
                  tile.sum[m][v] * scale + (bias == nullptr ? Vector<A>{} : load(bias + column)));
          }
        }
      });
    });
  }
}

// Loss of one effective row; with gradients its logits become their gradient, times r for the two
// products to come.
template <typename A, typename TargetRow>
static inline double row_loss(const MaskedLinearCrossEntropy& problem, const TargetRow& target,
                              A* row, double row_scale, bool gradients) {
  const int64_t classes = problem.classes;
  if (target.ignored) {
    if (gradients) {
      std::memset(row, 0, sizeof(A) * classes);
    }
    return 0.0;
  }
  A largest = row[0];
#pragma omp simd reduction(max : largest)
  for (int64_t c = 0; c < classes; ++c) {
    largest = row[c] > largest ? row[c] : largest;
  }
  const A dot = target.dot(row, classes);
  A sum = A(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < classes; ++c) {
    const A value = exponential(row[c] - largest);
    row[c] = value;
    sum += value;
  }
  const double log_sum_exp = static_cast<double>(largest) + __builtin_log(static_cast<double>(sum));
  if (gradients) {
    const A scale = static_cast<A>(row_scale * problem.scale);
    const A factor = target.total * scale / sum;
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) {
      row[c] *= factor;
    }
    target.subtract(row, classes, scale);
  }
  return static_cast<double>(target.total) * log_sum_exp - static_cast<double>(dot);
}

// dx_i += sum over the samples of row i of m_e * (g_e W), for positions [begin, end); row i of the
// chunk at out + i D.
template <typename A>
static inline void input_gradient(const MaskedLinearCrossEntropy& problem, int64_t begin,
                                  int64_t end, A* out) {
  const A* gradient = static_cast<const A*>(problem.logits);
  const int64_t panel_stride = problem.chunk_capacity * kPanelWidth<A>;
  for (int64_t panel = 0, d = 0; d < problem.features; ++panel, d += kPanelWidth<A>) {
    const A* packed = static_cast<const A*>(problem.weight_by_feature) + d * problem.classes;
    const uint8_t* keep = problem.keep + panel * panel_stride;
    const int64_t filled = panel_columns<A>(panel, problem.features);
    with_vectors(panel_vectors<A>(panel, problem.features), [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      for_row_tiles(begin, end, [&](auto height, int64_t e) {
        constexpr int kRows = decltype(height)::value;
        Tile<A, kRows, kVectors> tile;
        tile.clear();
        tile.accumulate(problem.classes, gradient + e * problem.padded_classes,
                        problem.padded_classes, 1, packed);
        // Neighbouring rows of the tile are samples of one row of x: add them up before touching
        // memory.
        const int64_t first_sample = e % problem.chunk_samples;
        int64_t row = e / problem.chunk_samples, left = problem.chunk_samples - first_sample;
        Vector<A> sum[kVectors] = {};
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            sum[v] +=
                keep_lanes<A>(keep + (e + m) * kPanelWidth<A> + v * kLanes<A>, tile.sum[m][v]);
          }
          if (--left == 0 || m == kRows - 1) {
            add_to_row<A, kVectors>(out + row * problem.features + d, sum, filled);
            for (int v = 0; v < kVectors; ++v) {
              sum[v] = Vector<A>{};
            }
            ++row;
            left = problem.chunk_samples;
          }
        }
      });
    });
  }
}

// Rows [begin, end) of the chunk: operand, logits, loss and, with gradients, the gradient of logits
// and of x.
template <typename T, typename Loader, typename TargetRow>
static void process_rows(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end,
                         bool gradients) {
  using A = Accumulate<T>;
  const int64_t samples = problem.chunk_samples;
  const int64_t features = problem.features;
  const T* x = static_cast<const T*>(problem.x) + problem.chunk_row * features;
  for (int64_t i = begin; i < end; ++i) {
    const A* values;
    if constexpr (sizeof(T) != sizeof(A)) {
      A* row = static_cast<A*>(problem.widened_x) + i * features;
      for (int64_t d = 0; d < features; ++d) {
        row[d] = widen(x[i * features + d]);
      }
      values = row;
    } else {
      values = x + i * features;
    }
    for (int64_t s = 0; s < samples; ++s) {
      Loader::load(problem, values, problem.chunk_row + i, problem.chunk_sample + s,
                   i * samples + s);
    }
  }
  logits<A>(problem, begin * samples, end * samples);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = problem.chunk_row + i;
    const TargetRow target(problem, row);
    const double row_scale = gradients ? problem.row_scale[row] : 0.0;
    for (int64_t s = 0; s < samples; ++s) {
      A* z = static_cast<A*>(problem.logits) + (i * samples + s) * problem.padded_classes;
      problem.row_loss[row] += row_loss(problem, target, z, row_scale, gradients);
    }
  }
  if (!gradients || problem.grad_x == nullptr) {
    return;
  }
  A* grad_x = static_cast<A*>(problem.grad_x) + problem.chunk_row * features;
  input_gradient<A>(problem, begin * samples, end * samples, grad_x);
}

// dW += g^T (r m * x) of the chunk, for feature panels [begin, end). The factor r is in g already.
template <typename A>
static void weight_gradient(const MaskedLinearCrossEntropy& problem, int64_t chunk_size,
                            int64_t begin, int64_t end) {
  const A* gradient = static_cast<const A*>(problem.logits);
  for (int64_t panel = begin; panel < end; ++panel) {
    const A* operand =
        static_cast<const A*>(problem.operand) + panel * problem.chunk_capacity * kPanelWidth<A>;
    A* out = static_cast<A*>(problem.grad_weight) + panel * kPanelWidth<A>;
    const int64_t filled = panel_columns<A>(panel, problem.features);
    with_vectors(panel_vectors<A>(panel, problem.features), [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      for_row_tiles(0, problem.classes, [&](auto height, int64_t c) {
        constexpr int kRows = decltype(height)::value;
        Tile<A, kRows, kVectors> tile;
        tile.clear();
        tile.accumulate(chunk_size, gradient + c, 1, problem.padded_classes, operand);
        for (int m = 0; m < kRows; ++m) {
          add_to_row<A, kVectors>(out + (c + m) * problem.features, tile.sum[m], filled);
        }
      });
    });
  }
}

// db += sum of g over the chunk, for classes [begin, end). g carries the factor r, which db does
// not have.
template <typename A>
static void bias_gradient(const MaskedLinearCrossEntropy& problem, int64_t chunk_size,
                          int64_t begin, int64_t end) {
  A* out = static_cast<A*>(problem.grad_bias);
  const A inverse_scale = static_cast<A>(1.0 / problem.scale);
  for (int64_t e = 0; e < chunk_size; ++e) {
    const A* gradient = static_cast<const A*>(problem.logits) + e * problem.padded_classes;
#pragma omp simd
    for (int64_t c = begin; c < end; ++c) {
      out[c] += gradient[c] * inverse_scale;
    }
  }
}

template <typename T>
static void rows_with_rule(const MaskedLinearCrossEntropy& problem, int64_t begin, int64_t end,
                           bool gradients) {
  if (problem.rule.drops) {
    process_rows<T, BernoulliLoader, SmoothedIndex<Accumulate<T>>>(problem, begin, end, gradients);
  } else {
    process_rows<T, IdentityLoader, SmoothedIndex<Accumulate<T>>>(problem, begin, end, gradients);
  }
}

template <typename T>
static constexpr MaskedLinearCrossEntropyKernels masked_linear_cross_entropy_kernels() {
  using A = Accumulate<T>;
  return {kPanelWidth<A>,    pack_by_class<T>,   pack_by_feature<T>,
          rows_with_rule<T>, weight_gradient<A>, bias_gradient<A>};
}

}  // namespace regularizers::REGULARIZERS_ISA
