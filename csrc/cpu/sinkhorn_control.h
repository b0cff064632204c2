// How Sinkhorn's iterations are controlled: options, over-relaxation, when to stop. Scalars only;
// the same rules stand in ops/_sinkhorn_reference.py and ops/triton/sinkhorn_control.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace regularizers {

struct SinkhornOptions {
  double tol;
  int64_t max_iter, min_iter, inner_iter;
  double eps_init, eps_decay, momentum;  // momentum 0: chosen by Relaxation
  double tau_a, tau_b;
  bool linf, symmetric;

  bool balanced() const { return tau_a == 1.0 && tau_b == 1.0; }
  // Whether an iteration may be the last one before max_iter.
  bool tests(int64_t iteration) const {
    return iteration + 1 >= min_iter && (iteration + 1) % inner_iter == 0;
  }
};

struct SinkhornResult {
  double value = 0.0, error = std::numeric_limits<double>::infinity();
  int64_t iterations = 0;
  bool converged = false, invalid = false;  // invalid: costs that are not numbers
};

// Over-relaxation f <- f + omega (F - f), g likewise. Near the solution alternating updates
// converge with some rate r, and Young's theory of two-block relaxation holds: the best omega is
// 2 / (1 + sqrt(1 - r)), and a rate lambda observed under a smaller omega tells
// r = (lambda + omega - 1)^2 / (lambda omega^2). Far from it omega is capped so that the dual
// objective cannot fall (Thibault, Chizat, Dossal and Papadakis, 2021, arXiv 1711.01851).
class Relaxation {
 public:
  explicit Relaxation(double momentum)
      : adaptive_(momentum == 0.0), omega_(adaptive_ ? 1.0 : momentum) {}

  // The factor that the next half-iteration may use.
  double omega() const { return adaptive_ ? std::max(1.0, std::min(omega_, cap_)) : omega_; }

  // One iteration ended with this error of the marginals (of a plan of mass `mass`), and with this
  // lowest ratio of a column's sum to its target.
  void observe(double error, double mass, double lowest_ratio) {
    if (!adaptive_) {
      return;
    }
    std::rotate(errors_, errors_ + 1, errors_ + kHistory);
    errors_[kHistory - 1] = error;
    ++since_;
    if (omega_ == 1.0) {
      start(mass);
    } else if (since_ >= kWindow) {
      adjust();
    }
    cap_ = omega_ > 1.0 ? largest_safe(lowest_ratio) : 1.0;
  }

 private:
  static constexpr int kWindow = 6, kHistory = kWindow + 1;

  void start(double mass) {
    if (since_ < 3 || !(errors_[kHistory - 1] < 0.5 * mass)) {
      return;
    }
    const double rate = errors_[kHistory - 1] / errors_[kHistory - 2];
    const double before = errors_[kHistory - 2] / errors_[kHistory - 3];
    if (rate > 0.2 && rate < 1.0 && std::fabs(rate - before) < 0.15 * (1.0 - rate) + 0.02) {
      settle(2.0 / (1.0 + std::sqrt(std::max(1.0 - rate, 1e-4))));
    }
  }

  void adjust() {
    const double rate = std::pow(errors_[kHistory - 1] / errors_[0], 1.0 / kWindow);
    if (errors_[kHistory - 1] > 4.0 * reference_) {
      settle(1.0 + 0.5 * (omega_ - 1.0));  // too bold
    } else if (rate > omega_ - 1.0 + 0.02 * (2.0 - omega_)) {
      const double shifted = rate + omega_ - 1.0;
      const double gap = rate < 1.0 ? 1.0 - shifted * shifted / (rate * omega_ * omega_) : 0.0;
      const double now = 2.0 / omega_ - 1.0;  // sqrt(1 - r) for which omega_ is best
      settle(2.0 / (1.0 + std::sqrt(std::max({gap, now * now / 2.0, 1e-5}))));
    } else if (++low_ >= 3) {  // beyond the best omega the rate is omega - 1 and tells nothing
      settle(1.0 + 0.97 * (omega_ - 1.0));
    } else {
      reference_ = errors_[kHistory - 1];
      since_ = 0;
    }
  }

  void settle(double omega) {
    omega_ = omega;
    reference_ = errors_[kHistory - 1];
    since_ = 0;
    low_ = 0;
  }

  // The largest omega in [1, 2] with x (1 - x^-omega) - omega log x >= 0.
  static double largest_safe(double x) {
    if (!(x < 1.0 - 1e-6)) {  // nearer to 1 both terms cancel
      return 2.0;
    }
    if (!(x > 1e-6)) {
      return 1.0;
    }
    const double log_x = std::log(x);
    double low = 1.0, high = 2.0;
    for (int step = 0; step < 20; ++step) {
      const double middle = 0.5 * (low + high);
      const bool safe = x * (1.0 - std::exp(-middle * log_x)) - middle * log_x >= 0.0;
      (safe ? low : high) = middle;
    }
    return low;
  }

  bool adaptive_;
  double omega_, cap_ = 1.0, reference_ = 0.0, errors_[kHistory] = {};
  int64_t since_ = 0, low_ = 0;
};

// Errors cannot fall for ever: where rounding holds them up, going on is waste.
class RoundingFloor {
 public:
  explicit RoundingFloor(double level) : level_(level) {}

  bool reached(double error, double mass) {
    if (error < 0.99 * best_) {
      best_ = error;
      since_ = 0;
      return false;
    }
    return ++since_ >= 20 && error < level_ * mass;
  }

 private:
  double level_, best_ = std::numeric_limits<double>::infinity();
  int64_t since_ = 0;
};

// Only an iteration with an exact update of the rows can end the solution. Under over-relaxation
// the rows carry most of the error, so that such an iteration is tried already where the error is
// near the tolerance, but not too often: it costs some of the momentum.
class Verification {
 public:
  static constexpr double kNear = 20.0;

  void ask(int64_t iteration) {
    if (iteration - last_ >= kPause) {
      last_ = iteration;
    }
  }
  bool due(int64_t iteration) const { return iteration == last_; }

 private:
  static constexpr int64_t kPause = 6;
  int64_t last_ = -kPause;
};

}  // namespace regularizers
