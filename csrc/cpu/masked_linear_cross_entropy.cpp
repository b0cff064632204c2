// multi_sample_dropout_cross_entropy on the CPU: checks, scratch, chunks, threads, registration.
// The arithmetic is in masked_linear_cross_entropy_kernels.h.
#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
// Bits of `gradients`: which of grad_x, grad_weight and grad_bias are wanted.
enum Gradients : int64_t { kGradX = 1, kGradWeight = 2, kGradBias = 4 };

using Shape = std::vector<int64_t>;

// The arguments that forward and backward share, made contiguous, widened where small, and checked.
struct Inputs {
  Tensor x, weight, target;
  std::optional<Tensor> bias, class_weight;  // of the accumulation type, padded to whole panels
  double p, label_smoothing;
  uint64_t seed;
  int64_t num_samples, ignore_index, padded_classes;
  std::vector<double> class_weights;
  StorageType type;

  int64_t rows() const { return x.size(0); }
  int64_t features() const { return x.size(1); }
  int64_t classes() const { return weight.size(0); }
  const int64_t* targets() const { return static_cast<const int64_t*>(target.const_data_ptr()); }
  const MaskedLinearCrossEntropyKernels& kernel() const {
    return kernels().masked_linear_cross_entropy[type];
  }
};

std::optional<Tensor> padded(const std::optional<Tensor>& values, int64_t size, StorageType type) {
  if (!values.has_value()) {
    return std::nullopt;
  }
  Tensor out = torch::stable::new_zeros(*values, {size}, accumulate_type(type));
  Tensor head = torch::stable::narrow(out, 0, 0, values->size(0));
  torch::stable::copy_(head, *values);
  return out;
}

std::vector<double> as_doubles(const std::optional<Tensor>& values, int64_t size,
                               StorageType type) {
  std::vector<double> result(size, 1.0);
  for (int64_t c = 0; values.has_value() && c < size; ++c) {
    result[c] = type == kDouble ? static_cast<const double*>(values->const_data_ptr())[c]
                                : static_cast<const float*>(values->const_data_ptr())[c];
  }
  return result;
}

Inputs read_inputs(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& target, const std::optional<Tensor>& class_weight, const Tensor& p,
                   const Tensor& label_smoothing, const Tensor& seed, int64_t num_samples,
                   int64_t ignore_index) {
  using torch::stable::contiguous;
  Inputs inputs{contiguous(x), contiguous(weight), contiguous(target)};
  inputs.type = storage_type(x);
  inputs.p = scheduled_value("p", p, /*one_allowed=*/false);
  inputs.label_smoothing =
      scheduled_value("label_smoothing", label_smoothing, /*one_allowed=*/false);
  inputs.seed = seed_value(seed);
  inputs.num_samples = num_samples;
  inputs.ignore_index = ignore_index;
  const int64_t classes = inputs.classes();
  for (int64_t i = 0; i < inputs.rows(); ++i) {
    const int64_t index = inputs.targets()[i];
    check(index == ignore_index || (index >= 0 && index < classes),
          "target must lie in [0, " + std::to_string(classes) + ") or equal ignore_index " +
              std::to_string(ignore_index) + ", got " + std::to_string(index) + " in row " +
              std::to_string(i));
  }
  const int64_t width = inputs.kernel().panel_width;
  inputs.padded_classes = divide_up(classes, width) * width;
  if (inputs.padded_classes % 512 == 0) {
    inputs.padded_classes +=
        width;  // a stride of whole pages would put a column of the logits into one cache set
  }
  inputs.bias = padded(bias, inputs.padded_classes, inputs.type);
  inputs.class_weight = padded(class_weight, inputs.padded_classes, inputs.type);
  inputs.class_weights = as_doubles(inputs.class_weight, classes, inputs.type);
  return inputs;
}

// Sum of the class weights of the rows that count: the denominator of the mean.
double total_weight(const Inputs& inputs) {
  double total = 0.0;
  for (int64_t i = 0; i < inputs.rows(); ++i) {
    const int64_t index = inputs.targets()[i];
    total += index == inputs.ignore_index ? 0.0 : inputs.class_weights[index];
  }
  return total;
}

// How the rows are worked off. A group of threads walks over its rows in chunks that it shares:
// rows in parallel, then the weight gradient in parallel over features. A weight whose gradient
// fits the second-level cache gets one group a thread, each with a gradient of its own to be added
// up at the end: no waiting, and the operand never changes core.
struct Plan {
  int64_t threads, groups, group_rows, chunk_rows, chunk_samples;

  Plan(const MaskedLinearCrossEntropy& problem, int64_t element_bytes) {
    constexpr int64_t kPrivateGradientBytes = 1 << 18;
    constexpr int64_t kSerialProducts = 1 << 18;  // below about 10 us, waking a thread costs more
    const int64_t products =
        problem.rows * problem.num_samples * problem.features * problem.classes;
    threads = products < kSerialProducts ? 1 : torch::stable::get_num_threads();
    const bool is_private =
        problem.classes * problem.features * element_bytes <= kPrivateGradientBytes;
    groups = is_private ? std::max<int64_t>(1, std::min(threads, problem.rows)) : 1;
    group_rows = std::max<int64_t>(1, divide_up(problem.rows, groups));
    // Effective rows (row, sample) that a thread holds at a time. Few classes: the operand should
    // stay in the second-level cache. Many: the shared gradient of the weight is read and written
    // once a chunk, so chunks are long.
    const int64_t thread_rows = is_private ? 64 : 256;
    chunk_samples = std::min(problem.num_samples, thread_rows);
    chunk_rows = std::max<int64_t>(1, thread_rows / chunk_samples) * (is_private ? 1 : threads);
    chunk_rows = std::min(chunk_rows, group_rows);
  }

  // Calls body(begin, end) on ranges of [0, count), on the plan's threads.
  template <typename Body>
  void parallel(int64_t count, int64_t grain, const Body& body) const {
    torch::stable::parallel_for(0, count, threads == 1 ? count : grain, body);
  }
};

// Everything a call allocates besides its results, a slice for each group.
struct Scratch {
  Tensor weight_by_class, weight_by_feature, operand, keep, logits, widened_x;

  Scratch(const Inputs& inputs, const MaskedLinearCrossEntropy& problem, const Plan& plan,
          bool wants_x) {
    const ScalarType wide = accumulate_type(inputs.type);
    const bool narrow = wide != inputs.x.scalar_type();
    const int64_t width = inputs.kernel().panel_width,
                  capacity = plan.chunk_rows * plan.chunk_samples;
    const int64_t class_panels = divide_up(problem.classes, width);
    const int64_t feature_panels = divide_up(problem.features, width);
    const auto allocate = [&](bool wanted, const Shape& shape, ScalarType dtype) {
      return torch::stable::new_empty(inputs.x, wanted ? shape : Shape{0, 0}, dtype);
    };
    weight_by_class = allocate(true, {class_panels, problem.features, width}, wide);
    weight_by_feature = allocate(wants_x, {feature_panels, problem.classes, width}, wide);
    operand = allocate(true, {plan.groups, feature_panels, capacity, width}, wide);
    keep = allocate(true, {plan.groups, feature_panels, capacity, width}, ScalarType::Byte);
    logits = allocate(true, {plan.groups, capacity, problem.padded_classes}, wide);
    widened_x = allocate(narrow, {plan.groups, plan.chunk_rows, problem.features}, wide);
  }
};

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// Sum over the groups, the first dimension.
Tensor total(const Tensor& groups) {
  const int64_t dimension = 0;
  return groups.size(0) == 1
             ? torch::stable::select(groups, 0, 0)
             : torch::stable::sum(groups, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1));
}

void* slice(const Tensor& tensor, int64_t group) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         group * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
}

// Rows [begin, end) of one group, chunk after chunk. Inside a parallel region the inner loops run
// on the calling thread.
void run_group(const MaskedLinearCrossEntropyKernels& kernel, MaskedLinearCrossEntropy problem,
               const Plan& plan, int64_t begin, int64_t end, int64_t gradients) {
  const int64_t feature_panels = divide_up(problem.features, kernel.panel_width);
  for (problem.chunk_row = begin; problem.chunk_row < end; problem.chunk_row += plan.chunk_rows) {
    const int64_t rows = std::min(plan.chunk_rows, end - problem.chunk_row);
    for (problem.chunk_sample = 0; problem.chunk_sample < problem.num_samples;
         problem.chunk_sample += plan.chunk_samples) {
      problem.chunk_samples =
          std::min(plan.chunk_samples, problem.num_samples - problem.chunk_sample);
      const int64_t size = rows * problem.chunk_samples;
      plan.parallel(rows, 1, [&](int64_t first, int64_t last) {
        kernel.rows(problem, first, last, gradients != 0);
      });
      if (gradients & kGradWeight) {
        plan.parallel(feature_panels, 1, [&](int64_t first, int64_t last) {
          kernel.weight_gradient(problem, size, first, last);
        });
      }
      if (gradients & kGradBias) {
        plan.parallel(problem.classes, 256, [&](int64_t first, int64_t last) {
          kernel.bias_gradient(problem, size, first, last);
        });
      }
    }
  }
}

// The part of a problem that the arguments fix; scratch and results are still empty.
MaskedLinearCrossEntropy describe(const Inputs& inputs) {
  MaskedLinearCrossEntropy problem{};
  problem.rows = inputs.rows();
  problem.features = inputs.features();
  problem.classes = inputs.classes();
  problem.padded_classes = inputs.padded_classes;
  problem.rule = drop_rule(inputs.p);
  problem.scale = problem.rule.drops ? keep_scale(inputs.p) : 1.0;
  // Without dropout all samples are equal.
  problem.num_samples = problem.rule.drops ? inputs.num_samples : 1;
  problem.seed = inputs.seed;
  problem.x = inputs.x.const_data_ptr();
  problem.weight = inputs.weight.const_data_ptr();
  problem.bias = data_or_null(inputs.bias);
  problem.target = inputs.targets();
  problem.ignore_index = inputs.ignore_index;
  problem.label_smoothing = inputs.label_smoothing;
  problem.class_weight = data_or_null(inputs.class_weight);
  for (const double value : inputs.class_weights) {
    problem.class_weight_sum += value;
  }
  return problem;
}

// Results of type A.
struct Result {
  std::vector<double> row_loss;  // [rows], mean over the samples
  Tensor grad_x, grad_weight, grad_bias;
};

// One pass over all rows and samples. row_gradient [rows] is the gradient of the result with
// respect to a row's loss.
Result run(const Inputs& inputs, int64_t gradients, std::vector<double> row_gradient) {
  const MaskedLinearCrossEntropyKernels& kernel = inputs.kernel();
  const bool wants_x = gradients & kGradX;
  MaskedLinearCrossEntropy problem = describe(inputs);
  for (double& value : row_gradient) {
    value /= static_cast<double>(problem.num_samples);
  }
  problem.row_scale = row_gradient.data();

  const Plan plan(problem, accumulate_bytes(inputs.type));
  const Scratch scratch(inputs, problem, plan, wants_x);
  problem.chunk_capacity = plan.chunk_rows * plan.chunk_samples;
  problem.weight_by_class = scratch.weight_by_class.mutable_data_ptr();
  problem.weight_by_feature = scratch.weight_by_feature.mutable_data_ptr();

  const auto zeros = [&](bool wanted, const Shape& shape) {
    return torch::stable::new_zeros(inputs.x, wanted ? shape : Shape{1, 0},
                                    accumulate_type(inputs.type));
  };
  const Tensor grad_x = zeros(wants_x, {1, problem.rows, problem.features});
  const Tensor grad_weight =
      zeros(gradients & kGradWeight, {plan.groups, problem.classes, problem.features});
  const Tensor grad_bias = zeros(gradients & kGradBias, {plan.groups, problem.classes});
  std::vector<double> row_loss(problem.rows, 0.0);
  problem.row_loss = row_loss.data();
  problem.grad_x = wants_x ? grad_x.mutable_data_ptr() : nullptr;

  plan.parallel(divide_up(problem.classes, kernel.panel_width), 1,
                [&](int64_t begin, int64_t end) { kernel.pack_by_class(problem, begin, end); });
  if (wants_x) {
    plan.parallel(divide_up(problem.features, kernel.panel_width), 1,
                  [&](int64_t begin, int64_t end) { kernel.pack_by_feature(problem, begin, end); });
  }
  const auto work = [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      MaskedLinearCrossEntropy own = problem;
      own.operand = slice(scratch.operand, group);
      own.keep = static_cast<uint8_t*>(slice(scratch.keep, group));
      own.logits = slice(scratch.logits, group);
      own.widened_x = slice(scratch.widened_x, group);
      own.grad_weight = slice(grad_weight, group);
      own.grad_bias = slice(grad_bias, group);
      run_group(kernel, own, plan, group * plan.group_rows,
                std::min((group + 1) * plan.group_rows, problem.rows), gradients);
    }
  };
  if (plan.groups == 1) {
    work(0, 1);  // the threads are used inside
  } else {
    plan.parallel(plan.groups, 1, work);
  }
  for (double& loss : row_loss) {
    loss /= static_cast<double>(problem.num_samples);
  }
  return {std::move(row_loss), total(grad_x), total(grad_weight), total(grad_bias)};
}

// A float64 buffer as a tensor of the accumulation type.
Tensor to_tensor(const std::vector<double>& values, const Shape& shape, const Inputs& inputs) {
  const Tensor out = torch::stable::new_empty(inputs.x, shape, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(out.mutable_data_ptr()));
  return torch::stable::to(out, accumulate_type(inputs.type));
}

Tensor product(const Tensor& left, const Tensor& right) {
  StableIValue stack[] = {torch::stable::detail::from(left), torch::stable::detail::from(right)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul", "Tensor", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> multi_sample_dropout_cross_entropy(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& class_weight, const Tensor& p, const Tensor& label_smoothing,
    const Tensor& seed, int64_t num_samples, int64_t ignore_index, int64_t reduction,
    int64_t gradients) {
  const Inputs inputs = read_inputs(x, weight, bias, target, class_weight, p, label_smoothing, seed,
                                    num_samples, ignore_index);
  const double denominator = reduction == kMean ? total_weight(inputs) : 1.0;
  // Row-wise losses are differentiated in the backward pass, when their weights are known.
  const Result result = run(inputs, reduction == kNone ? 0 : gradients,
                            std::vector<double>(inputs.rows(), 1.0 / denominator));
  if (reduction == kNone) {
    return {to_tensor(result.row_loss, {inputs.rows()}, inputs), result.grad_x, result.grad_weight,
            result.grad_bias};
  }
  double sum = 0.0;
  for (const double value : result.row_loss) {
    sum += value;
  }
  return {to_tensor({sum / denominator}, {}, inputs), result.grad_x, result.grad_weight,
          result.grad_bias};
}

// The gradients of a scalar loss were found in the forward pass (unit_*); those of row-wise losses
// are found here. Rounding to a narrower type comes last, after a gradient scaler's factor.
std::tuple<Tensor, Tensor, Tensor> multi_sample_dropout_cross_entropy_backward(
    const Tensor& grad_loss, const Tensor& unit_grad_x, const Tensor& unit_grad_weight,
    const Tensor& unit_grad_bias, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& class_weight, const Tensor& p, const Tensor& label_smoothing,
    const Tensor& seed, int64_t num_samples, int64_t ignore_index, int64_t reduction,
    int64_t gradients) {
  using torch::stable::to;
  const ScalarType dtype = x.scalar_type();
  if (reduction != kNone) {
    return {to(product(unit_grad_x, grad_loss), dtype),
            to(product(unit_grad_weight, grad_loss), dtype),
            to(product(unit_grad_bias, grad_loss), dtype)};
  }
  const Inputs inputs = read_inputs(x, weight, bias, target, class_weight, p, label_smoothing, seed,
                                    num_samples, ignore_index);
  const Tensor row_gradient = torch::stable::contiguous(to(grad_loss, ScalarType::Double));
  const double* values = static_cast<const double*>(row_gradient.const_data_ptr());
  const Result result = run(inputs, gradients, std::vector<double>(values, values + inputs.rows()));
  return {to(result.grad_x, dtype), to(result.grad_weight, dtype), to(result.grad_bias, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("multi_sample_dropout_cross_entropy",
               TORCH_BOX(&multi_sample_dropout_cross_entropy));
  library.impl("multi_sample_dropout_cross_entropy_backward",
               TORCH_BOX(&multi_sample_dropout_cross_entropy_backward));
}

}  // namespace regularizers
