// Sliced statistics on the CPU: packing, scratch, threads, registration. The arithmetic is in
// sketch_kernels.h.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

using Shape = std::vector<int64_t>;
using torch::stable::contiguous;
using torch::stable::to;

// z [views, rows, features] and slices [groups, features, slices] in the accumulation type, and the
// slices packed for both products.
struct Inputs {
  Tensor z, slices, by_slice, by_feature;
  StorageType type;  // kFloat or kDouble

  const SketchKernels& kernel() const { return kernels().sketch[type]; }
  int64_t views() const { return z.size(0); }
  int64_t slice_panels() const { return divide_up(slices.size(2), kernel().panel_width); }
  Tensor empty(const Shape& shape) const {
    return torch::stable::new_empty(z, shape, z.scalar_type());
  }
};

// How a call is shared out: every view's panels of slices in `splits` parts, the parts among
// `workers` threads. Workers that share views have a gradient of their own, added up at the end.
struct Plan {
  int64_t splits, workers;

  explicit Plan(const Inputs& inputs) {
    constexpr int64_t kSerialWork = 1 << 18;      // below about 10 us, waking a thread costs more
    constexpr int64_t kProductsOfStatistic = 64;  // what it costs beside the matrix products
    const int64_t work = inputs.z.numel() / std::max<int64_t>(1, inputs.z.size(2)) *
                         inputs.slices.size(2) * (inputs.z.size(2) + kProductsOfStatistic);
    const int64_t threads = work < kSerialWork ? 1 : torch::stable::get_num_threads();
    const int64_t views = inputs.views();
    splits = std::min(inputs.slice_panels(), views >= 4 * threads ? 1 : threads);
    workers = std::min(threads, views * splits);
  }
};

const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }

char* at(const Tensor& tensor, int64_t index) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         index * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
}

Inputs read_inputs(const Tensor& z, const Tensor& slices) {
  const StorageType stored = storage_type(z);
  const ScalarType wide = accumulate_type(stored);
  Inputs inputs{contiguous(to(z, wide)), contiguous(to(slices, wide))};
  inputs.type = stored == kDouble ? kDouble : kFloat;
  const int64_t groups = slices.size(0), features = slices.size(1), count = slices.size(2);
  const int64_t width = inputs.kernel().panel_width;
  inputs.by_slice = inputs.empty({groups, inputs.slice_panels(), features, width});
  inputs.by_feature = inputs.empty({groups, divide_up(features, width), count, width});
  const int64_t by_feature_panels = inputs.by_feature.size(1);
  torch::stable::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const void* matrix = at(inputs.slices, group);
      inputs.kernel().pack_columns(matrix, features, count, 0, inputs.slice_panels(),
                                   at(inputs.by_slice, group));
      inputs.kernel().pack_rows(matrix, features, count, 0, by_feature_panels,
                                at(inputs.by_feature, group));
    }
  });
  return inputs;
}

Sketch describe(const Inputs& inputs) {
  Sketch sketch{};
  sketch.views_per_group = inputs.views() / inputs.slices.size(0);
  sketch.rows = inputs.z.size(1);
  sketch.features = inputs.z.size(2);
  sketch.slices = inputs.slices.size(2);
  sketch.z = data(inputs.z);
  sketch.slices_by_slice = data(inputs.by_slice);
  sketch.slices_by_feature = data(inputs.by_feature);
  // The gradient of a block should stay in the second-level cache; short blocks make the product
  // with A^T read and write dz more often.
  constexpr int64_t kBlockBytes = 1 << 18;
  const int64_t panel_bytes = std::max<int64_t>(1, sketch.rows) * inputs.kernel().panel_width *
                              static_cast<int64_t>(inputs.z.element_size());
  sketch.block_panels = std::clamp<int64_t>(kBlockBytes / panel_bytes, 1, 8);
  return sketch;
}

struct Result {
  double loss;
  Tensor grad_z;  // like z, empty where it is not wanted
};

// Runs kernel(problem, view, first panel, last panel) over everything; returns the sum of what it
// returns.
template <typename Problem, typename Kernel>
Result run(const Inputs& inputs, const Problem& problem, int64_t scratch_elements,
           bool wants_gradient, const Kernel& kernel) {
  const Plan plan(inputs);
  const int64_t views = inputs.views(), tasks = views * plan.splits;
  const Tensor scratch = inputs.empty({plan.workers, scratch_elements});
  const int64_t gradients = !wants_gradient ? 0 : plan.splits == 1 ? 1 : plan.workers;
  const Tensor grad_z =
      torch::stable::new_zeros(inputs.z, {gradients, views, inputs.z.size(1), inputs.z.size(2)});
  std::vector<double> losses(plan.workers, 0.0);
  torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      Problem own = problem;
      own.sketch.scratch = at(scratch, worker);
      own.sketch.grad_z = wants_gradient ? at(grad_z, plan.splits == 1 ? 0 : worker) : nullptr;
      const int64_t end = (worker + 1) * tasks / plan.workers;
      for (int64_t task = worker * tasks / plan.workers; task < end; ++task) {
        const int64_t split = task % plan.splits, panels = inputs.slice_panels();
        losses[worker] += kernel(own, task / plan.splits, split * panels / plan.splits,
                                 (split + 1) * panels / plan.splits);
      }
    }
  });
  double loss = 0.0;
  for (const double part : losses) {
    loss += part;
  }
  if (gradients <= 1) {
    return {loss, wants_gradient ? torch::stable::select(grad_z, 0, 0) : inputs.empty({0})};
  }
  const int64_t dimension = 0;
  return {loss,
          torch::stable::sum(grad_z, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1))};
}

Tensor scalar(double value, const Inputs& inputs) {
  const Tensor out = torch::stable::new_empty(inputs.z, {}, ScalarType::Double);
  *static_cast<double*>(out.mutable_data_ptr()) = value;
  return to(out, inputs.z.scalar_type());
}

Characteristic describe_characteristic(const Inputs& inputs, double spacing, int64_t knots) {
  Characteristic problem{};
  problem.sketch = describe(inputs);
  problem.knots = knots;
  problem.spacing = spacing;
  problem.views = inputs.views();
  return problem;
}

Result run_characteristic(const Inputs& inputs, const Characteristic& problem,
                          bool wants_gradient) {
  return run(inputs, problem, inputs.kernel().characteristic_scratch(problem), wants_gradient,
             inputs.kernel().characteristic);
}

std::tuple<Tensor, Tensor> sliced_epps_pulley(const Tensor& z, const Tensor& slices, double spacing,
                                              int64_t knots, bool wants_gradient) {
  const Inputs inputs = read_inputs(z, slices);
  std::vector<double> target(knots), weight(knots);
  for (int64_t l = 0; l < knots; ++l) {
    const double t = spacing * static_cast<double>(l + 1);
    target[l] = std::exp(-t * t / 2.0);
    weight[l] = (l + 1 == knots ? 1.0 : 2.0) * spacing * target[l];
  }
  Characteristic problem = describe_characteristic(inputs, spacing, knots);
  problem.knot_target = target.data();
  problem.knot_weight = weight.data();
  problem.scale = 1.0 / static_cast<double>(inputs.views() * slices.size(2));
  const Result result = run_characteristic(inputs, problem, wants_gradient);
  return {scalar(result.loss, inputs), result.grad_z};
}

Tensor sliced_characteristic(const Tensor& z, const Tensor& slices, double spacing, int64_t knots) {
  const Inputs inputs = read_inputs(z, slices);
  const Tensor sums = inputs.empty({2, inputs.views(), knots, slices.size(2)});
  Characteristic problem = describe_characteristic(inputs, spacing, knots);
  problem.sums = sums.mutable_data_ptr();
  run_characteristic(inputs, problem, /*wants_gradient=*/false);
  return sums;
}

Tensor sliced_characteristic_backward(const Tensor& grad_sums, const Tensor& z,
                                      const Tensor& slices, double spacing, int64_t knots) {
  const Inputs inputs = read_inputs(z, slices);
  const Tensor upstream = contiguous(to(grad_sums, inputs.z.scalar_type()));
  Characteristic problem = describe_characteristic(inputs, spacing, knots);
  problem.grad_sums = data(upstream);
  return to(run_characteristic(inputs, problem, /*wants_gradient=*/true).grad_z, z.scalar_type());
}

std::tuple<Tensor, Tensor> sliced_quantile(const Tensor& z, const Tensor& slices,
                                           const Tensor& quantiles, bool wants_gradient) {
  const Inputs inputs = read_inputs(z, slices);
  const SketchKernels& kernel = inputs.kernel();
  const Tensor targets = contiguous(to(quantiles, inputs.z.scalar_type()));
  Quantile problem{};
  problem.sketch = describe(inputs);
  problem.scale = 1.0 / static_cast<double>(inputs.views() * inputs.z.size(1) * slices.size(2));
  problem.quantiles = data(targets);
  const Result result =
      run(inputs, problem, kernel.quantile_scratch(problem), wants_gradient, kernel.quantile);
  return {scalar(result.loss, inputs), result.grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("sliced_epps_pulley", TORCH_BOX(&sliced_epps_pulley));
  library.impl("sliced_characteristic", TORCH_BOX(&sliced_characteristic));
  library.impl("sliced_characteristic_backward", TORCH_BOX(&sliced_characteristic_backward));
  library.impl("sliced_quantile", TORCH_BOX(&sliced_quantile));
}

}  // namespace regularizers
