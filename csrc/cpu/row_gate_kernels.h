// y = residual + factor x over a run of elements: one row of a batch, or a part of one.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

// With factor 0 x is not read, so neither its NaN nor its bandwidth counts.
template <typename T>
static void row_gate(const void* x_, const void* residual_, void* to_, int64_t elements,
                     double factor_) {
  using A = Accumulate<T>;
  const T* x = static_cast<const T*>(x_);
  const T* residual = static_cast<const T*>(residual_);
  T* to = static_cast<T*>(to_);
  const A factor = static_cast<A>(factor_);
  const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
  if (factor_ == 0.0) {
    if (residual == nullptr) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, residual, bytes);
    }
    return;
  }
  constexpr int kWidth = kLanes<A>;
  int64_t j = 0;
  if (residual == nullptr) {
    for (; j + kWidth <= elements; j += kWidth) {
      store_whole(to + j, load_wide(x + j) * factor);
    }
    for (; j < elements; ++j) {
      to[j] = narrow<T>(factor * widen(x[j]));
    }
    return;
  }
  for (; j + kWidth <= elements; j += kWidth) {
    store_whole(to + j, load_wide(residual + j) + load_wide(x + j) * factor);
  }
  for (; j < elements; ++j) {
    to[j] = narrow<T>(widen(residual[j]) + factor * widen(x[j]));
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
