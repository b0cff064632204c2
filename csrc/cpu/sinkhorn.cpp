// sinkhorn and transport_plan on the CPU: checks, batches, threads, registration.
#include <optional>
#include <string>
#include <tuple>

#include "sinkhorn_solver.h"

namespace regularizers {
namespace {

using torch::stable::contiguous;

template <typename A>
class DenseProblem : public SinkhornProblem<A> {
 public:
  DenseProblem(StorageType type, const void* cost, int64_t stride, int64_t rows, int64_t columns,
               const A* a, bool parallel)
      : kernel_(kernels().sinkhorn[type]),
        cost_(cost),
        stride_(stride),
        rows_(rows),
        columns_(columns),
        padded_(std::max<int64_t>(1, divide_up(columns, kernel_.lanes)) * kernel_.lanes),
        a_(a),
        parallel_(parallel) {}

  void exact_columns(double epsilon, const double* f, double* g) override {
    std::vector<A> row_shift(rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      row_shift[i] = a_[i] > 0 ? static_cast<A>(f[i] + epsilon * std::log(double{a_[i]}))
                               : -std::numeric_limits<A>::infinity();
    }
    SinkhornSweep sweep{};
    sweep.columns = columns_;
    sweep.padded_columns = padded_;
    sweep.epsilon = epsilon;
    sweep.cost = cost_;
    sweep.cost_stride = stride_;
    const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(32, rows_ / 64));
    std::vector<A> base(blocks * padded_), sum(blocks * padded_);
    const auto range = [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        kernel_.column_pass(sweep, row_shift.data(), rows_ * block / blocks,
                            rows_ * (block + 1) / blocks, base.data() + block * padded_,
                            sum.data() + block * padded_);
      }
    };
    if (parallel_ && blocks > 1) {
      torch::stable::parallel_for(0, blocks, 1, range);
    } else {
      range(0, blocks);
    }
    for (int64_t j = 0; j < columns_; ++j) {
      double top = -std::numeric_limits<double>::infinity(), total = 0.0;
      for (int64_t block = 0; block < blocks; ++block) {
        top = std::max(top, double{base[block * padded_ + j]});
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const double part = sum[block * padded_ + j];
        if (part != 0.0) {  // NaN counts
          total += part * std::exp((double{base[block * padded_ + j]} - top) / epsilon);
        }
      }
      g[j] = -(top + epsilon * std::log(total));
    }
  }

  void log_sweep(const SinkhornSweep& sweep, int64_t begin, int64_t end, A* partial, A* scratch,
                 double* residual) const override {
    SinkhornSweep with_cost = sweep;
    with_cost.cost = cost_;
    with_cost.cost_stride = stride_;
    kernel_.log_sweep(with_cost, begin, end, partial, scratch, residual);
  }

  bool stores_kernel() const override { return true; }
  const SinkhornKernels& kernel() const override { return kernel_; }

 private:
  const SinkhornKernels& kernel_;
  const void* cost_;
  int64_t stride_, rows_, columns_, padded_;
  const A* a_;
  bool parallel_;
};

// The arguments of a batch of problems, checked.
struct Batch {
  Tensor cost, a, b;
  std::vector<double> epsilon;
  std::vector<int64_t> rows, columns;
  StorageType type;

  int64_t size() const { return cost.size(0); }
  int64_t max_rows() const { return cost.size(1); }
  int64_t max_columns() const { return cost.size(2); }
};

std::vector<int64_t> sizes(const std::string& name, const std::optional<Tensor>& given,
                           int64_t batch, int64_t largest) {
  std::vector<int64_t> result(batch, largest);
  if (given.has_value()) {
    const Tensor dense = contiguous(*given);
    const int64_t* data = static_cast<const int64_t*>(dense.const_data_ptr());
    for (int64_t item = 0; item < batch; ++item) {
      result[item] = data[item];
      check(data[item] >= 0 && data[item] <= largest,
            name + " must lie in [0, " + std::to_string(largest) + "], got " +
                std::to_string(data[item]) + " for item " + std::to_string(item));
    }
  }
  return result;
}

template <typename A>
double checked_mass(const std::string& name, const A* weight, int64_t count, int64_t item) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    check(weight[i] >= 0 && weight[i] < std::numeric_limits<A>::infinity(),
          name + " must be finite and not negative, got " + std::to_string(weight[i]) +
              " at position " + std::to_string(i) + " of item " + std::to_string(item));
    total += weight[i];
  }
  return total;
}

template <typename A>
void check_masses(const Batch& batch, bool balanced) {
  for (int64_t item = 0; item < batch.size(); ++item) {
    const double rows = checked_mass(
        "a", static_cast<const A*>(batch.a.const_data_ptr()) + item * batch.max_rows(),
        batch.rows[item], item);
    const double columns = checked_mass(
        "b", static_cast<const A*>(batch.b.const_data_ptr()) + item * batch.max_columns(),
        batch.columns[item], item);
    check(!balanced || std::fabs(rows - columns) <= 1e-4 * std::max(rows, columns),
          "a and b must have equal sums in a balanced problem, got " + std::to_string(rows) +
              " and " + std::to_string(columns) + " for item " + std::to_string(item));
  }
}

Batch read_batch(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                 const std::optional<Tensor>& row_sizes, const std::optional<Tensor>& column_sizes,
                 bool balanced) {
  Batch batch{contiguous(cost), contiguous(a), contiguous(b)};
  batch.type = storage_type(cost);
  batch.rows = sizes("row_sizes", row_sizes, batch.size(), batch.max_rows());
  batch.columns = sizes("column_sizes", column_sizes, batch.size(), batch.max_columns());
  const Tensor dense = contiguous(epsilon);
  const double* values = static_cast<const double*>(dense.const_data_ptr());
  batch.epsilon.assign(values, values + batch.size());
  for (const double value : batch.epsilon) {
    check(value > 0.0 && value < std::numeric_limits<double>::infinity(),
          "epsilon must be positive and finite, got " + std::to_string(value));
  }
  if (batch.type == kDouble) {
    check_masses<double>(batch, balanced);
  } else {
    check_masses<float>(batch, balanced);
  }
  return batch;
}

template <typename A>
std::vector<double> start_of(const std::optional<Tensor>& given, int64_t item, int64_t count) {
  if (!given.has_value()) {
    return {};
  }
  const Tensor dense = contiguous(*given);
  const A* data = static_cast<const A*>(dense.const_data_ptr()) + item * dense.size(1);
  return std::vector<double>(data, data + count);
}

const double* data_or_null(const std::vector<double>& values) {
  return values.empty() ? nullptr : values.data();
}

struct Results {
  Tensor f, g, value, iterations, error, converged;
};

template <typename A>
SinkhornResult solve_item(const Batch& batch, int64_t item, const SinkhornOptions& options,
                          const std::optional<Tensor>& f0, const std::optional<Tensor>& g0,
                          bool parallel, Results& results) {
  const int64_t rows = batch.rows[item], columns = batch.columns[item];
  A* f = static_cast<A*>(results.f.mutable_data_ptr()) + item * batch.max_rows();
  A* g = static_cast<A*>(results.g.mutable_data_ptr()) + item * batch.max_columns();
  std::fill(f, f + batch.max_rows(), A{0});
  std::fill(g, g + batch.max_columns(), A{0});
  if (rows == 0 || columns == 0) {
    SinkhornResult nothing;
    nothing.error = 0.0;
    nothing.converged = true;
    return nothing;
  }
  const A* a = static_cast<const A*>(batch.a.const_data_ptr()) + item * batch.max_rows();
  const A* b = static_cast<const A*>(batch.b.const_data_ptr()) + item * batch.max_columns();
  const char* cost = static_cast<const char*>(batch.cost.const_data_ptr()) +
                     item * batch.max_rows() * batch.max_columns() *
                         static_cast<int64_t>(batch.cost.element_size());
  DenseProblem<A> problem(batch.type, cost, batch.max_columns(), rows, columns, a, parallel);
  SinkhornDriver<A> driver(problem, rows, columns, a, b, batch.epsilon[item], options, parallel);
  const SinkhornResult result =
      driver.solve(data_or_null(start_of<A>(f0, item, rows)),
                   data_or_null(start_of<A>(g0, item, columns)));
  std::copy(driver.f().begin(), driver.f().end(), f);
  std::copy(driver.g().begin(), driver.g().end(), g);
  return result;
}

// Small problems run side by side, one a thread; a large one has all threads to itself.
template <typename A>
std::vector<SinkhornResult> solve_batch(const Batch& batch, const SinkhornOptions& options,
                                        const std::optional<Tensor>& f0,
                                        const std::optional<Tensor>& g0, Results& results) {
  constexpr int64_t kParallelEntries = 1 << 15, kLargeEntries = 1 << 22;
  const int64_t entries = batch.max_rows() * batch.max_columns();
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<SinkhornResult> found(batch.size());
  const bool side_by_side = threads > 1 && batch.size() >= threads && entries <= kLargeEntries &&
                            entries * batch.size() >= kParallelEntries / 4;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      found[item] = solve_item<A>(batch, item, options, f0, g0,
                                  !side_by_side && entries >= kParallelEntries, results);
    }
  };
  if (side_by_side) {
    torch::stable::parallel_for(0, batch.size(), 1, range);
  } else {
    range(0, batch.size());
  }
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
    const std::optional<Tensor>& f0, const std::optional<Tensor>& g0,
    const std::optional<Tensor>& row_sizes, const std::optional<Tensor>& column_sizes, double tol,
    int64_t max_iter, int64_t min_iter, int64_t inner_iter, double eps_init, double eps_decay,
    double momentum, double tau_a, double tau_b, bool linf, bool symmetric) {
  const SinkhornOptions options{tol,      max_iter, min_iter, inner_iter, eps_init, eps_decay,
                                momentum, tau_a,    tau_b,    linf,       symmetric};
  const Batch batch = read_batch(cost, a, b, epsilon, row_sizes, column_sizes,
                                 tau_a == 1.0 && tau_b == 1.0);
  const ScalarType wide = accumulate_type(batch.type);
  const auto allocate = [&](std::vector<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(cost, shape, type);
  };
  Results results{allocate({batch.size(), batch.max_rows()}, wide),
                  allocate({batch.size(), batch.max_columns()}, wide),
                  allocate({batch.size()}, wide),
                  allocate({batch.size()}, ScalarType::Long),
                  allocate({batch.size()}, wide),
                  allocate({batch.size()}, ScalarType::Bool)};
  const std::vector<SinkhornResult> found =
      batch.type == kDouble ? solve_batch<double>(batch, options, f0, g0, results)
                            : solve_batch<float>(batch, options, f0, g0, results);
  for (int64_t item = 0; item < batch.size(); ++item) {
    const SinkhornResult& result = found[item];
    check(!result.invalid, "cost must be finite where both weights are positive, which item " +
                               std::to_string(item) + " is not (NaN, -inf, or a row or column "
                               "without a finite entry)");
    if (batch.type == kDouble) {
      static_cast<double*>(results.value.mutable_data_ptr())[item] = result.value;
      static_cast<double*>(results.error.mutable_data_ptr())[item] = result.error;
    } else {
      static_cast<float*>(results.value.mutable_data_ptr())[item] =
          static_cast<float>(result.value);
      static_cast<float*>(results.error.mutable_data_ptr())[item] =
          static_cast<float>(result.error);
    }
    static_cast<int64_t*>(results.iterations.mutable_data_ptr())[item] = result.iterations;
    static_cast<bool*>(results.converged.mutable_data_ptr())[item] = result.converged;
  }
  return {results.f,          results.g,     results.value,
          results.iterations, results.error, results.converged};
}

// plan_ij = weight a_i b_j exp((f_i + g_j - C_ij) / epsilon), one weight an item.
template <typename A>
void write_plan(const Batch& batch, const Tensor& f, const Tensor& g, const Tensor& weight,
                Tensor& plan) {
  const SinkhornKernels& kernel = kernels().sinkhorn[batch.type];
  const int64_t rows = batch.max_rows(), columns = batch.max_columns();
  const int64_t padded = std::max<int64_t>(1, divide_up(columns, kernel.lanes)) * kernel.lanes;
  const A infinity = std::numeric_limits<A>::infinity();
  std::vector<A> row_shift(rows), shift(padded);
  const int64_t matrix_bytes =
      rows * columns * static_cast<int64_t>(batch.cost.element_size());
  for (int64_t item = 0; item < batch.size(); ++item) {
    const double epsilon = batch.epsilon[item];
    const A* a = static_cast<const A*>(batch.a.const_data_ptr()) + item * rows;
    const A* b = static_cast<const A*>(batch.b.const_data_ptr()) + item * columns;
    const A* row_potential = static_cast<const A*>(f.const_data_ptr()) + item * rows;
    const A* column_potential = static_cast<const A*>(g.const_data_ptr()) + item * columns;
    for (int64_t i = 0; i < rows; ++i) {
      row_shift[i] = i < batch.rows[item] && a[i] > 0
                         ? static_cast<A>(row_potential[i] + epsilon * std::log(double{a[i]}))
                         : -infinity;
    }
    std::fill(shift.begin(), shift.end(), -infinity);
    for (int64_t j = 0; j < batch.columns[item]; ++j) {
      if (b[j] > 0) {
        shift[j] = static_cast<A>(column_potential[j] + epsilon * std::log(double{b[j]}));
      }
    }
    SinkhornSweep sweep{};
    sweep.columns = columns;
    sweep.padded_columns = padded;
    sweep.epsilon = epsilon;
    sweep.shift = shift.data();
    sweep.cost = static_cast<const char*>(batch.cost.const_data_ptr()) + item * matrix_bytes;
    sweep.cost_stride = columns;
    char* to = static_cast<char*>(plan.mutable_data_ptr()) + item * matrix_bytes;
    const double factor = static_cast<double>(static_cast<const A*>(weight.const_data_ptr())[item]);
    torch::stable::parallel_for(
        0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1)),
        [&](int64_t begin, int64_t end) {
          kernel.plan(sweep, row_shift.data(), factor, begin, end, to);
        });
  }
}

Tensor transport_plan(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                      const Tensor& f, const Tensor& g, const Tensor& weight,
                      const std::optional<Tensor>& row_sizes,
                      const std::optional<Tensor>& column_sizes) {
  const Batch batch =
      read_batch(cost, a, b, epsilon, row_sizes, column_sizes, /*balanced=*/false);
  Tensor plan = torch::stable::new_empty(cost, {batch.size(), batch.max_rows(),
                                                batch.max_columns()});
  advise_huge_pages(plan.mutable_data_ptr(),
                    static_cast<size_t>(plan.numel()) * plan.element_size());
  if (batch.type == kDouble) {
    write_plan<double>(batch, contiguous(f), contiguous(g), contiguous(weight), plan);
  } else {
    write_plan<float>(batch, contiguous(f), contiguous(g), contiguous(weight), plan);
  }
  return plan;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  library.impl("transport_plan", TORCH_BOX(&transport_plan));
}

}  // namespace regularizers
