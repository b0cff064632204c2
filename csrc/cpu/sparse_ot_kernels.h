// Columns of regularized transport and the projections under them, one row of memory at a time.
//
// The quadratic conjugate and the simplex projection are one problem. With scores s = alpha - c (or
// the vector to project) and mass z (or gamma b):
//
//   t_i = max(s_i - theta, 0) over the k largest s_i,   theta such that the t_i sum to z
//
// A kept score lies less than z below the largest one. Two passes over a row in the first-level
// cache, largest score and filter, leave a handful of survivors; what follows works on those alone.
// theta comes from Michelot's iteration (drop what lies below, average again), without sorting.
#pragma once

#include "elementary.h"

namespace regularizers::REGULARIZERS_ISA {

// One bit a lane: s[lane] >= floor.
static inline uint32_t lanes_from(const float* s, float floor) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(s), _mm512_set1_ps(floor), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s), _mm256_set1_ps(floor), _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    bits |= static_cast<uint32_t>(s[lane] >= floor) << lane;
  }
  return bits;
#endif
}

static inline uint32_t lanes_from(const double* s, double floor) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(_mm512_loadu_pd(s), _mm512_set1_pd(floor), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(s), _mm256_set1_pd(floor), _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    bits |= static_cast<uint32_t>(s[lane] >= floor) << lane;
  }
  return bits;
#endif
}

template <typename A>
static constexpr A kLowest = -__builtin_inf();

// Scores are worked on in blocks of four vectors; the largest of each block, lane by lane, is kept.
constexpr int kBlockVectors = 4;
template <typename A>
constexpr int kBlock = kBlockVectors * kLanes<A>;

// Fills the rest of the last block, which then never counts.
template <typename A>
static inline void pad(A* values, int64_t size) {
  for (int64_t i = size; i % kBlock<A> != 0; ++i) {
    values[i] = kLowest<A>;
  }
}

// The larger of two, lane by lane; b where a is NaN. GCC makes two instructions of a > b ? a : b.
static inline Vector<float> larger(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static inline Vector<double> larger(Vector<double> a, Vector<double> b) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vector<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// The scores of a row and, a vector for each block, the largest in it.
template <typename A>
struct Scores {
  A* score;
  A* peak;
};

// The survivors of one row: values and their places in the row, in order of place.
template <typename A>
struct Survivors {
  A* value;
  int32_t* index;
  int64_t count;
};

// s_i = alpha_i - c_i + shift; returns the largest. alpha may be null: then s_i = c_i.
template <typename T, typename A>
static inline A fill_scores(const T* c, const A* alpha, A shift, int64_t size,
                            const Scores<A>& out) {
  constexpr int kWidth = kLanes<A>;
  A* s = out.score;
  A* peak = out.peak;
  Vector<A> top = broadcast(kLowest<A>);
  const auto block_peak = [&](Vector<A> v0, Vector<A> v1, Vector<A> v2, Vector<A> v3) {
    const Vector<A> largest = larger(larger(v0, v1), larger(v2, v3));
    store(peak, largest);
    peak += kWidth;
    top = larger(largest, top);
  };
  int64_t done = 0;
  if constexpr (sizeof(T) == sizeof(A)) {
    const Vector<A> moved = broadcast(shift);
    const auto blocks = [&](const auto& at) {
      for (; done + kBlock<A> <= size; done += kBlock<A>) {
        Vector<A> v[kBlockVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kBlockVectors; ++j) {
          v[j] = at(done + j * kWidth);
          store(s + done + j * kWidth, v[j]);
        }
        block_peak(v[0], v[1], v[2], v[3]);
      }
    };
    if (alpha == nullptr) {
      blocks([&](int64_t i) { return load(c + i); });
    } else {
      blocks([&](int64_t i) { return load(alpha + i) - load(c + i) + moved; });
    }
  }
  if (alpha == nullptr) {
#pragma omp simd
    for (int64_t i = done; i < size; ++i) {
      s[i] = widen(c[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = done; i < size; ++i) {
      s[i] = alpha[i] - widen(c[i]) + shift;
    }
  }
  pad(s, size);
  for (; done < size; done += kBlock<A>) {
    block_peak(load(s + done), load(s + done + kWidth), load(s + done + 2 * kWidth),
               load(s + done + 3 * kWidth));
  }
  A result = top[0];
  for (int lane = 1; lane < kWidth; ++lane) {
    result = top[lane] > result ? top[lane] : result;
  }
  return result;
}

// What a score must reach to be kept beside `top` in a simplex of size z. Finite: the padding and
// forbidden places, which are -inf, never count.
template <typename A>
static inline A simplex_floor(A top, A z) {
  constexpr A kSmallest =
      sizeof(A) == sizeof(double) ? static_cast<A>(-__DBL_MAX__) : static_cast<A>(-__FLT_MAX__);
  return top - z >= kSmallest ? top - z : kSmallest;
}

// Whether any of them is NaN. A pass of its own, in the first-level cache: `larger` loses a NaN,
// and a comparison a lane beside it would cost the filling more.
template <typename A>
static inline bool has_nan(const A* score, int64_t size) {
  bool ordered = true;
#pragma omp simd reduction(&& : ordered)
  for (int64_t i = 0; i < size; ++i) {
    ordered = ordered && score[i] == score[i];
  }
  return !ordered;
}

// Scores from `floor` up, in order.
template <typename A>
static inline void filter(const Scores<A>& scores, int64_t size, A floor, Survivors<A>& kept) {
  int64_t count = 0;
  const A* peak = scores.peak;
  for (int64_t block = 0; block < size; block += kBlock<A>, peak += kLanes<A>) {
    if (lanes_from(peak, floor) == 0) {
      continue;
    }
    for (int64_t first = block; first < block + kBlock<A>; first += kLanes<A>) {
      for (uint32_t bits = lanes_from(scores.score + first, floor); bits != 0; bits &= bits - 1) {
        const int64_t i = first + __builtin_ctz(bits);
        kept.value[count] = scores.score[i];
        kept.index[count++] = static_cast<int32_t>(i);
      }
    }
  }
  kept.count = count;
}

// Same, of the survivors themselves.
template <typename A>
static inline void filter(A floor, Survivors<A>& kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < kept.count; ++i) {
    kept.value[count] = kept.value[i];
    kept.index[count] = kept.index[i];
    count += kept.value[i] >= floor;
  }
  kept.count = count;
}

template <typename A>
static inline int64_t count_from(const A* s, int64_t size, A floor) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kLanes<A>) {
    count += __builtin_popcount(lanes_from(s + i, floor));
  }
  return count;
}

// The k-th largest of the values, which are reordered (Hoare's selection).
template <typename A>
static inline A kth_largest(A* values, int64_t size, int64_t k) {
  int64_t low = 0, high = size - 1;
  const int64_t wanted = k - 1;
  while (low < high) {
    const A pivot = values[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (values[i] > pivot) {
        ++i;
      }
      while (pivot > values[j]) {
        --j;
      }
      if (i <= j) {
        const A moved = values[i];
        values[i++] = values[j];
        values[j--] = moved;
      }
    }
    if (wanted <= j) {
      high = j;
    } else if (wanted >= i) {
      low = i;
    } else {
      break;
    }
  }
  return values[wanted];
}

// Leaves the k largest survivors; of equal ones the first. `spare` holds as many values.
template <typename A>
static inline void keep_largest(int64_t k, A top, A floor, A* spare, Survivors<A>& kept) {
  constexpr int64_t kFew = 32;
  constexpr int kHalvings = 24;
  if (kept.count <= k) {
    return;
  }
  if (kept.count > k + kFew) {
    // A floor that some more than k survivors reach, by halving: vector work, unlike selection.
    pad(kept.value, kept.count);
    A low = floor, high = top;
    for (int halving = 0; halving < kHalvings; ++halving) {
      const A middle = low + (high - low) / 2;
      const int64_t above = count_from(kept.value, kept.count, middle);
      (above >= k ? low : high) = middle;
      if (above >= k && above <= k + kFew) {
        break;
      }
    }
    filter(low, kept);
  }
  for (int64_t i = 0; i < kept.count; ++i) {
    spare[i] = kept.value[i];
  }
  const A last = kth_largest(spare, kept.count, k);
  int64_t equal_ones = k;
  for (int64_t i = 0; i < kept.count; ++i) {
    equal_ones -= kept.value[i] > last;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < kept.count; ++i) {
    const A value = kept.value[i];
    kept.value[count] = value;
    kept.index[count] = kept.index[i];
    const bool equal = value == last;
    count += value > last || (equal && equal_ones > 0);
    equal_ones -= equal;
  }
  kept.count = count;
}

// value_i <- max(value_i - theta, 0) with sum z, zeros dropped; returns theta. Values are counted
// from the largest one, which keeps the digits of small differences and theta below zero.
template <typename A>
static inline A project_survivors(A top, A z, Survivors<A>& kept) {
  for (int64_t i = 0; i < kept.count; ++i) {
    kept.value[i] -= top;
  }
  A theta;
  for (;;) {
    A total = 0;
    for (int64_t i = 0; i < kept.count; ++i) {
      total += kept.value[i];
    }
    theta = (total - z) / static_cast<A>(kept.count);
    int64_t count = 0;
    for (int64_t i = 0; i < kept.count; ++i) {
      kept.value[count] = kept.value[i];
      kept.index[count] = kept.index[i];
      count += kept.value[i] > theta;
    }
    if (count == kept.count || count == 0) {
      break;
    }
    kept.count = count;
  }
  for (int64_t i = 0; i < kept.count; ++i) {
    kept.value[i] -= theta;
  }
  return top + theta;
}

// What a column of the plan adds to the objective. Its entries are survivors or, for the entropic
// regularizer, all of `score`.
struct ColumnResult {
  double conjugate;
  double slope;  // semi-dual: beta_j = -d conjugate / d b_j; dual: the mass of the column
};

// Omega(t) = gamma / 2 |t|^2, at most k nonzeros. A NaN among the scores makes all entries NaN.
template <typename T, typename A = Accumulate<T>>
static inline ColumnResult quadratic_column(const TransportProblem& problem, int64_t j,
                                            const Scores<A>& scores, Survivors<A>& kept) {
  const bool dual = problem.beta != nullptr;
  const A gamma = static_cast<A>(problem.gamma);
  const A shift = dual ? static_cast<const A*>(problem.beta)[j] : A(0);
  const A top = fill_scores(static_cast<const T*>(problem.cost) + j * problem.rows,
                            static_cast<const A*>(problem.alpha), shift, problem.rows, scores);
  kept.count = 0;
  ColumnResult result{0.0, 0.0};
  if (has_nan(scores.score, problem.rows)) {
    const double nan = __builtin_nan("");
    for (; kept.count < problem.rows; ++kept.count) {
      kept.value[kept.count] = static_cast<A>(nan);
      kept.index[kept.count] = static_cast<int32_t>(kept.count);
    }
    return {nan, nan};
  }
  if (dual) {
    if (!(top > 0)) {
      return result;
    }
    filter(scores, problem.rows, A(0), kept);
    keep_largest(problem.k, top, A(0), scores.score, kept);
    double squares = 0.0, total = 0.0;
    for (int64_t i = 0; i < kept.count; ++i) {
      const A s = kept.value[i];
      squares += static_cast<double>(s) * s;
      total += s;
      kept.value[i] = s / gamma;
    }
    return {squares / (2.0 * problem.gamma), total / problem.gamma};
  }
  const A mass = static_cast<const A*>(problem.mass)[j];
  if (!(mass > 0)) {
    result.slope = -top;
    return result;
  }
  const A z = gamma * mass, floor = simplex_floor(top, z);
  filter(scores, problem.rows, floor, kept);
  keep_largest(problem.k, top, floor, scores.score, kept);
  const A theta = project_survivors(top, z, kept);
  // sum s t - gamma / 2 |t|^2 with s = theta + gamma t on the support.
  double squares = 0.0;
  for (int64_t i = 0; i < kept.count; ++i) {
    squares += static_cast<double>(kept.value[i]) * kept.value[i];
    kept.value[i] /= gamma;
  }
  return {static_cast<double>(theta) * mass + squares / (2.0 * problem.gamma), -theta};
}

// Omega(t) = gamma sum t log t. The column itself is left in `score`.
template <typename T, typename A = Accumulate<T>>
static inline ColumnResult entropic_column(const TransportProblem& problem, int64_t j,
                                           const Scores<A>& scores) {
  A* score = scores.score;
  const bool dual = problem.beta != nullptr;
  const int64_t rows = problem.rows;
  const A inverse = static_cast<A>(1.0 / problem.gamma);
  const A shift = dual ? static_cast<const A*>(problem.beta)[j] : A(0);
  const A top = fill_scores(static_cast<const T*>(problem.cost) + j * rows,
                            static_cast<const A*>(problem.alpha), shift, rows, scores);
  // t_i = factor exp((s_i - origin) / gamma)
  const A origin = dual ? static_cast<A>(problem.gamma) : top;
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < rows; ++i) {
    score[i] = exponential((score[i] - origin) * inverse);
    total += score[i];
  }
  if (dual) {
    return {problem.gamma * static_cast<double>(total), static_cast<double>(total)};
  }
  const A mass = static_cast<const A*>(problem.mass)[j];
  const A factor = mass > 0 ? mass / total : A(0);
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) {
    score[i] *= factor;
  }
  if (!(mass > 0)) {
    return {0.0, -static_cast<double>(top)};
  }
  const double smooth_top = problem.gamma * __builtin_log(static_cast<double>(total) / mass) + top;
  return {mass * smooth_top, problem.gamma - smooth_top};
}

template <typename A>
static inline Scores<A> scores_in(const SparseOtScratch& scratch) {
  return {static_cast<A*>(scratch.score), static_cast<A*>(scratch.peak)};
}

template <typename A>
static inline Survivors<A> survivors(const SparseOtScratch& scratch) {
  return {static_cast<A*>(scratch.value), scratch.index, 0};
}

// Columns [begin, end): adds them to row_sums, writes their slopes, returns the conjugates' sum.
template <typename T>
static double transport_dual(const TransportProblem& problem, const SparseOtScratch& scratch,
                             int64_t begin, int64_t end, void* row_sums_, void* slopes_) {
  using A = Accumulate<T>;
  A* row_sums = static_cast<A*>(row_sums_);
  A* slopes = static_cast<A*>(slopes_);
  const Scores<A> scores = scores_in<A>(scratch);
  Survivors<A> kept = survivors<A>(scratch);
  double total = 0.0;
  for (int64_t j = begin; j < end; ++j) {
    ColumnResult column;
    if (problem.regularizer == kEntropic) {
      column = entropic_column<T>(problem, j, scores);
#pragma omp simd
      for (int64_t i = 0; i < problem.rows; ++i) {
        row_sums[i] += scores.score[i];
      }
    } else {
      column = quadratic_column<T>(problem, j, scores, kept);
      for (int64_t i = 0; i < kept.count; ++i) {
        row_sums[kept.index[i]] += kept.value[i];
      }
    }
    total += column.conjugate;
    slopes[j] = static_cast<A>(column.slope);
  }
  return total;
}

template <typename T>
static void regularized_plan(const TransportProblem& problem, const SparseOtScratch& scratch,
                             int64_t begin, int64_t end, void* plan) {
  using A = Accumulate<T>;
  const Scores<A> scores = scores_in<A>(scratch);
  Survivors<A> kept = survivors<A>(scratch);
  for (int64_t j = begin; j < end; ++j) {
    T* column = static_cast<T*>(plan) + j * problem.rows;
    if (problem.regularizer == kEntropic) {
      entropic_column<T>(problem, j, scores);
#pragma omp simd
      for (int64_t i = 0; i < problem.rows; ++i) {
        column[i] = narrow<T>(scores.score[i]);
      }
      continue;
    }
    quadratic_column<T>(problem, j, scores, kept);
    std::memset(column, 0, static_cast<size_t>(problem.rows) * sizeof(T));
    for (int64_t i = 0; i < kept.count; ++i) {
      column[kept.index[i]] = narrow<T>(kept.value[i]);
    }
  }
}

// k values and places a column, in order of place; zeros at place 0 where there are fewer.
template <typename T>
static void transport_sparse_plan(const TransportProblem& problem, const SparseOtScratch& scratch,
                                  int64_t begin, int64_t end, void* values, int64_t* indices) {
  using A = Accumulate<T>;
  Survivors<A> kept = survivors<A>(scratch);
  for (int64_t j = begin; j < end; ++j) {
    quadratic_column<T>(problem, j, scores_in<A>(scratch), kept);
    T* column = static_cast<T*>(values) + j * problem.k;
    int64_t* place = indices + j * problem.k;
    for (int64_t i = 0; i < problem.k; ++i) {
      column[i] = narrow<T>(i < kept.count ? kept.value[i] : A(0));
      place[i] = i < kept.count && kept.value[i] > 0 ? kept.index[i] : 0;
    }
  }
}

// Rows [begin, end) of v, projected on {t >= 0, |t|_0 <= k, sum t = z_row}; null z: no sum.
template <typename T>
static void sparse_projection(const SparseProjection& problem, const SparseOtScratch& scratch,
                              int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t size = problem.size;
  const Scores<A> scores = scores_in<A>(scratch);
  Survivors<A> kept = survivors<A>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    const T* v = static_cast<const T*>(problem.v) + row * size;
    T* out = static_cast<T*>(problem.out) + row * size;
    const A top = fill_scores(v, static_cast<const A*>(nullptr), A(0), size, scores);
    if (has_nan(scores.score, size)) {
      for (int64_t i = 0; i < size; ++i) {
        out[i] = narrow<T>(static_cast<A>(__builtin_nan("")));
      }
      continue;
    }
    std::memset(out, 0, static_cast<size_t>(size) * sizeof(T));
    const A z = problem.z == nullptr ? A(0) : widen(static_cast<const T*>(problem.z)[row]);
    if (problem.z == nullptr ? !(top > 0) : !(z > 0)) {
      continue;
    }
    const A floor = problem.z == nullptr ? A(0) : simplex_floor(top, z);
    filter(scores, size, floor, kept);
    keep_largest(problem.k, top, floor, scores.score, kept);
    if (problem.z != nullptr) {
      project_survivors(top, z, kept);
    }
    for (int64_t i = 0; i < kept.count; ++i) {
      out[kept.index[i]] = narrow<T>(kept.value[i]);
    }
  }
}

// grad_v = [out > 0] (grad - mean of grad over the support), grad_z = that mean; without z the mean
// is left out.
template <typename T>
static void sparse_projection_backward(const SparseProjectionBackward& problem, int64_t begin,
                                       int64_t end) {
  using A = Accumulate<T>;
  const int64_t size = problem.size;
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = static_cast<const T*>(problem.grad) + row * size;
    const T* out = static_cast<const T*>(problem.out) + row * size;
    T* grad_v = static_cast<T*>(problem.grad_v) + row * size;
    A mean = 0;
    if (problem.grad_z != nullptr) {
      A total = 0, count = 0;
#pragma omp simd reduction(+ : total, count)
      for (int64_t i = 0; i < size; ++i) {
        const bool on = widen(out[i]) > 0;
        total += on ? widen(grad[i]) : A(0);
        count += on ? A(1) : A(0);
      }
      mean = count > 0 ? total / count : A(0);
      static_cast<T*>(problem.grad_z)[row] = narrow<T>(mean);
    }
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      grad_v[i] = narrow<T>(widen(out[i]) > 0 ? widen(grad[i]) - mean : A(0));
    }
  }
}

template <typename T>
static constexpr SparseOtKernels sparse_ot_kernels() {
  return {kBlock<Accumulate<T>>,    transport_dual<T>,    regularized_plan<T>,
          transport_sparse_plan<T>, sparse_projection<T>, sparse_projection_backward<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
