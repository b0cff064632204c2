// The optimizer step over a table of tensors on the CPU: scalars, threads, registration. The
// arithmetic is in decay_kernels.h.
#include <algorithm>
#include <optional>

#include "../decay_table.h"
#include "common.h"

namespace regularizers {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kThreadElements = 32768;

double scalar(const Tensor& tensor) { return *static_cast<const double*>(tensor.const_data_ptr()); }

template <typename T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(value);  // NOLINT: the table holds addresses
}

AdamTensor adam_tensor(const int64_t* row) {
  AdamTensor tensor{};
  tensor.param = address<void>(row[kParam]);
  tensor.grad = address<const void>(row[kGrad]);
  tensor.exp_avg = address<void>(row[kExpAvg]);
  tensor.exp_avg_sq = address<void>(row[kExpAvgSq]);
  tensor.max_exp_avg_sq = address<void>(row[kMaxExpAvgSq]);
  tensor.master = address<void>(row[kMaster]);
  tensor.reference = address<const void>(row[kReference]);
  tensor.mask = address<const uint8_t>(row[kMask]);
  return tensor;
}

void decoupled_adam_table(const Tensor& table, const Tensor& chunks, const Tensor& steps,
                          const std::optional<Tensor>& deltas, const Tensor& partials,
                          const std::optional<Tensor>& sums, const Tensor& lr,
                          const Tensor& weight_decay, const Tensor& beta1, const Tensor& beta2,
                          const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf, const std::optional<Tensor>& seed,
                          double eps, int64_t penalty, bool prox, bool decay_first, bool maximize,
                          bool bias_correction, int64_t type, int64_t chunk_size) {
  check(type >= 0 && type < kStorageTypes, "type must name a storage type");
  check(chunk_size > 0 && chunk_size % kDecayBlock == 0, "chunk_size must be a multiple of 128");
  if (found_inf.has_value() && *static_cast<const float*>(found_inf->const_data_ptr()) != 0.0f) {
    return;
  }
  const int64_t num_tensors = table.size(0), num_chunks = chunks.size(0);
  const int64_t* rows = static_cast<const int64_t*>(table.const_data_ptr());
  const int64_t* chunk_tensor = static_cast<const int64_t*>(chunks.const_data_ptr());
  const float* step = static_cast<const float*>(steps.const_data_ptr());
  const double* delta =
      deltas.has_value() ? static_cast<const double*>(deltas->const_data_ptr()) : nullptr;
  double* partial = static_cast<double*>(partials.mutable_data_ptr());
  const AdamScalars scalars{scalar(lr), scalar(weight_decay), scalar(beta1), scalar(beta2), penalty,
                            prox,       bias_correction};
  double grad_factor = maximize ? -1.0 : 1.0;
  if (grad_scale.has_value()) {
    grad_factor /= *static_cast<const float*>(grad_scale->const_data_ptr());
  }
  const uint64_t seed_bits = seed.has_value() ? seed_value(*seed) : 0;
  const auto kernel = kernels().decay[type].adam;

  int64_t elements = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    elements += rows[i * kColumns + kNumel];
  }
  const int64_t grain =
      std::max<int64_t>(1, kThreadElements * num_chunks / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, num_chunks, grain, [&](int64_t begin, int64_t end) {
    AdamCorrection correction{};
    float corrected_step = -1.0f;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t i = chunk_tensor[chunk];
      const int64_t* row = rows + i * kColumns;
      if (step[i] != corrected_step) {
        corrected_step = step[i];
        correction = adam_correction(scalars, corrected_step);
      }
      const DecayRule rule = decay_rule(scalars, delta == nullptr ? 0.0 : delta[i]);
      AdamTensor tensor = adam_tensor(row);
      tensor.grad_factor = grad_factor;
      tensor.beta1 = scalars.beta1;
      tensor.beta2 = scalars.beta2;
      tensor.eps = eps;
      tensor.step_size = correction.step_size;
      tensor.inverse_root = correction.inverse_root;
      tensor.slope = rule.slope;
      tensor.bound = rule.bound;
      tensor.decay_first = decay_first;
      tensor.stochastic = seed.has_value();
      tensor.random = {seed_bits, static_cast<uint32_t>(i), 0};
      const int64_t first = (chunk - row[kFirstChunk]) * chunk_size;
      partial[chunk] = kernel(tensor, first, std::min(first + chunk_size, row[kNumel]));
    }
  });
  if (!sums.has_value()) {
    return;
  }
  double* sum = static_cast<double*>(sums->mutable_data_ptr());
  for (int64_t i = 0; i < num_tensors; ++i) {
    const int64_t* row = rows + i * kColumns;
    const int64_t first = row[kFirstChunk], count = divide_up(row[kNumel], chunk_size);
    double total = 0.0;  // in the order of chunks: the same for every number of threads
    for (int64_t chunk = first; chunk < first + count; ++chunk) {
      total += partial[chunk];
    }
    sum[i] = total;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("decoupled_adam_table", TORCH_BOX(&decoupled_adam_table));
}

}  // namespace regularizers
