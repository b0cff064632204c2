// row_gate on the CPU: one decision a row, tasks, registration.
#include <algorithm>
#include <optional>
#include <vector>

#include "common.h"
#include "layout.h"

namespace regularizers {
namespace {

constexpr int64_t kTaskElements = 1 << 14;

// c_i, the factor of row i: 0 where it is dropped.
std::vector<double> row_factors(int64_t rows, PhiloxStream source, double p, double scale) {
  const DropRule rule = drop_rule(p);
  std::vector<double> factors(static_cast<size_t>(rows));
  uint32_t words[kWordsPerCall];
  for (int64_t row = 0; row < rows; ++row) {
    if (row % kWordsPerCall == 0) {
      philox_call(source, static_cast<uint64_t>(row / kWordsPerCall), words);
    }
    const bool dropped = rule.drops && words[row % kWordsPerCall] <= rule.last_dropped;
    factors[static_cast<size_t>(row)] = dropped ? 0.0 : scale;
  }
  return factors;
}

Tensor row_gate(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& p,
                const Tensor& seed, int64_t stream, bool scale_by_keep) {
  const double probability_of_drop = scheduled_value("p", p, /*one_allowed=*/true);
  const StorageType type = storage_type(x);
  const Tensor out = empty_dense(x);
  const int64_t elements = x.numel();
  if (elements == 0) {
    return out;
  }
  const Tensor from = in_layout_of(out, x);
  const Tensor onto = residual.has_value() ? in_layout_of(out, *residual) : from;
  const int64_t rows = x.size(0), row_elements = elements / rows;
  const std::vector<double> factors =
      row_factors(rows, {seed_value(seed), static_cast<uint32_t>(stream), 0}, probability_of_drop,
                  scale_by_keep ? keep_scale(probability_of_drop) : 1.0);
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  const char* from_data = static_cast<const char*>(from.const_data_ptr());
  const char* onto_data =
      residual.has_value() ? static_cast<const char*>(onto.const_data_ptr()) : nullptr;
  char* to_data = static_cast<char*>(out.mutable_data_ptr());
  advise_huge_pages(to_data, static_cast<size_t>(elements * bytes));
  const auto kernel = kernels().row_gate[type].gate;
  // Tasks are runs of elements, whatever rows they touch: long rows are cut, short ones gathered.
  torch::stable::parallel_for(
      0, divide_up(elements, kTaskElements), 2, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(end * kTaskElements, elements);
        for (int64_t first = begin * kTaskElements; first < last;) {
          const int64_t row = first / row_elements;
          const int64_t count = std::min((row + 1) * row_elements, last) - first;
          kernel(from_data + first * bytes,
                 onto_data == nullptr ? nullptr : onto_data + first * bytes,
                 to_data + first * bytes, count, factors[static_cast<size_t>(row)]);
          first += count;
        }
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("row_gate", TORCH_BOX(&row_gate));
}

}  // namespace regularizers
