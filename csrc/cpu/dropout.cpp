// dropout_samples, its adjoint and raw Philox words on the CPU: memory layout, threads,
// registration.
#include <algorithm>

#include "../sample_layout.h"
#include "common.h"

namespace regularizers {
namespace {

// Elements of one task: large enough to hide the hand-over, small enough that a block of x stays in
// the first-level cache while all its samples are written. A multiple of four, so that tasks begin
// at a whole Philox call.
constexpr int64_t kTaskElements = 4096;

void* offset(void* base, int64_t elements, size_t element_size) {
  return static_cast<char*>(base) + elements * static_cast<int64_t>(element_size);
}

Tensor dropout_samples(const Tensor& x, const Tensor& p, const Tensor& seed, int64_t num_samples) {
  const double probability_of_drop = scheduled_value("p", p, /*one_allowed=*/true);
  const StorageType type = storage_type(x);
  const Tensor out = empty_samples(x, num_samples);
  const int64_t elements = x.numel();
  if (elements == 0) {
    return out;
  }
  const StridedBox box = merged_box(x, 0, x, 0, out, 1);
  const int64_t blocks = divide_up(elements, kTaskElements);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  advise_huge_pages(to, static_cast<size_t>(out.numel()) * out.element_size());
  const uint64_t seed_bits = seed_value(seed);
  const auto kernel = kernels().dropout[type].sample;
  torch::stable::parallel_for(0, blocks * num_samples, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task % num_samples, first = task / num_samples * kTaskElements;
      kernel(box, from, offset(to, sample * elements, x.element_size()), first,
             std::min(first + kTaskElements, elements),
             {seed_bits, static_cast<uint32_t>(sample), 0}, probability_of_drop);
    }
  });
  return out;
}

Tensor dropout_samples_adjoint(const Tensor& y, const Tensor& p, const Tensor& seed) {
  const double probability_of_drop = scheduled_value("p", p, /*one_allowed=*/true);
  const StorageType type = storage_type(y);
  const int64_t num_samples = y.size(0);
  Tensor out = torch::stable::empty_like(torch::stable::select(y, 0, 0));
  const int64_t elements = out.numel();
  if (elements == 0) {
    return out;
  }
  const StridedBox box = merged_box(y, 1, y, 1, out, 0);
  const void* from = y.const_data_ptr();
  void* to = out.mutable_data_ptr();
  advise_huge_pages(to, static_cast<size_t>(elements) * out.element_size());
  const uint64_t seed_bits = seed_value(seed);
  const auto kernel = kernels().dropout[type].adjoint;
  torch::stable::parallel_for(
      0, divide_up(elements, kTaskElements), 1, [&](int64_t begin, int64_t end) {
        kernel(box, from, y.stride(0), num_samples, to, begin * kTaskElements,
               std::min(end * kTaskElements, elements), seed_bits, probability_of_drop);
      });
  return out;
}

// Words of `calls` consecutive Philox calls as int32 bit patterns, for tests and for measuring the
// generator alone.
Tensor philox_words(const Tensor& seed, int64_t first_call, int64_t calls, int64_t stream,
                    int64_t step) {
  constexpr int64_t kTaskCalls = 1024;
  const Tensor out = torch::stable::new_empty(seed, {calls * kWordsPerCall}, ScalarType::Int);
  const PhiloxStream source{seed_value(seed), static_cast<uint32_t>(stream),
                            static_cast<uint32_t>(step)};
  uint32_t* words = static_cast<uint32_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, divide_up(calls, kTaskCalls), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kTaskCalls, last = std::min(end * kTaskCalls, calls);
    kernels().philox_words(source, static_cast<uint64_t>(first_call + first), last - first,
                           words + first * kWordsPerCall);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("dropout_samples", TORCH_BOX(&dropout_samples));
  library.impl("dropout_samples_adjoint", TORCH_BOX(&dropout_samples_adjoint));
  library.impl("philox_words", TORCH_BOX(&philox_words));
}

}  // namespace regularizers
