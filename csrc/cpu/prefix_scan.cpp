// All prefixes of a linear classifier on the CPU: checks, scratch, threads, registration. The
// arithmetic is in prefix_scan_kernels.h.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

// The arguments that all scans share, made contiguous; the weight transposed and padded.
struct Classifier {
  Tensor x, weight, transposed, bias;
  StorageType type;
  PrefixScan problem{};

  Classifier(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_)
      : x(torch::stable::contiguous(x_)),
        weight(torch::stable::contiguous(weight_)),
        type(storage_type(x_)) {
    const ScalarType wide = accumulate_type(type);
    const int64_t features = x.size(1), classes = weight.size(0);
    const int64_t padded = divide_up(classes, kernel().padding) * kernel().padding;
    transposed = torch::stable::new_zeros(x, {features, padded}, wide);
    Tensor filled = torch::stable::narrow(transposed, 1, 0, classes);
    torch::stable::copy_(filled, torch::stable::transpose(weight, 0, 1));
    bias = torch::stable::new_empty(x, {padded}, wide);
    torch::stable::fill_(bias, -std::numeric_limits<double>::infinity());
    Tensor own = torch::stable::narrow(bias, 0, 0, classes);
    if (bias_.has_value()) {
      torch::stable::copy_(own, *bias_);
    } else {
      torch::stable::zero_(own);
    }
    problem.features = problem.x_stride = features;
    problem.classes = classes;
    problem.padded_classes = padded;
    problem.x = x.const_data_ptr();
    problem.class_weights = weight.const_data_ptr();
    problem.weight = transposed.const_data_ptr();
    problem.bias = bias.const_data_ptr();
  }

  const PrefixScanKernels& kernel() const { return kernels().prefix_scan[type]; }
  int64_t rows() const { return x.size(0); }

  // Scratch for `workers` workers, `elements` of the accumulation type each.
  Tensor scratch(int64_t workers, int64_t elements) const {
    const int64_t aligned = divide_up(elements, 16) * 16;  // vectors are loaded aligned
    return torch::stable::new_empty(x, {workers, aligned}, accumulate_type(type));
  }
};

void* slice(const Tensor& tensor, int64_t index) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         index * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
}

void check_target(const int64_t* target, int64_t rows, int64_t classes,
                  std::optional<int64_t> ignore_index) {
  for (int64_t i = 0; i < rows; ++i) {
    if ((target[i] < 0 || target[i] >= classes) && target[i] != ignore_index) {
      throw std::invalid_argument(
          "target must lie in [0, " + std::to_string(classes) + ")" +
          (ignore_index ? " or equal ignore_index " + std::to_string(*ignore_index) : "") +
          ", got " + std::to_string(target[i]) + " in row " + std::to_string(i));
    }
  }
}

// How many ranges of rows are worked off side by side: one a thread, unless there is little to do.
int64_t range_count(const Classifier& classifier, int64_t rows, int64_t tile, int64_t most) {
  constexpr int64_t kSerialProducts = 1 << 17;
  const PrefixScan& problem = classifier.problem;
  if (rows * problem.features * problem.padded_classes < kSerialProducts) {
    return 1;
  }
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(divide_up(rows, tile), 1, std::min(threads, most));
}

// Calls body(range, begin, end) on `ranges` ranges of rows that begin at whole tiles.
template <typename Body>
void for_ranges(int64_t ranges, int64_t rows, int64_t tile, const Body& body) {
  const int64_t length = divide_up(divide_up(rows, tile), ranges) * tile;
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t range = first; range < last; ++range) {
      const int64_t begin = std::min(range * length, rows);
      body(range, begin, std::min(begin + length, rows));
    }
  });
}

Tensor prefix_accuracy(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& target_) {
  Classifier classifier(x, weight, bias);
  PrefixScan& problem = classifier.problem;
  const Tensor target = torch::stable::contiguous(target_);
  problem.target = static_cast<const int64_t*>(target.const_data_ptr());
  check_target(problem.target, classifier.rows(), problem.classes, std::nullopt);
  const Tensor correct = torch::stable::new_zeros(x, {problem.features}, ScalarType::Long);
  if (classifier.rows() == 0) {
    return correct;
  }
  const auto& kernel = classifier.kernel();
  const int64_t ranges = range_count(classifier, classifier.rows(), kernel.lanes, 1024);
  const Tensor scratch = classifier.scratch(ranges, 4 * problem.features * kernel.lanes);
  std::vector<int64_t> counts(ranges * problem.features, 0);
  for_ranges(ranges, classifier.rows(), kernel.lanes,
             [&](int64_t range, int64_t begin, int64_t end) {
               kernel.accuracy(problem, begin, end, slice(scratch, range),
                               counts.data() + range * problem.features);
             });
  int64_t* out = static_cast<int64_t*>(correct.mutable_data_ptr());
  for (size_t i = 0; i < counts.size(); ++i) {
    out[i % static_cast<size_t>(problem.features)] += counts[i];
  }
  return correct;
}

Tensor prefix_logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Classifier classifier(x, weight, bias);
  const PrefixScan& problem = classifier.problem;
  const int64_t rows = classifier.rows();
  const Tensor out = torch::stable::new_empty(x, {problem.features, rows, problem.classes});
  if (out.numel() == 0) {
    return out;
  }
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  const int64_t ranges = range_count(classifier, rows, 1, 1024);
  const Tensor scratch = classifier.scratch(ranges, problem.padded_classes);
  for_ranges(ranges, rows, 1, [&](int64_t range, int64_t begin, int64_t end) {
    classifier.kernel().logits(problem, begin, end, slice(scratch, range), out.mutable_data_ptr(),
                               rows * problem.classes);
  });
  return out;
}

// What forward and backward pass of the loss share: the law and the rows that count.
struct Loss {
  Classifier classifier;
  Tensor target, law;
  std::vector<int64_t> counted;

  Loss(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
       const Tensor& target_, const Tensor& probs, int64_t ignore_index)
      : classifier(x, weight, bias),
        target(torch::stable::contiguous(target_)),
        law(torch::stable::contiguous(probs)) {
    PrefixScan& problem = classifier.problem;
    problem.target = static_cast<const int64_t*>(target.const_data_ptr());
    problem.probs = static_cast<const double*>(law.const_data_ptr());
    check_target(problem.target, classifier.rows(), problem.classes, ignore_index);
    for (int64_t d = 0; d < problem.features; ++d) {
      const double probability = problem.probs[d];
      if (!(probability >= 0.0 && probability <= std::numeric_limits<double>::max())) {
        throw std::invalid_argument("probs must be finite and not negative, got " +
                                    std::to_string(probability));
      }
    }
    while (problem.features > 0 && problem.probs[problem.features - 1] == 0.0) {
      --problem.features;
    }
    for (int64_t i = 0; i < classifier.rows(); ++i) {
      if (problem.target[i] != ignore_index) {
        counted.push_back(i);
      }
    }
    problem.rows = counted.data();
  }

  int64_t size() const { return static_cast<int64_t>(counted.size()); }
};

std::tuple<Tensor, Tensor> prefix_cross_entropy(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const Tensor& target, const Tensor& probs,
                                                int64_t ignore_index) {
  Loss loss(x, weight, bias, target, probs, ignore_index);
  const Classifier& classifier = loss.classifier;
  PrefixScan& problem = loss.classifier.problem;
  const ScalarType wide = accumulate_type(classifier.type);
  const Tensor row_loss = torch::stable::new_zeros(x, {x.size(0)}, wide);
  const Tensor log_sum_exp = torch::stable::new_zeros(x, {x.size(0), x.size(1)}, wide);
  problem.row_loss = row_loss.mutable_data_ptr();
  problem.log_sum_exp = log_sum_exp.mutable_data_ptr();
  const auto& kernel = classifier.kernel();
  const int64_t ranges = range_count(classifier, loss.size(), kernel.tile_rows, 1024);
  const Tensor scratch = classifier.scratch(ranges, kernel.tile_rows * problem.padded_classes);
  for_ranges(ranges, loss.size(), kernel.tile_rows, [&](int64_t range, int64_t begin, int64_t end) {
    kernel.loss(problem, begin, end, slice(scratch, range));
  });
  return {row_loss, log_sum_exp};
}

// Sum over the ranges, the first dimension.
Tensor total(const Tensor& ranges) {
  const int64_t dimension = 0;
  return ranges.size(0) == 1
             ? torch::stable::select(ranges, 0, 0)
             : torch::stable::sum(ranges, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1));
}

std::tuple<Tensor, Tensor, Tensor> prefix_cross_entropy_backward(
    const Tensor& grad_rows, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& target, const Tensor& probs,
    const Tensor& log_sum_exp, int64_t ignore_index) {
  constexpr int64_t kMostGradients = 16;  // copies of the gradient of the weight
  Loss loss(x, weight, bias, target, probs, ignore_index);
  const Classifier& classifier = loss.classifier;
  PrefixScan& problem = loss.classifier.problem;
  const ScalarType wide = accumulate_type(classifier.type);
  const Tensor row_gradient =
      torch::stable::contiguous(torch::stable::to(grad_rows, ScalarType::Double));
  const Tensor shift = torch::stable::contiguous(log_sum_exp);
  const Tensor grad_x = torch::stable::new_zeros(x, {x.size(0), x.size(1)});
  problem.row_gradient = static_cast<const double*>(row_gradient.const_data_ptr());
  problem.log_sum_exp = shift.mutable_data_ptr();  // read only
  problem.grad_x = grad_x.mutable_data_ptr();
  const auto& kernel = classifier.kernel();
  const int64_t ranges = range_count(classifier, loss.size(), kernel.tile_rows, kMostGradients);
  const Tensor weight_sums =
      torch::stable::new_zeros(x, {ranges, x.size(1), problem.padded_classes}, wide);
  const Tensor bias_sums = torch::stable::new_zeros(x, {ranges, problem.padded_classes}, wide);
  const Tensor scratch =
      classifier.scratch(ranges, kernel.tile_rows * problem.padded_classes *
                                     (2 + problem.features / kernel.checkpoint_steps));
  for_ranges(ranges, loss.size(), kernel.tile_rows, [&](int64_t range, int64_t begin, int64_t end) {
    kernel.loss_gradient(problem, begin, end, slice(scratch, range), slice(weight_sums, range),
                         slice(bias_sums, range));
  });
  Tensor by_feature = total(weight_sums), by_class = total(bias_sums);
  const ScalarType narrow = x.scalar_type();
  const Tensor grad_weight = torch::stable::contiguous(
      torch::stable::transpose(torch::stable::narrow(by_feature, 1, 0, problem.classes), 0, 1));
  // Cloned: a narrowed vector would be an output with a larger storage.
  const Tensor grad_bias =
      torch::stable::clone(torch::stable::narrow(by_class, 0, 0, problem.classes));
  return {grad_x, torch::stable::to(grad_weight, narrow), torch::stable::to(grad_bias, narrow)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("prefix_accuracy", TORCH_BOX(&prefix_accuracy));
  library.impl("prefix_logits", TORCH_BOX(&prefix_logits));
  library.impl("prefix_cross_entropy", TORCH_BOX(&prefix_cross_entropy));
  library.impl("prefix_cross_entropy_backward", TORCH_BOX(&prefix_cross_entropy_backward));
}

}  // namespace regularizers
