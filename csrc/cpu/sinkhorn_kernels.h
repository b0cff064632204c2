// The arithmetic of dense Sinkhorn iterations on one problem.
//
//   plan  P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
//   rows     F_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)
//   columns  G_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)
//
// A sweep does a row update and, from the same exponentials, the sums of the columns of the new
// plan, which give G and at once the error of the plan's columns: one read of the matrix for a
// whole iteration. Potentials are split into an anchor and a factor,
//
//   f_i = alpha_i + epsilon log u_i,   g_j = beta_j + epsilon log v_j,
//   K_ij = exp((alpha_i + shift_j - C_ij) / epsilon),   shift_j = beta_j + epsilon log b_j,
//
// so that P_ij = a_i u_i K_ij v_j. log_sweep takes alpha_i from the largest entry of its row
// (K_ij <= 1, some K_ij = 1) with v = 1, and may store K; kernel_sweep goes on with the stored K
// while v stays near 1, and needs no exponential:
//
//   r_i = sum_j K_ij v_j,   F_i = alpha_i - epsilon log r_i,   column_j = sum_i a_i u_i K_ij.
//
// The column sums are sums of a_i times a probability: they need no maximum of their own. What can
// happen is that all terms of a column underflow; the driver then asks for column_pass.
#pragma once

#include <cmath>
#include <limits>

#include "elementary.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

constexpr double kLog2e = 1.44269504088896340736;

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// How a row's potential follows from its sum r, in logarithms: log u = (f - alpha) / epsilon.
template <typename A>
struct RowUpdate {
  const A* a;
  const A* alpha;
  A* log_u;
  A* row_sum;
  double epsilon;
  A tau, omega, anchor_scale, target_scale;
  bool exact;

  explicit RowUpdate(const SinkhornSweep& sweep)
      : a(static_cast<const A*>(sweep.a)),
        alpha(static_cast<const A*>(sweep.alpha)),
        log_u(static_cast<A*>(sweep.log_u)),
        row_sum(static_cast<A*>(sweep.row_sum)),
        epsilon(sweep.epsilon),
        tau(static_cast<A>(sweep.tau)),
        omega(static_cast<A>(sweep.omega)),
        anchor_scale(static_cast<A>((1.0 - sweep.tau) / sweep.epsilon)),
        target_scale(static_cast<A>((1.0 - sweep.tau) / (sweep.tau * sweep.epsilon))),
        exact(sweep.tau == 1.0 && sweep.omega == 1.0) {}

  // Updates ROWS rows from `row` on, given their sums: sets their weights a_i u_i, 0 without mass.
  // An exact balanced update, u = 1 / r, leaves the logarithm to whoever wants it; others move log
  // u and add |row sum of the plan - its target| to the residual. The old log u follows from the
  // potentials `from_f`, if they are given.
  template <int ROWS>
  inline __attribute__((always_inline)) void stripe(const A* sums, int64_t row,
                                                    const double* from_f, A* weight,
                                                    double* residual) const {
    for (int r = 0; r < ROWS; ++r) {
      row_sum[row + r] = sums[r];
    }
    if (exact) {
#pragma omp simd
      for (int r = 0; r < ROWS; ++r) {
        weight[r] = a[row + r] > 0 ? a[row + r] / sums[r] : A{0};
      }
      return;
    }
    A difference[ROWS];
#pragma omp simd
    for (int r = 0; r < ROWS; ++r) {
      const A old = from_f != nullptr ? static_cast<A>((from_f[row + r] - alpha[row + r]) / epsilon)
                                      : log_u[row + r];
      const A moved =
          old + omega * (-tau * logarithm(sums[r]) - anchor_scale * alpha[row + r] - old);
      const A u = exponential(moved);
      const A target =
          exponential(-target_scale * (alpha[row + r] + static_cast<A>(epsilon) * moved));
      const bool counts = a[row + r] > 0;
      log_u[row + r] = moved;
      difference[r] = counts ? a[row + r] * (u * sums[r] - target) : A{0};
      weight[r] = counts ? a[row + r] * u : A{0};
    }
    for (int r = 0; r < ROWS; ++r) {
      const double size = std::fabs(static_cast<double>(difference[r]));
      residual[0] += size;
      residual[1] = size > residual[1] ? size : residual[1];
    }
  }
};

template <typename A>
static inline void clear(A* values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    values[j] = 0;
  }
}

// partial_j += sum over the stripe's rows of weight_r K_rj.
template <typename A, int ROWS>
static inline void accumulate_columns(const A* const* kernel, const A* weight, A* partial,
                                      int64_t padded) {
  Vector<A> w[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    w[r] = broadcast(weight[r]);
  }
  for (int64_t j = 0; j < padded; j += kLanes<A>) {
    Vector<A> total = load(partial + j);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      total += w[r] * load(kernel[r] + j);
    }
    store(partial + j, total);
  }
}

// exp2((shift_j - C_j - top) scale) into row, top = max over j; returns the sum. A column with
// shift -inf counts as 0 whatever its cost is.
template <typename T>
static inline Accumulate<T> exponentiate_row(const T* cost, const Accumulate<T>* shift,
                                             int64_t columns, Accumulate<T> scale,
                                             Accumulate<T>* row, Accumulate<T>* top) {
  using A = Accumulate<T>;
  const Vector<A> lowest = broadcast(-kInfinity<A>);
  Vector<A> largest = lowest;
  for (int64_t j = 0; j < columns; j += kLanes<A>) {
    const Vector<A> shifts = load(shift + j);
    Vector<A> value = shifts - load_wide(cost + j, columns - j);
    value = shifts > lowest ? value : lowest;
    largest = value > largest ? value : largest;
    store(row + j, value);
  }
  *top = max_lanes<A>(largest);
  const Vector<A> base = broadcast(*top > -kInfinity<A> ? *top : A{0});
  const Vector<A> factor = broadcast(scale);
  Vector<A> sum{};
  for (int64_t j = 0; j < columns; j += kLanes<A>) {
    const Vector<A> value = exp2((load(row + j) - base) * factor);
    sum += value;
    store(row + j, value);
  }
  return sum_lanes<A>(sum);
}

template <typename T, int ROWS>
static inline void log_stripe(const SinkhornSweep& sweep, const RowUpdate<Accumulate<T>>& update,
                              int64_t row, Accumulate<T>* partial, Accumulate<T>* scratch,
                              double* residual) {
  using A = Accumulate<T>;
  const A scale = static_cast<A>(kLog2e / sweep.epsilon);
  A* alpha = static_cast<A*>(sweep.alpha);
  const A* kernel[ROWS];
  A sums[ROWS], weight[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t i = row + r;
    A* to = sweep.kernel != nullptr ? static_cast<A*>(sweep.kernel) + i * sweep.kernel_stride
                                    : scratch + r * sweep.padded_columns;
    kernel[r] = to;
    sums[r] = 1;
    if (!(update.a[i] > 0)) {  // whatever the row holds, it has no say
      clear(to, sweep.padded_columns);
      alpha[i] = 0;
      continue;
    }
    A top;
    sums[r] = exponentiate_row(static_cast<const T*>(sweep.cost) + i * sweep.cost_stride,
                               static_cast<const A*>(sweep.shift), sweep.columns, scale, to, &top);
    alpha[i] = -top;
    if (top == -kInfinity<A>) {  // every entry is forbidden or NaN: mass cannot leave this row
      residual[0] = std::numeric_limits<double>::quiet_NaN();
    }
  }
  update.template stripe<ROWS>(sums, row, sweep.f_old, weight, residual);
  if (partial != nullptr) {
    accumulate_columns<A, ROWS>(kernel, weight, partial, sweep.padded_columns);
  }
}

template <typename T>
static void sinkhorn_log_sweep(const SinkhornSweep& sweep, int64_t begin, int64_t end,
                               void* partial, void* scratch, double* residual) {
  using A = Accumulate<T>;
  A* columns = static_cast<A*>(partial);
  if (columns != nullptr) {
    clear(columns, sweep.padded_columns);
  }
  const RowUpdate<A> update(sweep);
  int64_t row = begin;
  for (; row + kSinkhornStripe <= end; row += kSinkhornStripe) {
    log_stripe<T, kSinkhornStripe>(sweep, update, row, columns, static_cast<A*>(scratch), residual);
  }
  for (; row < end; ++row) {
    log_stripe<T, 1>(sweep, update, row, columns, static_cast<A*>(scratch), residual);
  }
}

template <typename A, int ROWS>
static inline void kernel_stripe(const SinkhornSweep& sweep, const RowUpdate<A>& update,
                                 int64_t row, A* partial, double* residual) {
  const A* v = static_cast<const A*>(sweep.v);
  const A* kernel[ROWS];
  Vector<A> sum[ROWS][2] = {};
  for (int r = 0; r < ROWS; ++r) {
    kernel[r] = static_cast<const A*>(sweep.kernel) + (row + r) * sweep.kernel_stride;
  }
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= sweep.padded_columns; j += 2 * kLanes<A>) {
    const Vector<A> first = load(v + j), second = load(v + j + kLanes<A>);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      sum[r][0] += load(kernel[r] + j) * first;
      sum[r][1] += load(kernel[r] + j + kLanes<A>) * second;
    }
  }
  for (; j < sweep.padded_columns; j += kLanes<A>) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      sum[r][0] += load(kernel[r] + j) * load(v + j);
    }
  }
  A sums[ROWS], weight[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = sum_lanes<A>(sum[r][0] + sum[r][1]);
  }
  update.template stripe<ROWS>(sums, row, nullptr, weight, residual);
  if (partial != nullptr) {
    accumulate_columns<A, ROWS>(kernel, weight, partial, sweep.padded_columns);
  }
}

template <typename A>
static void sinkhorn_kernel_sweep(const SinkhornSweep& sweep, int64_t begin, int64_t end,
                                  void* partial, double* residual) {
  A* columns = static_cast<A*>(partial);
  if (columns != nullptr) {
    clear(columns, sweep.padded_columns);
  }
  const RowUpdate<A> update(sweep);
  int64_t row = begin;
  for (; row + kSinkhornStripe <= end; row += kSinkhornStripe) {
    kernel_stripe<A, kSinkhornStripe>(sweep, update, row, columns, residual);
  }
  for (; row < end; ++row) {
    kernel_stripe<A, 1>(sweep, update, row, columns, residual);
  }
}

// Rows are taken one after the other with a running maximum for each column (online log-sum-exp),
// kSinkhornStripe at a time to spare exponentials.
template <typename T>
static void sinkhorn_column_pass(const SinkhornSweep& sweep, const void* row_shift, int64_t begin,
                                 int64_t end, void* base, void* sum) {
  using A = Accumulate<T>;
  const A* shift = static_cast<const A*>(row_shift);
  A* tops = static_cast<A*>(base);
  A* sums = static_cast<A*>(sum);
  const Vector<A> lowest = broadcast(-kInfinity<A>);
  const Vector<A> scale = broadcast(static_cast<A>(kLog2e / sweep.epsilon));
  for (int64_t j = 0; j < sweep.padded_columns; j += kLanes<A>) {
    store(tops + j, lowest);
    store(sums + j, Vector<A>{});
  }
  int64_t rows[kSinkhornStripe];
  for (int64_t next = begin; next < end;) {
    int count = 0;
    for (; next < end && count < kSinkhornStripe; ++next) {
      if (shift[next] > -kInfinity<A>) {  // rows without mass have no say
        rows[count++] = next;
      }
    }
    for (int64_t j = 0; j < sweep.columns; j += kLanes<A>) {
      Vector<A> value[kSinkhornStripe];
      const Vector<A> old = load(tops + j);
      Vector<A> top = old;
      for (int r = 0; r < count; ++r) {
        const T* cost = static_cast<const T*>(sweep.cost) + rows[r] * sweep.cost_stride;
        value[r] = shift[rows[r]] - load_wide(cost + j, sweep.columns - j);
        top = value[r] > top ? value[r] : top;
      }
      const Vector<A> anchor = top > lowest ? top : Vector<A>{};
      Vector<A> total = load(sums + j) * exp2((old - anchor) * scale);
      for (int r = 0; r < count; ++r) {
        total += exp2((value[r] - anchor) * scale);
      }
      store(tops + j, top);
      store(sums + j, total);
    }
  }
}

// Sums below kTiny (above its inverse) are taken for lost: terms far below them may have
// underflowed.
template <typename A>
constexpr A kTiny = sizeof(A) == 4 ? A(1e-30) : A(1e-290);

template <typename A>
static void sinkhorn_measure(SinkhornColumns& problem) {
  const A* partial = static_cast<const A*>(problem.partial);
  const A* b = static_cast<const A*>(problem.b);
  const A* shift = static_cast<const A*>(problem.shift);
  const A* v = static_cast<const A*>(problem.v);
  const A* log_v = static_cast<const A*>(problem.log_v);
  A* sum = static_cast<A*>(problem.sum);
  clear(sum, problem.padded_columns);
  for (int64_t block = 0; block < problem.blocks; ++block) {
    const A* row = partial + block * problem.padded_columns;
    for (int64_t j = 0; j < problem.padded_columns; ++j) {
      sum[j] += row[j];
    }
  }
  const bool balanced = problem.tau == 1.0;
  const A target_scale = static_cast<A>((1.0 - problem.tau) / problem.tau);
  const A inverse_epsilon = static_cast<A>(1.0 / problem.epsilon);
  double total = 0.0, mass = 0.0, largest = 0.0, lowest = kInfinity<double>;
  int32_t lost = 0;
#pragma omp simd reduction(+ : total, mass) reduction(max : largest, lost) reduction(min : lowest)
  for (int64_t j = 0; j < problem.columns; ++j) {
    const bool counts = b[j] > 0;
    const A column = v[j] * sum[j];
    A target = b[j];
    if (!balanced && counts) {
      const A g = shift[j] * inverse_epsilon - logarithm(b[j]) + log_v[j];  // over epsilon
      target = b[j] * exponential(-target_scale * g);
    }
    const double difference = counts ? std::fabs(static_cast<double>(column) - target) : 0.0;
    total += difference;
    mass += counts ? static_cast<double>(column) : 0.0;
    largest = difference > largest ? difference : largest;
    const double ratio = counts ? static_cast<double>(column) / target : kInfinity<double>;
    lowest = ratio < lowest ? ratio : lowest;
    const int32_t is_lost = counts && !(sum[j] > kTiny<A> && sum[j] < 1 / kTiny<A>) ? 1 : 0;
    lost = is_lost > lost ? is_lost : lost;
  }
  problem.residual_sum = total;
  problem.residual_max = largest;
  problem.mass = mass;
  problem.lowest_ratio = lowest;
  problem.underflow = lost != 0;
}

template <typename A>
static void sinkhorn_move(SinkhornColumns& problem) {
  const A* b = static_cast<const A*>(problem.b);
  const A* shift = static_cast<const A*>(problem.shift);
  const A* sum = static_cast<const A*>(problem.sum);
  A* v = static_cast<A*>(problem.v);
  A* log_v = static_cast<A*>(problem.log_v);
  const A tau = static_cast<A>(problem.tau), omega = static_cast<A>(problem.omega);
  const A anchor_scale = static_cast<A>((1.0 - problem.tau) / problem.epsilon);
  const A remainder = static_cast<A>(1.0 - problem.tau);
  A drift = 0;
  if (problem.tau == 1.0 && problem.omega == 1.0) {
    A largest = 1, smallest = 1;
#pragma omp simd reduction(max : largest) reduction(min : smallest)
    for (int64_t j = 0; j < problem.columns; ++j) {
      const A ratio = b[j] > 0 ? b[j] / sum[j] : A{1};
      v[j] = ratio;
      largest = ratio > largest ? ratio : largest;
      smallest = ratio < smallest ? ratio : smallest;
    }
    const A above = std::log(largest), below = -std::log(smallest);
    drift = above > below ? above : below;
  } else {
#pragma omp simd reduction(max : drift)
    for (int64_t j = 0; j < problem.columns; ++j) {
      // log v of g = tau G is tau log(b / sum) - (1 - tau) beta / epsilon
      const bool counts = b[j] > 0;
      const A ratio = counts ? b[j] / sum[j] : A{1};
      const A anchor = counts ? anchor_scale * shift[j] - remainder * logarithm(b[j]) : A{0};
      const A moved = log_v[j] + omega * (tau * logarithm(ratio) - anchor - log_v[j]);
      log_v[j] = moved;
      v[j] = exponential(moved);
      const A size = moved < 0 ? -moved : moved;
      drift = size > drift ? size : drift;
    }
  }
  problem.drift = drift;
}

template <typename T>
static void sinkhorn_plan(const SinkhornSweep& sweep, const void* row_shift, double weight,
                          int64_t begin, int64_t end, void* plan) {
  using A = Accumulate<T>;
  const A* rows = static_cast<const A*>(row_shift);
  const A* shift = static_cast<const A*>(sweep.shift);
  const Vector<A> scale = broadcast(static_cast<A>(kLog2e / sweep.epsilon));
  const Vector<A> factor = broadcast(static_cast<A>(weight));
  const Vector<A> lowest = broadcast(-kInfinity<A>);
  for (int64_t i = begin; i < end; ++i) {
    const T* cost = static_cast<const T*>(sweep.cost) + i * sweep.cost_stride;
    T* to = static_cast<T*>(plan) + i * sweep.columns;
    const bool counts = rows[i] > -kInfinity<A>;
    for (int64_t j = 0; j < sweep.columns; j += kLanes<A>) {
      const Vector<A> shifts = load(shift + j);
      Vector<A> value = (rows[i] + (shifts - load_wide(cost + j, sweep.columns - j))) * scale;
      value = counts ? (shifts > lowest ? value : lowest) : lowest;
      value = exp2(value) * factor;
      if constexpr (sizeof(T) == sizeof(A)) {
        if (j + kLanes<A> <= sweep.columns) {
          store(to + j, value);
          continue;
        }
      }
      store_narrow(to + j, value, sweep.columns - j);
    }
  }
}

template <typename T>
static constexpr SinkhornKernels sinkhorn_kernels() {
  using A = Accumulate<T>;
  return {
      kLanes<A>,           sinkhorn_column_pass<T>, sinkhorn_log_sweep<T>, sinkhorn_kernel_sweep<A>,
      sinkhorn_measure<A>, sinkhorn_move<A>,        sinkhorn_plan<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
