// gradient_gate on the CPU: tasks, threads, registration. The arithmetic is in
// gradient_gate_kernels.h.
#include <algorithm>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

using torch::stable::contiguous;

constexpr int64_t kTaskElements = 1 << 14;

Tensor gradient_gate(const Tensor& value, const Tensor& g_task, const Tensor& g_reg,
                     const Tensor& drop_strength, const Tensor& seed, double eps, int64_t stream) {
  const double strength = scheduled_value("drop_strength", drop_strength, /*one_allowed=*/true);
  const Tensor gated = contiguous(value), task = contiguous(g_task), reg = contiguous(g_reg);
  Tensor out = torch::stable::new_empty(
      value, std::vector<int64_t>(value.sizes().begin(), value.sizes().end()), value.scalar_type());
  const int64_t elements = value.numel();
  const GradientGate gate{eps, strength, {seed_value(seed), static_cast<uint32_t>(stream), 0}};
  const void *from = gated.const_data_ptr(), *task_data = task.const_data_ptr(),
             *reg_data = reg.const_data_ptr();
  void* to = out.mutable_data_ptr();
  advise_huge_pages(to, static_cast<size_t>(elements) * value.element_size());
  const auto kernel = kernels().gradient_gate[storage_type(value)].gate;
  const int64_t tasks = divide_up(elements, kTaskElements);
  if (tasks <= 1) {
    kernel(gate, from, task_data, reg_data, to, 0, elements);
    return out;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    kernel(gate, from, task_data, reg_data, to, begin * kTaskElements,
           std::min(end * kTaskElements, elements));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("gradient_gate", TORCH_BOX(&gradient_gate));
}

}  // namespace regularizers
