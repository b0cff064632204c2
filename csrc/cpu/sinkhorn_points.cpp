// sinkhorn_points and sinkhorn_points_apply on the CPU: points centred, scaled and packed; the
// arithmetic is in sinkhorn_points_kernels.h.
#include "sinkhorn_batch.h"

namespace regularizers {
namespace {

using torch::stable::contiguous;

// Points of one side as the kernels read them: rows of features, panels of columns, and squared
// norms. Points without mass that are not finite are put at the origin.
template <typename A>
struct Side {
  int64_t count, features, padded;
  std::vector<A> rows;        // [count, features]
  std::vector<double> norms;  // squared
  std::unique_ptr<char[]> storage;
  A* panels;  // [padded / width, features, width]

  Side(const A* points, const A* mass, int64_t count, int64_t features,
       const std::vector<double>& centre, bool unit_length, int64_t width)
      : count(count),
        features(features),
        padded(std::max<int64_t>(1, divide_up(count, width)) * width),
        rows(count * features),
        norms(count) {
    panels = aligned<A>(storage, padded * features);
    std::fill(panels, panels + padded * features, A{0});
    for (int64_t i = 0; i < count; ++i) {
      const A* from = points + i * features;
      A* to = rows.data() + i * features;
      double square = 0.0;
      for (int64_t d = 0; d < features; ++d) {
        to[d] = static_cast<A>(from[d] - centre[d]);
        square += static_cast<double>(to[d]) * to[d];
      }
      if (!(mass[i] > 0) && !std::isfinite(square)) {
        std::fill(to, to + features, A{0});
        square = 0.0;
      }
      if (unit_length) {
        const double factor = square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
        for (int64_t d = 0; d < features; ++d) {
          to[d] = static_cast<A>(to[d] * factor);
        }
      }
      norms[i] = square;
      for (int64_t d = 0; d < features; ++d) {
        panels[(i / width * features + d) * width + i % width] = to[d];
      }
    }
  }
};

// The mean over both sides, of the points that have mass: the cost does not depend on it, and
// rounding does.
template <typename A>
std::vector<double> common_mean(const A* x, const A* a, int64_t rows, const A* y, const A* b,
                                int64_t columns, int64_t features) {
  std::vector<double> mean(features, 0.0);
  int64_t count = 0;
  const auto add = [&](const A* points, const A* mass, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      if (mass[i] > 0) {
        ++count;
        for (int64_t d = 0; d < features; ++d) {
          mean[d] += points[i * features + d];
        }
      }
    }
  };
  add(x, a, rows);
  add(y, b, columns);
  for (double& value : mean) {
    value /= static_cast<double>(std::max<int64_t>(count, 1));
  }
  return mean;
}

// The kernel's view of one side as rows and the other as columns, for one epsilon.
template <typename A>
class View {
 public:
  View(const Side<A>& rows, const Side<A>& columns, PointCost cost, double scale)
      : rows_(rows), columns_(columns), cost_(cost), scale_(scale) {}

  // shift: beta_j + epsilon log b_j, [columns.count] or padded.
  SinkhornPoints points(double epsilon, const A* shift) {
    constexpr double kLog2e = 1.44269504088896340736;
    const double unit = kLog2e / epsilon;
    if (epsilon != epsilon_) {
      epsilon_ = epsilon;
      const double factor = cost_ == kSquaredEuclidean ? 2.0 * scale_ * unit
                            : cost_ == kCosine         ? scale_ * unit
                                                       : -2.0;
      scaled_.resize(rows_.rows.size());
      for (size_t k = 0; k < scaled_.size(); ++k) {
        scaled_[k] = static_cast<A>(factor * rows_.rows[k]);
      }
      row_term_.resize(rows_.count);
      for (int64_t i = 0; i < rows_.count; ++i) {
        row_term_[i] = static_cast<A>(cost_ == kSquaredEuclidean ? -scale_ * unit * rows_.norms[i]
                                      : cost_ == kCosine         ? -scale_ * unit
                                                                 : rows_.norms[i]);
      }
    }
    const A lowest = -std::numeric_limits<A>::infinity();
    column_term_.assign(columns_.padded, cost_ == kEuclidean ? A{0} : lowest);
    column_shift_.assign(cost_ == kEuclidean ? columns_.padded : 0, lowest);
    for (int64_t j = 0; j < columns_.count; ++j) {
      if (cost_ == kEuclidean) {
        column_term_[j] = static_cast<A>(columns_.norms[j]);
        column_shift_[j] = static_cast<A>(unit * shift[j]);
      } else {
        const double norm = cost_ == kSquaredEuclidean ? columns_.norms[j] : 0.0;
        column_term_[j] = static_cast<A>(unit * (static_cast<double>(shift[j]) - scale_ * norm));
      }
    }
    SinkhornPoints result{};
    result.cost = cost_;
    result.features = rows_.features;
    result.slope = scale_ * unit;
    result.x = scaled_.data();
    result.y = columns_.panels;
    result.row_term = row_term_.data();
    result.column_term = column_term_.data();
    result.column_shift = column_shift_.data();
    result.unit = unit;
    return result;
  }

 private:
  const Side<A>&rows_, &columns_;
  PointCost cost_;
  double scale_, epsilon_ = 0.0;
  std::vector<A> scaled_, row_term_, column_term_, column_shift_;
};

template <typename A>
class PointsProblem : public SinkhornProblem<A> {
 public:
  PointsProblem(const A* x, const A* y, const A* a, const A* b, int64_t rows, int64_t columns,
                int64_t features, PointCost cost, double scale, bool parallel)
      : kernel_(kernels().sinkhorn_points[sizeof(A) == 4 ? 0 : 1]),
        vectors_(kernels().sinkhorn[sizeof(A) == 4 ? kFloat : kDouble]),
        centre_(cost == kCosine ? std::vector<double>(features, 0.0)
                                : common_mean(x, a, rows, y, b, columns, features)),
        x_(x, a, rows, features, centre_, cost == kCosine, kernel_.panel_width),
        y_(y, b, columns, features, centre_, cost == kCosine, kernel_.panel_width),
        forward_(x_, y_, cost, scale),
        backward_(y_, x_, cost, scale),
        a_(a),
        parallel_(parallel) {}

  int64_t padded(int64_t columns) const override {
    return std::max<int64_t>(1, divide_up(columns, kernel_.panel_width)) * kernel_.panel_width;
  }

  // The same sweep with the sides exchanged.
  void exact_columns(double epsilon, const double* f, double* g) override {
    std::vector<A> shift(x_.padded), ones(y_.count, A{1}), alpha(y_.count), sums(y_.count);
    fill_shift(f, a_, epsilon, x_.count, shift);
    SinkhornSweep sweep{};
    sweep.rows = y_.count;
    sweep.columns = x_.count;
    sweep.padded_columns = x_.padded;
    sweep.epsilon = epsilon;
    sweep.a = ones.data();
    sweep.alpha = alpha.data();
    sweep.row_sum = sums.data();
    sweep.tau = sweep.omega = 1.0;
    sweep.cold = true;
    const SinkhornPoints points = backward_.points(epsilon, shift.data());
    const auto range = [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> storage;
      A* scratch = aligned<A>(storage, kernel_.tile_rows * x_.padded);
      double residual[2] = {};
      kernel_.sweep(sweep, points, begin, end, nullptr, scratch, residual);
    };
    if (parallel_) {
      torch::stable::parallel_for(0, y_.count, 64, range);
    } else {
      range(0, y_.count);
    }
    for (int64_t j = 0; j < y_.count; ++j) {
      g[j] = static_cast<double>(alpha[j]) - epsilon * std::log(static_cast<double>(sums[j]));
    }
  }

  void begin_sweep(const SinkhornSweep& sweep) override {
    points_ = forward_.points(sweep.epsilon, static_cast<const A*>(sweep.shift));
  }

  void log_sweep(const SinkhornSweep& sweep, int64_t begin, int64_t end, A* partial, A* scratch,
                 double* residual) const override {
    kernel_.sweep(sweep, points_, begin, end, partial, scratch, residual);
  }

  int64_t scratch_rows() const override { return kernel_.tile_rows; }
  bool stores_kernel() const override { return false; }
  const SinkhornKernels& kernel() const override { return vectors_; }

 private:
  const SinkhornPointsKernels& kernel_;
  const SinkhornKernels& vectors_;
  std::vector<double> centre_;
  Side<A> x_, y_;
  View<A> forward_, backward_;
  SinkhornPoints points_{};
  const A* a_;
  bool parallel_;
};

// Half-precision points are widened once; n d numbers are few beside n m.
Tensor widened(const Tensor& points, StorageType type) {
  return contiguous(torch::stable::to(points, accumulate_type(type)));
}

template <typename A>
const A* item_points(const Tensor& points, int64_t item) {
  return static_cast<const A*>(points.const_data_ptr()) + item * points.size(1) * points.size(2);
}

template <typename A>
SinkhornTensors solve_points(const SinkhornBatch& batch, const Tensor& x, const Tensor& y,
                             PointCost cost, double scale, const SinkhornOptions& options,
                             const std::optional<Tensor>& f0, const std::optional<Tensor>& g0) {
  return solve_batch<A>(batch, options, f0, g0, "x and y", [&](int64_t item, bool parallel) {
    return std::make_unique<PointsProblem<A>>(
        item_points<A>(x, item), item_points<A>(y, item), batch.row_masses<A>(item),
        batch.column_masses<A>(item), batch.rows[item], batch.columns[item], x.size(2), cost, scale,
        parallel);
  });
}

SinkhornTensors sinkhorn_points(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                                const Tensor& epsilon, const std::optional<Tensor>& f0,
                                const std::optional<Tensor>& g0,
                                const std::optional<Tensor>& row_sizes,
                                const std::optional<Tensor>& column_sizes, int64_t cost,
                                double scale, double tol, int64_t max_iter, int64_t min_iter,
                                int64_t inner_iter, double eps_init, double eps_decay,
                                double momentum, double tau_a, double tau_b, bool linf,
                                bool symmetric) {
  const SinkhornOptions options{tol,      max_iter, min_iter, inner_iter, eps_init, eps_decay,
                                momentum, tau_a,    tau_b,    linf,       symmetric};
  const SinkhornBatch batch =
      read_batch(storage_type(x), a, b, epsilon, row_sizes, column_sizes, options.balanced());
  const Tensor rows = widened(x, batch.type), columns = widened(y, batch.type);
  const PointCost kind = static_cast<PointCost>(cost);
  return batch.type == kDouble
             ? solve_points<double>(batch, rows, columns, kind, scale, options, f0, g0)
             : solve_points<float>(batch, rows, columns, kind, scale, options, f0, g0);
}

// v [m, k] as panels [k panels][padded m][width].
template <typename A>
A* pack_values(const A* v, int64_t rows, int64_t padded, int64_t count, int64_t width,
               std::unique_ptr<char[]>& storage) {
  const int64_t panels = divide_up(count, width);
  A* packed = aligned<A>(storage, panels * padded * width);
  std::fill(packed, packed + panels * padded * width, A{0});
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t k = 0; k < count; ++k) {
      packed[(k / width * padded + j) * width + k % width] = v[j * count + k];
    }
  }
  return packed;
}

template <typename A>
void apply_item(const SinkhornBatch& batch, int64_t item, const Tensor& x, const Tensor& y,
                const A* f, const A* g, const A* v, int64_t values, PointCost cost, double scale,
                bool over_distance, bool parallel, A* product, A* sums) {
  const SinkhornPointsKernels& kernel = kernels().sinkhorn_points[sizeof(A) == 4 ? 0 : 1];
  const int64_t rows = batch.rows[item], columns = batch.columns[item], features = x.size(2);
  if (rows == 0 || columns == 0) {
    return;
  }
  const A *a = batch.row_masses<A>(item), *b = batch.column_masses<A>(item);
  const A *row_points = item_points<A>(x, item), *column_points = item_points<A>(y, item);
  const std::vector<double> centre =
      cost == kCosine ? std::vector<double>(features, 0.0)
                      : common_mean(row_points, a, rows, column_points, b, columns, features);
  const Side<A> left(row_points, a, rows, features, centre, cost == kCosine, kernel.panel_width);
  const Side<A> right(column_points, b, columns, features, centre, cost == kCosine,
                      kernel.panel_width);
  View<A> view(left, right, cost, scale);
  std::vector<A> alpha(rows), shift(right.padded);
  fill_shift(f, a, batch.epsilon[item], rows, alpha);
  fill_shift(g, b, batch.epsilon[item], columns, shift);
  const SinkhornPoints points = view.points(batch.epsilon[item], shift.data());
  SinkhornSweep sweep{};
  sweep.rows = rows;
  sweep.columns = columns;
  sweep.padded_columns = right.padded;
  sweep.epsilon = batch.epsilon[item];
  sweep.alpha = alpha.data();
  std::unique_ptr<char[]> packed_storage, product_storage;
  const int64_t panels = divide_up(values, kernel.panel_width),
                stride = panels * kernel.panel_width;
  const A* packed =
      pack_values(v, columns, right.padded, values, kernel.panel_width, packed_storage);
  A* padded_product = aligned<A>(product_storage, rows * stride);
  const auto range = [&](int64_t begin, int64_t end) {
    std::unique_ptr<char[]> storage;
    A* scratch = aligned<A>(storage, kernel.tile_rows * kApplyColumns);
    kernel.apply(sweep, points, packed, panels, over_distance, begin, end, padded_product, sums,
                 scratch);
    for (int64_t i = begin; i < end; ++i) {
      std::copy(padded_product + i * stride, padded_product + i * stride + values,
                product + i * values);
    }
  };
  if (parallel) {
    torch::stable::parallel_for(0, rows, 64, range);
  } else {
    range(0, rows);
  }
}

template <typename A>
void apply_batch(const SinkhornBatch& batch, const Tensor& x, const Tensor& y, const Tensor& f,
                 const Tensor& g, const Tensor& v, PointCost cost, double scale, bool over_distance,
                 Tensor& product, Tensor& sums) {
  const int64_t values = v.size(2);
  for_items(batch.size, batch.max_rows * batch.max_columns, [&](int64_t item, bool parallel) {
    apply_item<A>(batch, item, x, y,
                  static_cast<const A*>(f.const_data_ptr()) + item * batch.max_rows,
                  static_cast<const A*>(g.const_data_ptr()) + item * batch.max_columns,
                  static_cast<const A*>(v.const_data_ptr()) + item * batch.max_columns * values,
                  values, cost, scale, over_distance, parallel,
                  static_cast<A*>(product.mutable_data_ptr()) + item * batch.max_rows * values,
                  static_cast<A*>(sums.mutable_data_ptr()) + item * batch.max_rows);
  });
}

std::tuple<Tensor, Tensor> sinkhorn_points_apply(const Tensor& x, const Tensor& y, const Tensor& a,
                                                 const Tensor& b, const Tensor& epsilon,
                                                 const Tensor& f, const Tensor& g, const Tensor& v,
                                                 const std::optional<Tensor>& row_sizes,
                                                 const std::optional<Tensor>& column_sizes,
                                                 int64_t cost, double scale, bool over_distance) {
  const SinkhornBatch batch = read_batch(storage_type(x), a, b, epsilon, row_sizes, column_sizes,
                                         /*balanced=*/false);
  const Tensor rows = widened(x, batch.type), columns = widened(y, batch.type);
  Tensor product = torch::stable::new_zeros(batch.a, {batch.size, batch.max_rows, v.size(2)});
  Tensor sums = torch::stable::new_zeros(batch.a, {batch.size, batch.max_rows});
  const PointCost kind = static_cast<PointCost>(cost);
  if (batch.type == kDouble) {
    apply_batch<double>(batch, rows, columns, contiguous(f), contiguous(g), contiguous(v), kind,
                        scale, over_distance, product, sums);
  } else {
    apply_batch<float>(batch, rows, columns, contiguous(f), contiguous(g), contiguous(v), kind,
                       scale, over_distance, product, sums);
  }
  return {product, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("sinkhorn_points", TORCH_BOX(&sinkhorn_points));
  library.impl("sinkhorn_points_apply", TORCH_BOX(&sinkhorn_points_apply));
}

}  // namespace regularizers
