// sinkhorn and transport_plan on the CPU: checks, batches, threads, registration.
#include "sinkhorn_batch.h"

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
        padded_(padded(columns)),
        a_(a),
        parallel_(parallel) {}

  int64_t padded(int64_t columns) const override {
    return std::max<int64_t>(1, divide_up(columns, kernel_.lanes)) * kernel_.lanes;
  }

  void exact_columns(double epsilon, const double* f, double* g) override {
    std::vector<A> row_shift(rows_);
    fill_shift(f, a_, epsilon, rows_, row_shift);
    SinkhornSweep sweep{};
    sweep.columns = columns_;
    sweep.padded_columns = padded_;
    sweep.epsilon = epsilon;
    sweep.cost = cost_;
    sweep.cost_stride = stride_;
    const int64_t blocks = row_blocks(rows_);
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

  int64_t scratch_rows() const override { return kSinkhornStripe; }
  bool stores_kernel() const override { return true; }
  const SinkhornKernels& kernel() const override { return kernel_; }

 private:
  const SinkhornKernels& kernel_;
  const void* cost_;
  int64_t stride_, rows_, columns_, padded_;
  const A* a_;
  bool parallel_;
};

const char* item_costs(const Tensor& cost, int64_t item) {
  return static_cast<const char*>(cost.const_data_ptr()) +
         item * cost.size(1) * cost.size(2) * static_cast<int64_t>(cost.element_size());
}

template <typename A>
SinkhornTensors solve_dense(const SinkhornBatch& batch, const Tensor& cost,
                            const SinkhornOptions& options, const std::optional<Tensor>& f0,
                            const std::optional<Tensor>& g0) {
  return solve_batch<A>(batch, options, f0, g0, "cost", [&](int64_t item, bool parallel) {
    return std::make_unique<DenseProblem<A>>(batch.type, item_costs(cost, item), batch.max_columns,
                                             batch.rows[item], batch.columns[item],
                                             batch.row_masses<A>(item), parallel);
  });
}

SinkhornTensors sinkhorn(const Tensor& cost, const Tensor& a, const Tensor& b,
                         const Tensor& epsilon, const std::optional<Tensor>& f0,
                         const std::optional<Tensor>& g0, const std::optional<Tensor>& row_sizes,
                         const std::optional<Tensor>& column_sizes, double tol, int64_t max_iter,
                         int64_t min_iter, int64_t inner_iter, double eps_init, double eps_decay,
                         double momentum, double tau_a, double tau_b, bool linf, bool symmetric) {
  const SinkhornOptions options{tol,      max_iter, min_iter, inner_iter, eps_init, eps_decay,
                                momentum, tau_a,    tau_b,    linf,       symmetric};
  const SinkhornBatch batch =
      read_batch(storage_type(cost), a, b, epsilon, row_sizes, column_sizes, options.balanced());
  const Tensor dense = contiguous(cost);
  return batch.type == kDouble ? solve_dense<double>(batch, dense, options, f0, g0)
                               : solve_dense<float>(batch, dense, options, f0, g0);
}

// plan_ij = weight a_i b_j exp((f_i + g_j - C_ij) / epsilon), one weight an item.
template <typename A>
void write_plan(const SinkhornBatch& batch, const Tensor& cost, const Tensor& f, const Tensor& g,
                const Tensor& weight, Tensor& plan) {
  const SinkhornKernels& kernel = kernels().sinkhorn[batch.type];
  const int64_t rows = batch.max_rows, columns = batch.max_columns;
  const int64_t padded = std::max<int64_t>(1, divide_up(columns, kernel.lanes)) * kernel.lanes;
  std::vector<A> row_shift(rows), shift(padded);
  for (int64_t item = 0; item < batch.size; ++item) {
    const A* row_potential = static_cast<const A*>(f.const_data_ptr()) + item * rows;
    const A* column_potential = static_cast<const A*>(g.const_data_ptr()) + item * columns;
    fill_shift(row_potential, batch.row_masses<A>(item), batch.epsilon[item], batch.rows[item],
               row_shift);
    fill_shift(column_potential, batch.column_masses<A>(item), batch.epsilon[item],
               batch.columns[item], shift);
    SinkhornSweep sweep{};
    sweep.columns = columns;
    sweep.padded_columns = padded;
    sweep.epsilon = batch.epsilon[item];
    sweep.shift = shift.data();
    sweep.cost = item_costs(cost, item);
    sweep.cost_stride = columns;
    char* to = static_cast<char*>(plan.mutable_data_ptr()) +
               item * rows * columns * static_cast<int64_t>(plan.element_size());
    const double factor = static_cast<double>(static_cast<const A*>(weight.const_data_ptr())[item]);
    torch::stable::parallel_for(0, rows,
                                std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1)),
                                [&](int64_t begin, int64_t end) {
                                  kernel.plan(sweep, row_shift.data(), factor, begin, end, to);
                                });
  }
}

Tensor transport_plan(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                      const Tensor& f, const Tensor& g, const Tensor& weight,
                      const std::optional<Tensor>& row_sizes,
                      const std::optional<Tensor>& column_sizes) {
  const SinkhornBatch batch = read_batch(storage_type(cost), a, b, epsilon, row_sizes, column_sizes,
                                         /*balanced=*/false);
  const Tensor dense = contiguous(cost);
  Tensor plan = torch::stable::new_empty(cost, {batch.size, batch.max_rows, batch.max_columns});
  advise_huge_pages(plan.mutable_data_ptr(),
                    static_cast<size_t>(plan.numel()) * plan.element_size());
  if (batch.type == kDouble) {
    write_plan<double>(batch, dense, contiguous(f), contiguous(g), contiguous(weight), plan);
  } else {
    write_plan<float>(batch, dense, contiguous(f), contiguous(g), contiguous(weight), plan);
  }
  return plan;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  library.impl("transport_plan", TORCH_BOX(&transport_plan));
}

}  // namespace regularizers
