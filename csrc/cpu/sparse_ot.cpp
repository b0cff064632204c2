// Sparse projections and the duals of regularized transport on the CPU: tensors, threads,
// registration. The arithmetic is in sparse_ot_kernels.h.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

using Shape = std::vector<int64_t>;

// The scratch of one task: a row of scores, of survivors and of their places.
class Scratch {
 public:
  Scratch(int64_t size, int64_t padding, StorageType type)
      : row_bytes_(static_cast<size_t>(divide_up(size, padding) * padding) *
                   static_cast<size_t>(accumulate_bytes(type))),
        bytes_(2 * row_bytes_ + row_bytes_ / 4),
        index_(static_cast<size_t>(size)) {}

  SparseOtScratch get() {
    return {bytes_.data(), bytes_.data() + row_bytes_, bytes_.data() + 2 * row_bytes_,
            index_.data()};
  }

 private:
  size_t row_bytes_;
  std::vector<char> bytes_;
  std::vector<int32_t> index_;
};

const void* at(const void* data, int64_t elements, int64_t bytes) {
  return static_cast<const char*>(data) + elements * bytes;
}
void* at(void* data, int64_t elements, int64_t bytes) {
  return static_cast<char*>(data) + elements * bytes;
}

double element(const void* data, int64_t i, StorageType type) {
  return type == kDouble ? static_cast<const double*>(data)[i]
                         : static_cast<double>(static_cast<const float*>(data)[i]);
}

double product(const void* left, const void* right, int64_t begin, int64_t end, StorageType type) {
  double total = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    total += element(left, i, type) * element(right, i, type);
  }
  return total;
}

double checked_gamma(const Tensor& gamma) {
  const double value = *static_cast<const double*>(gamma.const_data_ptr());
  check(value > 0.0 && std::isfinite(value),
        "gamma must be positive and finite, got " + std::to_string(value));
  return value;
}

// A batch of transport problems, contiguous, and how its columns are cut into tasks: by sizes
// alone, so that sums are added up in one order whatever the number of threads.
struct Batch {
  Tensor alpha, cost, b;
  std::optional<Tensor> beta;
  int64_t items, columns, rows, k, regularizer;
  double gamma;
  StorageType type;
  int64_t task_columns, tasks;  // tasks of one item

  Batch(const Tensor& alpha_, const std::optional<Tensor>& beta_, const Tensor& cost_,
        const Tensor& b_, const Tensor& gamma_, int64_t k_, int64_t regularizer_)
      : alpha(torch::stable::contiguous(alpha_)),
        cost(torch::stable::contiguous(cost_)),
        b(torch::stable::contiguous(b_)),
        items(cost_.size(0)),
        columns(cost_.size(1)),
        rows(cost_.size(2)),
        k(std::min(k_, cost_.size(2))),
        regularizer(regularizer_),
        gamma(checked_gamma(gamma_)),
        type(storage_type(cost_)) {
    if (beta_.has_value()) {
      beta = torch::stable::contiguous(*beta_);
    }
    constexpr int64_t kTaskElements = 1 << 15, kMostTasks = 32;
    const int64_t wanted = std::min(kMostTasks, divide_up(columns * rows, kTaskElements));
    task_columns = std::max<int64_t>(1, divide_up(columns, std::max<int64_t>(1, wanted)));
    tasks = divide_up(columns, task_columns);
  }

  const SparseOtKernels& kernel() const { return kernels().sparse_ot[type]; }
  int64_t wide() const { return accumulate_bytes(type); }

  TransportProblem item(int64_t index) const {
    const auto row = [&](const Tensor& tensor, int64_t size, int64_t bytes) {
      return at(tensor.const_data_ptr(), index * size, bytes);
    };
    return {rows,
            columns,
            row(cost, columns * rows, static_cast<int64_t>(cost.element_size())),
            row(alpha, rows, wide()),
            beta.has_value() ? row(*beta, columns, wide()) : nullptr,
            row(b, columns, wide()),
            gamma,
            k,
            regularizer};
  }

  // Calls body(item, task, first column, last column, scratch) for every task, on all threads.
  template <typename Body>
  void run(const Body& body) const {
    constexpr int64_t kSerialElements = 1 << 16;  // some 10 us: waking a thread costs as much
    const int64_t all = items * tasks;
    const int64_t grain = items * columns * rows < kSerialElements ? all : 1;
    torch::stable::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch(rows, kernel().padding, type);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t task = index % tasks;
        body(index / tasks, task, task * task_columns, std::min((task + 1) * task_columns, columns),
             scratch.get());
      }
    });
  }
};

template <typename A>
void subtract_parts(const A* total, const A* parts, int64_t count, int64_t size, A* out) {
  std::copy(total, total + size, out);
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < size; ++i) {
      out[i] -= parts[part * size + i];
    }
  }
}

template <typename A>
void finish_item(const Batch& batch, int64_t item, const void* a, const void* parts,
                 void* grad_alpha, void* grad_beta) {
  const int64_t rows = batch.rows, columns = batch.columns;
  subtract_parts(static_cast<const A*>(a) + item * rows,
                 static_cast<const A*>(parts) + item * batch.tasks * rows, batch.tasks, rows,
                 static_cast<A*>(grad_alpha) + item * rows);
  if (batch.beta.has_value()) {
    const A* b = static_cast<const A*>(batch.b.const_data_ptr()) + item * columns;
    A* slopes = static_cast<A*>(grad_beta) + item * columns;
    for (int64_t j = 0; j < columns; ++j) {
      slopes[j] = b[j] - slopes[j];
    }
  }
}

// value [B] in float64, its gradient in alpha [B, m], and that in beta or, of the semi-dual, in b.
std::tuple<Tensor, Tensor, Tensor> transport_dual(const Tensor& alpha,
                                                  const std::optional<Tensor>& beta,
                                                  const Tensor& cost, const Tensor& a,
                                                  const Tensor& b, const Tensor& gamma, int64_t k,
                                                  int64_t regularizer, bool) {
  const Batch batch(alpha, beta, cost, b, gamma, k, regularizer);
  const Tensor row_mass = torch::stable::contiguous(a);
  const ScalarType wide = accumulate_type(batch.type);
  const Tensor value = torch::stable::new_empty(cost, {batch.items}, ScalarType::Double);
  const Tensor grad_alpha = torch::stable::new_empty(cost, {batch.items, batch.rows}, wide);
  const Tensor grad_beta = torch::stable::new_empty(cost, {batch.items, batch.columns}, wide);
  const Tensor parts = torch::stable::new_empty(cost, {batch.items, batch.tasks, batch.rows}, wide);
  std::vector<double> conjugates(static_cast<size_t>(batch.items * batch.tasks));
  void* sums = parts.mutable_data_ptr();
  void* slopes = grad_beta.mutable_data_ptr();
  batch.run(
      [&](int64_t item, int64_t task, int64_t begin, int64_t end, const SparseOtScratch& scratch) {
        const int64_t part = item * batch.tasks + task;
        void* row_sums = at(sums, part * batch.rows, batch.wide());
        std::fill_n(static_cast<char*>(row_sums), batch.rows * batch.wide(), char{0});
        conjugates[static_cast<size_t>(part)] =
            batch.kernel().dual(batch.item(item), scratch, begin, end, row_sums,
                                at(slopes, item * batch.columns, batch.wide()));
      });
  double* values = static_cast<double*>(value.mutable_data_ptr());
  const auto finish = batch.type == kDouble ? finish_item<double> : finish_item<float>;
  for (int64_t item = 0; item < batch.items; ++item) {
    double total = product(batch.alpha.const_data_ptr(), row_mass.const_data_ptr(),
                           item * batch.rows, (item + 1) * batch.rows, batch.type);
    if (batch.beta.has_value()) {
      total += product(batch.beta->const_data_ptr(), batch.b.const_data_ptr(), item * batch.columns,
                       (item + 1) * batch.columns, batch.type);
    }
    for (int64_t task = 0; task < batch.tasks; ++task) {
      total -= conjugates[static_cast<size_t>(item * batch.tasks + task)];
    }
    values[item] = total;
    finish(batch, item, row_mass.const_data_ptr(), sums, grad_alpha.mutable_data_ptr(), slopes);
  }
  return {value, grad_alpha, grad_beta};
}

Tensor regularized_plan(const Tensor& alpha, const std::optional<Tensor>& beta, const Tensor& cost,
                        const Tensor& b, const Tensor& gamma, int64_t k, int64_t regularizer) {
  const Batch batch(alpha, beta, cost, b, gamma, k, regularizer);
  const Tensor plan =
      torch::stable::new_empty(cost, {batch.items, batch.columns, batch.rows}, cost.scalar_type());
  void* data = plan.mutable_data_ptr();
  const int64_t bytes = static_cast<int64_t>(plan.element_size());
  advise_huge_pages(data, static_cast<size_t>(plan.numel() * bytes));
  batch.run([&](int64_t item, int64_t, int64_t begin, int64_t end, const SparseOtScratch& scratch) {
    batch.kernel().plan(batch.item(item), scratch, begin, end,
                        at(data, item * batch.columns * batch.rows, bytes));
  });
  return plan;
}

std::tuple<Tensor, Tensor> transport_sparse_plan(const Tensor& alpha,
                                                 const std::optional<Tensor>& beta,
                                                 const Tensor& cost, const Tensor& b,
                                                 const Tensor& gamma, int64_t k) {
  const Batch batch(alpha, beta, cost, b, gamma, k, kQuadratic);
  const Shape shape{batch.items, batch.columns, batch.k};
  const Tensor values = torch::stable::new_empty(cost, shape, cost.scalar_type());
  const Tensor indices = torch::stable::new_empty(cost, shape, ScalarType::Long);
  const int64_t bytes = static_cast<int64_t>(values.element_size());
  void* data = values.mutable_data_ptr();
  int64_t* places = static_cast<int64_t*>(indices.mutable_data_ptr());
  batch.run([&](int64_t item, int64_t, int64_t begin, int64_t end, const SparseOtScratch& scratch) {
    const int64_t first = item * batch.columns * batch.k;
    batch.kernel().sparse_plan(batch.item(item), scratch, begin, end, at(data, first, bytes),
                               places + first);
  });
  return {values, indices};
}

// Rows of a task: enough elements to hide the hand-over.
int64_t row_grain(int64_t size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size)); }

void check_sums(const Tensor& z) {
  const Tensor wide = torch::stable::to(z, ScalarType::Double);
  const double* values = static_cast<const double*>(wide.const_data_ptr());
  for (int64_t row = 0; row < z.numel(); ++row) {
    check(values[row] >= 0.0, "z must be at least 0, got " + std::to_string(values[row]));
  }
}

Tensor sparse_projection(const Tensor& v, const std::optional<Tensor>& z, int64_t k) {
  const Tensor from = torch::stable::contiguous(v);
  const Tensor out =
      torch::stable::new_empty(from, Shape(v.sizes().begin(), v.sizes().end()), v.scalar_type());
  const int64_t size = v.size(v.dim() - 1);
  if (v.numel() == 0) {
    return out;
  }
  const StorageType type = storage_type(v);
  const SparseOtKernels& kernel = kernels().sparse_ot[type];
  const std::optional<Tensor> sums =
      z.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*z)) : std::nullopt;
  if (sums.has_value()) {
    check_sums(*sums);
  }
  const SparseProjection problem{size, std::min(k, size), from.const_data_ptr(),
                                 sums.has_value() ? sums->const_data_ptr() : nullptr,
                                 out.mutable_data_ptr()};
  torch::stable::parallel_for(0, v.numel() / size, row_grain(size),
                              [&](int64_t begin, int64_t end) {
                                Scratch scratch(size, kernel.padding, type);
                                kernel.project(problem, scratch.get(), begin, end);
                              });
  return out;
}

std::tuple<Tensor, Tensor> sparse_projection_backward(const Tensor& grad, const Tensor& out,
                                                      bool simplex) {
  const Tensor cotangent = torch::stable::contiguous(grad), on = torch::stable::contiguous(out);
  Shape shape(out.sizes().begin(), out.sizes().end());
  const Tensor grad_v = torch::stable::new_empty(on, shape, out.scalar_type());
  shape.pop_back();
  const Tensor grad_z = torch::stable::new_empty(on, simplex ? shape : Shape{0}, out.scalar_type());
  const int64_t size = out.size(out.dim() - 1);
  if (out.numel() == 0) {
    return {grad_v, simplex ? torch::stable::fill_(grad_z, 0.0) : grad_z};
  }
  const SparseProjectionBackward problem{size, cotangent.const_data_ptr(), on.const_data_ptr(),
                                         grad_v.mutable_data_ptr(),
                                         simplex ? grad_z.mutable_data_ptr() : nullptr};
  const auto kernel = kernels().sparse_ot[storage_type(out)].project_backward;
  torch::stable::parallel_for(0, out.numel() / size, row_grain(size),
                              [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  return {grad_v, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("transport_dual", TORCH_BOX(&transport_dual));
  library.impl("regularized_plan", TORCH_BOX(&regularized_plan));
  library.impl("transport_sparse_plan", TORCH_BOX(&transport_sparse_plan));
  library.impl("sparse_projection", TORCH_BOX(&sparse_projection));
  library.impl("sparse_projection_backward", TORCH_BOX(&sparse_projection_backward));
}

}  // namespace regularizers
