// Mixing stretches of rows: the blend of two, its derivative in the weight, and sums in place.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

template <typename T>
static void mix_blend(const void* first_, double first_weight, const void* second_,
                      double second_weight, void* to_, int64_t count) {
  using A = Accumulate<T>;
  const T* first = static_cast<const T*>(first_);
  const T* second = static_cast<const T*>(second_);
  T* to = static_cast<T*>(to_);
  const A u = static_cast<A>(first_weight), v = static_cast<A>(second_weight);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    to[j] = narrow<T>(u * widen(first[j]) + v * widen(second[j]));
  }
}

// Four sums side by side: one would wait for its own last addition.
template <typename T>
static double mix_difference_product(const void* first_, const void* second_, const void* grad_,
                                     int64_t count) {
  using A = Accumulate<T>;
  constexpr int kSums = 4;
  const T* first = static_cast<const T*>(first_);
  const T* second = static_cast<const T*>(second_);
  const T* grad = static_cast<const T*>(grad_);
  Vector<A> sums[kSums] = {};
  int64_t j = 0;
  for (; j + kSums * kLanes<A> <= count; j += kSums * kLanes<A>) {
    for (int s = 0; s < kSums; ++s) {
      const int64_t at = j + s * kLanes<A>;
      sums[s] += (load_wide(first + at) - load_wide(second + at)) * load_wide(grad + at);
    }
  }
  for (; j < count; j += kLanes<A>) {
    const int64_t left = count - j;
    sums[0] +=
        (load_wide(first + j, left) - load_wide(second + j, left)) * load_wide(grad + j, left);
  }
  const Vector<A> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double result = 0.0;
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    result += static_cast<double>(total[lane]);
  }
  return result;
}

template <typename T>
static void mix_add(const void* from_, void* to_, int64_t count) {
  const T* from = static_cast<const T*>(from_);
  T* to = static_cast<T*>(to_);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    to[j] = narrow<T>(widen(to[j]) + widen(from[j]));
  }
}

template <typename T>
static constexpr MixKernels mix_kernels() {
  return {mix_blend<T>, mix_difference_product<T>, mix_add<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
