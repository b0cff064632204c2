// Batches of Sinkhorn problems: masses, strengths and sizes read and checked, items scheduled on
// threads, results written.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "sinkhorn_solver.h"

namespace regularizers {

// What the problems of a batch have besides costs or points.
struct SinkhornBatch {
  int64_t size, max_rows, max_columns;
  StorageType type;
  Tensor a, b;  // of the accumulation type, contiguous
  std::vector<double> epsilon;
  std::vector<int64_t> rows, columns;

  template <typename A>
  const A* row_masses(int64_t item) const {
    return static_cast<const A*>(a.const_data_ptr()) + item * max_rows;
  }
  template <typename A>
  const A* column_masses(int64_t item) const {
    return static_cast<const A*>(b.const_data_ptr()) + item * max_columns;
  }
};

inline std::vector<int64_t> read_sizes(const std::string& name, const std::optional<Tensor>& given,
                                       int64_t batch, int64_t largest) {
  std::vector<int64_t> result(batch, largest);
  if (given.has_value()) {
    const Tensor dense = torch::stable::contiguous(*given);
    const int64_t* data = static_cast<const int64_t*>(dense.const_data_ptr());
    for (int64_t item = 0; item < batch; ++item) {
      result[item] = data[item];
      if (data[item] < 0 || data[item] > largest) {
        check(false, name + " must lie in [0, " + std::to_string(largest) + "], got " +
                         std::to_string(data[item]) + " for item " + std::to_string(item));
      }
    }
  }
  return result;
}

template <typename A>
double checked_mass(const std::string& name, const A* weight, int64_t count, int64_t item) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(weight[i] >= 0 && weight[i] < std::numeric_limits<A>::infinity())) {
      check(false, name + " must be finite and not negative, got " + std::to_string(weight[i]) +
                       " at position " + std::to_string(i) + " of item " + std::to_string(item));
    }
    total += weight[i];
  }
  return total;
}

template <typename A>
void check_masses(const SinkhornBatch& batch, bool balanced) {
  for (int64_t item = 0; item < batch.size; ++item) {
    const double rows = checked_mass("a", batch.row_masses<A>(item), batch.rows[item], item);
    const double columns =
        checked_mass("b", batch.column_masses<A>(item), batch.columns[item], item);
    if (balanced && !(std::fabs(rows - columns) <= 1e-4 * std::max(rows, columns))) {
      check(false, "a and b must have equal sums in a balanced problem, got " +
                       std::to_string(rows) + " and " + std::to_string(columns) + " for item " +
                       std::to_string(item));
    }
  }
}

// Empty problems (no rows or no columns) have no mass to balance.
inline SinkhornBatch read_batch(StorageType type, const Tensor& a, const Tensor& b,
                                const Tensor& epsilon, const std::optional<Tensor>& row_sizes,
                                const std::optional<Tensor>& column_sizes, bool balanced) {
  using torch::stable::contiguous;
  SinkhornBatch batch{a.size(0), a.size(1), b.size(1), type, contiguous(a), contiguous(b)};
  batch.rows = read_sizes("row_sizes", row_sizes, batch.size, batch.max_rows);
  batch.columns = read_sizes("column_sizes", column_sizes, batch.size, batch.max_columns);
  const Tensor dense = contiguous(epsilon);
  const double* values = static_cast<const double*>(dense.const_data_ptr());
  batch.epsilon.assign(values, values + batch.size);
  for (const double value : batch.epsilon) {
    if (!(value > 0.0 && value < std::numeric_limits<double>::infinity())) {
      check(false, "epsilon must be positive and finite, got " + std::to_string(value));
    }
  }
  balanced = balanced && batch.max_rows > 0 && batch.max_columns > 0;
  if (type == kDouble) {
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
  const Tensor dense = torch::stable::contiguous(*given);
  const A* data = static_cast<const A*>(dense.const_data_ptr()) + item * dense.size(1);
  return std::vector<double>(data, data + count);
}

// Calls body(item, whether it may use all threads): small problems run side by side, one a thread;
// a large one has all threads to itself.
template <typename Body>
void for_items(int64_t batch, int64_t entries, const Body& body) {
  constexpr int64_t kParallelEntries = 1 << 15, kLargeEntries = 1 << 22;
  const int64_t threads = torch::stable::get_num_threads();
  const bool side_by_side = threads > 1 && batch >= threads && entries <= kLargeEntries &&
                            entries * batch >= kParallelEntries / 4;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      body(item, !side_by_side && entries >= kParallelEntries);
    }
  };
  if (side_by_side) {
    torch::stable::parallel_for(0, batch, 1, range);
  } else {
    range(0, batch);
  }
}

using SinkhornTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// make_problem(item, parallel) gives the SinkhornProblem<A> of an item.
template <typename A, typename MakeProblem>
SinkhornTensors solve_batch(const SinkhornBatch& batch, const SinkhornOptions& options,
                            const std::optional<Tensor>& f0, const std::optional<Tensor>& g0,
                            const std::string& costs, const MakeProblem& make_problem) {
  const ScalarType wide = accumulate_type(batch.type);
  const auto allocate = [&](std::vector<int64_t> shape, ScalarType type) {
    return torch::stable::new_zeros(batch.a, shape, type);
  };
  Tensor f = allocate({batch.size, batch.max_rows}, wide);
  Tensor g = allocate({batch.size, batch.max_columns}, wide);
  Tensor value = allocate({batch.size}, wide), error = allocate({batch.size}, wide);
  Tensor iterations = allocate({batch.size}, ScalarType::Long);
  Tensor converged = allocate({batch.size}, ScalarType::Bool);
  std::vector<SinkhornResult> found(batch.size);
  for_items(batch.size, batch.max_rows * batch.max_columns, [&](int64_t item, bool parallel) {
    const int64_t rows = batch.rows[item], columns = batch.columns[item];
    if (rows == 0 || columns == 0) {
      found[item].error = 0.0;
      found[item].converged = true;
      return;
    }
    const auto problem = make_problem(item, parallel);
    SinkhornDriver<A> driver(*problem, rows, columns, batch.row_masses<A>(item),
                             batch.column_masses<A>(item), batch.epsilon[item], options, parallel);
    const std::vector<double> f_start = start_of<A>(f0, item, rows);
    const std::vector<double> g_start = start_of<A>(g0, item, columns);
    found[item] = driver.solve(f_start.empty() ? nullptr : f_start.data(),
                               g_start.empty() ? nullptr : g_start.data());
    std::copy(driver.f().begin(), driver.f().end(),
              static_cast<A*>(f.mutable_data_ptr()) + item * batch.max_rows);
    std::copy(driver.g().begin(), driver.g().end(),
              static_cast<A*>(g.mutable_data_ptr()) + item * batch.max_columns);
  });
  for (int64_t item = 0; item < batch.size; ++item) {
    if (found[item].invalid) {
      check(false, costs + " must be finite where both weights are positive, which item " +
                       std::to_string(item) +
                       " is not (NaN, -inf, or a row or column without a finite entry)");
    }
    static_cast<A*>(value.mutable_data_ptr())[item] = static_cast<A>(found[item].value);
    static_cast<A*>(error.mutable_data_ptr())[item] = static_cast<A>(found[item].error);
    static_cast<int64_t*>(iterations.mutable_data_ptr())[item] = found[item].iterations;
    static_cast<bool*>(converged.mutable_data_ptr())[item] = found[item].converged;
  }
  return {f, g, value, iterations, error, converged};
}

}  // namespace regularizers
