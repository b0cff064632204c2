// How Sinkhorn's iterations are driven, whatever a sweep reads (a cost matrix or points). Baseline
// code: scalars and calls into the vectorised kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "common.h"
#include "sinkhorn_control.h"

namespace regularizers {

// What the driver needs of a problem: the arrays of a sweep, and the sweeps themselves.
template <typename A>
class SinkhornProblem {
 public:
  virtual ~SinkhornProblem() = default;

  // The length of an array over columns, padded to whole vectors.
  virtual int64_t padded(int64_t columns) const = 0;
  // G_j (double) for potentials f of the rows, exactly.
  virtual void exact_columns(double epsilon, const double* f, double* g) = 0;
  // Called before the row blocks of a log_sweep are worked off.
  virtual void begin_sweep(const SinkhornSweep&) {}
  // As SinkhornKernels::log_sweep; scratch holds scratch_rows() padded rows.
  virtual void log_sweep(const SinkhornSweep& sweep, int64_t begin, int64_t end, A* partial,
                         A* scratch, double* residual) const = 0;
  virtual int64_t scratch_rows() const = 0;
  // Whether log_sweep can write the kernel down for kernel_sweep.
  virtual bool stores_kernel() const = 0;
  virtual const SinkhornKernels& kernel() const = 0;
};

// Rows are worked off in this many blocks, each with sums over columns of its own. The number
// depends on the rows alone and the sums are added in order: results do not depend on the number of
// threads.
inline int64_t row_blocks(int64_t rows) {
  return std::max<int64_t>(1, std::min<int64_t>(32, rows / 64));
}

// potential_i + epsilon log weight_i for the first `count`, -inf where there is no mass and beyond.
template <typename P, typename A>
void fill_shift(const P* potential, const A* weight, double epsilon, int64_t count,
                std::vector<A>& shift) {
  std::fill(shift.begin(), shift.end(), -std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < count; ++i) {
    if (weight[i] > 0) {
      shift[i] = static_cast<A>(potential[i] + epsilon * std::log(static_cast<double>(weight[i])));
    }
  }
}

template <typename T>
T* aligned(std::unique_ptr<char[]>& storage, int64_t count) {
  constexpr size_t kLine = 64;
  storage.reset(new char[static_cast<size_t>(count) * sizeof(T) + kLine]);
  const uintptr_t address = reinterpret_cast<uintptr_t>(storage.get());
  return reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
}

template <typename A>
class SinkhornDriver {
 public:
  SinkhornDriver(SinkhornProblem<A>& problem, int64_t rows, int64_t columns, const A* a, const A* b,
                 double epsilon, const SinkhornOptions& options, bool parallel)
      : problem_(problem),
        rows_(rows),
        columns_(columns),
        options_(options),
        target_epsilon_(epsilon),
        parallel_(parallel),
        blocks_(row_blocks(rows)),
        relaxation_(options.momentum),
        floor_(sizeof(A) == 4 ? 1e-5 : 1e-13) {
    padded_ = problem.padded(columns);
    f_.assign(rows, 0.0);
    g_.assign(columns, 0.0);
    alpha_.assign(rows, A{0});
    log_u_.assign(rows, A{0});
    row_sum_.assign(rows, A{1});
    residuals_.assign(2 * blocks_, 0.0);
    a_.assign(a, a + rows);
    b_.assign(padded_, A{0});
    std::copy(b, b + columns, b_.begin());
    v_.assign(padded_, A{1});
    log_v_.assign(padded_, A{0});
    sum_.assign(padded_, A{0});
    shift_.assign(padded_, -std::numeric_limits<A>::infinity());
    partial_ = aligned<A>(partial_storage_, blocks_ * padded_);
    for (int64_t i = 0; i < rows; ++i) {
      total_a_ += a[i];
    }
    for (int64_t j = 0; j < columns; ++j) {
      total_b_ += b[j];
    }
  }

  SinkhornResult solve(const double* f_start, const double* g_start) {
    if (f_start != nullptr) {
      f_.assign(f_start, f_start + rows_);
    }
    SinkhornResult result =
        options_.symmetric ? solve_symmetric(g_start) : solve_alternating(g_start);
    kernel_storage_.reset();
    return result;
  }

  const std::vector<double>& f() const { return f_; }
  const std::vector<double>& g() const { return g_; }

 private:
  double epsilon_at(int64_t iteration) const {
    if (options_.eps_init == 1.0) {
      return target_epsilon_;
    }
    return target_epsilon_ * std::max(options_.eps_init * std::pow(options_.eps_decay,
                                                                   static_cast<double>(iteration)),
                                      1.0);
  }

  SinkhornResult solve_alternating(const double* g_start) {
    SinkhornResult result;
    epsilon_ = epsilon_at(0);
    if (g_start != nullptr) {
      g_.assign(g_start, g_start + columns_);
    } else {
      first_columns();
      for (int64_t j = 0; j < columns_; ++j) {
        if (b_[j] > 0 && !std::isfinite(g_[j])) {
          result.invalid = true;
          return result;
        }
      }
    }
    Verification verification;
    for (int64_t k = 0; k < options_.max_iter; ++k) {
      change_epsilon(epsilon_at(k));
      const bool annealing = epsilon_ > target_epsilon_, last = k + 1 == options_.max_iter;
      const bool verifying = verification.due(k);
      // The first iteration has no f to relax from.
      const double omega = k == 0 || verifying || last || annealing ? 1.0 : relaxation_.omega();
      sweep(options_.tau_a, omega, /*with_columns=*/true);
      SinkhornColumns columns = measure();
      result.iterations = k + 1;
      result.error = options_.linf ? std::max(row_residual_[1], columns.residual_max)
                                   : row_residual_[0] + columns.residual_sum;
      mass_ = columns.mass;
      if (std::isnan(result.error)) {
        result.invalid = k == 0;
        break;
      }
      const bool good = options_.tol > 0.0 && result.error <= options_.tol;
      const bool stuck = options_.tol > 0.0 && floor_.reached(result.error, total_a_);
      const bool may_stop = options_.tests(k) && !annealing;
      if (last || ((good || stuck) && may_stop && omega == 1.0)) {
        result.converged = result.error <= options_.tol && !annealing;
        break;
      }
      if (!annealing && !verifying) {
        relaxation_.observe(result.error, total_a_, columns.lowest_ratio);
      }
      const bool near = options_.tol > 0.0 && result.error <= Verification::kNear * options_.tol;
      if ((near || stuck) && relaxation_.omega() != 1.0 && options_.tests(k + 1)) {
        verification.ask(k + 1);
      }
      move(columns, annealing ? 1.0 : relaxation_.omega());
    }
    read_potentials();
    finish_masked();
    result.value = value();
    return result;
  }

  // g from the first f. A sweep that leaves f alone serves, and stores the kernel on the way;
  // points exchange their sides.
  void first_columns() {
    if (problem_.stores_kernel()) {
      sweep(1.0, /*omega=*/0.0, /*with_columns=*/true);
      SinkhornColumns columns = measure();
      move(columns, 1.0);
      return;
    }
    problem_.exact_columns(epsilon_, f_.data(), g_.data());
    for (double& g : g_) {
      g *= options_.tau_b;
    }
  }

  // cost symmetric and a = b: one vector, f <- (f + tau F(f)) / 2. Every sweep measures the f that
  // it starts from, so the last update is not done.
  SinkhornResult solve_symmetric(const double* g_start) {
    SinkhornResult result;
    if (g_start != nullptr) {
      f_.assign(g_start, g_start + rows_);
    }
    epsilon_ = epsilon_at(0);
    g_ = f_;
    for (int64_t k = 0; k < options_.max_iter; ++k) {
      change_epsilon(epsilon_at(k));
      const bool annealing = epsilon_ > target_epsilon_, last = k + 1 == options_.max_iter;
      sweep(options_.tau_a, /*omega=*/0.0, /*with_columns=*/false);
      result.iterations = k + 1;
      result.error = row_residual_[options_.linf ? 1 : 0];
      if (std::isnan(result.error)) {
        result.invalid = k == 0;
        break;
      }
      const bool good = options_.tol > 0.0 && result.error <= options_.tol;
      const bool stuck = options_.tol > 0.0 && floor_.reached(result.error, total_a_);
      const bool may_stop = options_.tests(k) && !annealing;
      if (last || ((good || stuck) && may_stop)) {
        result.converged = result.error <= options_.tol && !annealing;
        break;
      }
      double drift = 0.0;
      for (int64_t i = 0; i < rows_; ++i) {
        if (!(a_[i] > 0)) {
          continue;
        }
        const double updated = alpha_[i] - epsilon_ * std::log(static_cast<double>(row_sum_[i]));
        f_[i] = 0.5 * (f_[i] + options_.tau_a * updated);
        log_u_[i] = static_cast<A>((f_[i] - alpha_[i]) / epsilon_);
        log_v_[i] = static_cast<A>((f_[i] - g_[i]) / epsilon_);  // g_ keeps what shift_ holds
        v_[i] = std::exp(log_v_[i]);
        drift = std::max(drift, std::fabs(static_cast<double>(log_v_[i])));
      }
      if (drift > kMaxDrift || !kernel_valid_) {
        g_ = f_;
        kernel_valid_ = false;
      }
    }
    mass_ = 0.0;
    for (int64_t i = 0; i < rows_; ++i) {
      if (a_[i] > 0) {  // row sums of the plan of (f, f)
        mass_ += a_[i] * row_sum_[i] * std::exp((f_[i] - alpha_[i]) / epsilon_);
      }
    }
    g_ = f_;
    finish_masked();
    g_ = f_;
    result.value = value();
    return result;
  }

  void change_epsilon(double epsilon) {
    if (epsilon != epsilon_) {
      read_potentials();
      epsilon_ = epsilon;
      kernel_valid_ = false;
    }
  }

  SinkhornSweep describe(double tau, double omega) {
    SinkhornSweep sweep{};
    sweep.rows = rows_;
    sweep.columns = columns_;
    sweep.padded_columns = padded_;
    sweep.epsilon = epsilon_;
    sweep.kernel = kernel_;
    sweep.kernel_stride = padded_;
    sweep.a = a_.data();
    sweep.shift = shift_.data();
    sweep.v = v_.data();
    sweep.alpha = alpha_.data();
    sweep.log_u = log_u_.data();
    sweep.row_sum = row_sum_.data();
    sweep.tau = tau;
    sweep.omega = omega;
    sweep.f_old = f_.data();
    return sweep;
  }

  // One sweep from the stored kernel where it is valid, else from the costs with v = 1, which
  // stores the kernel if epsilon stays. The columns' anchor beta is then exactly what shift_ says
  // after rounding, so no rounding of potentials enters the plan.
  void sweep(double tau, double omega, bool with_columns) {
    const bool from_kernel = kernel_valid_;
    if (!from_kernel) {
      for (int64_t j = 0; j < columns_; ++j) {
        if (b_[j] > 0) {
          const double log_b = epsilon_ * std::log(static_cast<double>(b_[j]));
          shift_[j] = static_cast<A>(g_[j] + log_b);
          g_[j] = static_cast<double>(shift_[j]) - log_b;
        }
      }
      std::fill(v_.begin(), v_.end(), A{1});
      std::fill(log_v_.begin(), log_v_.end(), A{0});
      const bool store = problem_.stores_kernel() && epsilon_ == target_epsilon_;
      if (store && kernel_ == nullptr) {
        kernel_ = aligned<A>(kernel_storage_, rows_ * padded_);
        advise_huge_pages(kernel_, static_cast<size_t>(rows_ * padded_) * sizeof(A));
      }
      kernel_valid_ = store;
    }
    SinkhornSweep sweep = describe(tau, omega);
    sweep.cold = cold_;
    cold_ = false;
    if (!from_kernel) {
      problem_.begin_sweep(sweep);
    }
    if (from_kernel && exact_rows_ && !(tau == 1.0 && omega == 1.0)) {
      read_log_u();
    }
    std::fill(residuals_.begin(), residuals_.end(), 0.0);
    for_blocks([&](int64_t block, int64_t begin, int64_t end, A* scratch) {
      A* partial = with_columns ? partial_ + block * padded_ : nullptr;
      double* residual = residuals_.data() + 2 * block;
      if (from_kernel) {
        problem_.kernel().kernel_sweep(sweep, begin, end, partial, residual);
      } else {
        problem_.log_sweep(sweep, begin, end, partial, scratch, residual);
      }
    });
    exact_rows_ = tau == 1.0 && omega == 1.0;
    row_residual_[0] = row_residual_[1] = 0.0;
    for (int64_t block = 0; block < blocks_; ++block) {
      row_residual_[0] += residuals_[2 * block];
      row_residual_[1] = std::max(row_residual_[1], residuals_[2 * block + 1]);
    }
  }

  template <typename Body>
  void for_blocks(const Body& body) {
    const auto range = [&](int64_t first, int64_t last) {
      std::unique_ptr<char[]> storage;
      A* scratch = aligned<A>(storage, problem_.scratch_rows() * padded_);
      for (int64_t block = first; block < last; ++block) {
        body(block, rows_ * block / blocks_, rows_ * (block + 1) / blocks_, scratch);
      }
    };
    if (parallel_ && blocks_ > 1) {
      torch::stable::parallel_for(0, blocks_, 1, range);
    } else {
      range(0, blocks_);
    }
  }

  SinkhornColumns measure() {
    SinkhornColumns columns{};
    columns.columns = columns_;
    columns.padded_columns = padded_;
    columns.blocks = blocks_;
    columns.epsilon = epsilon_;
    columns.tau = options_.tau_b;
    columns.partial = partial_;
    columns.b = b_.data();
    columns.shift = shift_.data();
    columns.v = v_.data();
    columns.log_v = log_v_.data();
    columns.sum = sum_.data();
    problem_.kernel().measure(columns);
    return columns;
  }

  // g <- g + omega (tau G - g). Where the sum of a column was lost to underflow, all columns are
  // computed again in the log domain; where v drifts far from 1, the kernel is given up.
  void move(SinkhornColumns& columns, double omega) {
    if (columns.underflow) {
      read_potentials();
      std::vector<double> exact(columns_);
      problem_.exact_columns(epsilon_, f_.data(), exact.data());
      for (int64_t j = 0; j < columns_; ++j) {
        g_[j] += omega * (options_.tau_b * exact[j] - g_[j]);
      }
      kernel_valid_ = false;
      return;
    }
    columns.omega = omega;
    const bool exact = omega == 1.0 && options_.tau_b == 1.0;
    if (exact_columns_ && !exact) {
      read_log_v();
    }
    exact_columns_ = exact;
    problem_.kernel().move(columns);
    if (!kernel_valid_ || columns.drift > kMaxDrift) {
      read_potentials();
      kernel_valid_ = false;
    }
  }

  // log u and log v of the last update, if that was exact and left them out.
  void read_log_u() {
    for (int64_t i = 0; i < rows_; ++i) {
      log_u_[i] = static_cast<A>(-std::log(static_cast<double>(row_sum_[i])));
    }
    exact_rows_ = false;
  }

  void read_log_v() {
    for (int64_t j = 0; j < columns_; ++j) {
      log_v_[j] = static_cast<A>(std::log(static_cast<double>(v_[j])));
    }
    exact_columns_ = false;
  }

  // f and g from anchors and factors; the factors of the columns are then spent.
  void read_potentials() {
    if (exact_rows_) {
      read_log_u();
    }
    if (exact_columns_) {
      read_log_v();
    }
    for (int64_t i = 0; i < rows_; ++i) {
      if (a_[i] > 0) {
        f_[i] = static_cast<double>(alpha_[i]) + epsilon_ * static_cast<double>(log_u_[i]);
      }
    }
    for (int64_t j = 0; j < columns_; ++j) {
      if (b_[j] > 0) {
        g_[j] += epsilon_ * static_cast<double>(log_v_[j]);
        log_v_[j] = 0;
        v_[j] = 1;
      }
    }
    kernel_valid_ = false;
  }

  // Points without mass get the potential that mass there would have.
  void finish_masked() {
    if (std::any_of(a_.begin(), a_.end(), [](A a) { return !(a > 0); })) {
      std::vector<A> unit(rows_, A{1});
      for (int64_t j = 0; j < columns_; ++j) {
        if (b_[j] > 0) {
          shift_[j] = static_cast<A>(g_[j] + epsilon_ * std::log(static_cast<double>(b_[j])));
        }
      }
      SinkhornSweep sweep = describe(1.0, 1.0);
      sweep.kernel = nullptr;
      sweep.a = unit.data();
      sweep.cold = true;
      problem_.begin_sweep(sweep);
      double residual[2] = {};
      std::unique_ptr<char[]> storage;
      A* scratch = aligned<A>(storage, problem_.scratch_rows() * padded_);
      for (int64_t i = 0; i < rows_; ++i) {
        if (!(a_[i] > 0)) {
          problem_.log_sweep(sweep, i, i + 1, nullptr, scratch, residual);
          f_[i] = options_.tau_a * (alpha_[i] - epsilon_ * std::log(double{row_sum_[i]}));
        }
      }
    }
    if (std::any_of(b_.begin(), b_.begin() + columns_, [](A b) { return !(b > 0); })) {
      std::vector<double> exact(columns_);
      problem_.exact_columns(epsilon_, f_.data(), exact.data());
      for (int64_t j = 0; j < columns_; ++j) {
        if (!(b_[j] > 0)) {
          g_[j] = options_.tau_b * exact[j];
        }
      }
    }
  }

  double value() const {
    return side_value(f_, a_, rows_, options_.tau_a) +
           side_value(g_, b_, columns_, options_.tau_b) + epsilon_ * (total_a_ * total_b_ - mass_);
  }

  // sum_i a_i f_i, or -rho sum_i a_i (exp(-f_i / rho) - 1) with rho = tau epsilon / (1 - tau).
  double side_value(const std::vector<double>& potential, const std::vector<A>& weight,
                    int64_t count, double tau) const {
    double total = 0.0;
    const double rho = tau * epsilon_ / (1.0 - tau);
    for (int64_t i = 0; i < count; ++i) {
      if (weight[i] > 0) {
        total += weight[i] * (tau == 1.0 ? potential[i] : -rho * std::expm1(-potential[i] / rho));
      }
    }
    return total;
  }

  // exp(-20) of the stored kernel's smallest entries is still far from underflow.
  static constexpr double kMaxDrift = sizeof(A) == 4 ? 20.0 : 200.0;

  SinkhornProblem<A>& problem_;
  int64_t rows_, columns_, padded_;
  const SinkhornOptions& options_;
  double target_epsilon_, epsilon_ = 0.0, total_a_ = 0.0, total_b_ = 0.0, mass_ = 0.0;
  bool parallel_, kernel_valid_ = false, cold_ = true, exact_rows_ = false, exact_columns_ = false;
  int64_t blocks_;
  Relaxation relaxation_;
  RoundingFloor floor_;
  double row_residual_[2] = {};
  std::vector<double> residuals_;  // of each block, (sum, max)
  std::vector<double> f_, g_;      // g_ is beta while a sweep's factors v are in use
  std::vector<A> a_, b_, alpha_, log_u_, row_sum_, v_, log_v_, sum_, shift_;
  std::unique_ptr<char[]> partial_storage_, kernel_storage_;
  A *partial_ = nullptr, *kernel_ = nullptr;
};

}  // namespace regularizers
