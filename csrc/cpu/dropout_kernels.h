// Inverted dropout of one sample and its adjoint: y_e = r keep_e x_e. Dropped elements are selected
// out, never multiplied by zero, so a NaN under a dropped element stays there.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

// Memory offsets of consecutive logical elements, one odometer for both sides.
struct StridedCursor {
  const StridedBox* box;
  int64_t index[kMaxDimensions];
  int64_t from = 0, to = 0;

  inline StridedCursor(const StridedBox& strided_box, int64_t element) : box(&strided_box) {
    for (int d = box->dimensions - 1; d >= 0; --d) {
      index[d] = element % box->size[d];
      element /= box->size[d];
      from += index[d] * box->from_stride[d];
      to += index[d] * box->to_stride[d];
    }
  }

  inline void next() {
    for (int d = box->dimensions - 1; d >= 0; --d) {
      from += box->from_stride[d];
      to += box->to_stride[d];
      if (++index[d] < box->size[d]) {
        return;
      }
      index[d] = 0;
      from -= box->size[d] * box->from_stride[d];
      to -= box->size[d] * box->to_stride[d];
    }
  }
};

static inline bool is_contiguous(const StridedBox& box) {
  return box.dimensions == 1 && box.from_stride[0] == 1 && box.to_stride[0] == 1;
}

template <typename T>
static void dropout_sample(const StridedBox& box, const void* from_, void* to_, int64_t begin,
                           int64_t end, PhiloxStream source, double p) {
  using A = Accumulate<T>;
  const T* from = static_cast<const T*>(from_);
  T* to = static_cast<T*>(to_);
  const DropRule rule = drop_rule(p);
  const A scale = static_cast<A>(keep_scale(p));
  const bool contiguous = is_contiguous(box);
  StridedCursor cursor(box, begin);
  alignas(64) uint32_t words[kBlockElements];
  for (int64_t first = begin; first < end; first += kBlockElements) {
    const int count = end - first < kBlockElements ? static_cast<int>(end - first) : kBlockElements;
    if (rule.drops) {
      philox_block(source, static_cast<uint64_t>(first) / kWordsPerCall, words);
    } else {
      for (int j = 0; j < kBlockElements; ++j) {
        words[j] = 1;
      }
    }
    const uint32_t last_dropped = rule.drops ? rule.last_dropped : 0;
    if (contiguous) {
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const A value = widen(from[first + j]) * scale;
        to[first + j] = narrow<T>(words[j] > last_dropped ? value : A(0));
      }
    } else {
      for (int j = 0; j < count; ++j, cursor.next()) {
        to[cursor.to] =
            words[j] > last_dropped ? narrow<T>(widen(from[cursor.from]) * scale) : narrow<T>(A(0));
      }
    }
  }
}

template <typename T>
static void dropout_adjoint(const StridedBox& box, const void* from_, int64_t from_sample_stride,
                            int64_t num_samples, void* to_, int64_t begin, int64_t end,
                            uint64_t seed, double p) {
  using A = Accumulate<T>;
  const T* from = static_cast<const T*>(from_);
  T* to = static_cast<T*>(to_);
  const DropRule rule = drop_rule(p);
  const uint32_t last_dropped = rule.drops ? rule.last_dropped : 0;
  const A scale = static_cast<A>(keep_scale(p));
  const bool contiguous = is_contiguous(box);
  StridedCursor block_start(box, begin);
  alignas(64) uint32_t words[kBlockElements];
  alignas(64) A sum[kBlockElements];
  for (int j = 0; j < kBlockElements; ++j) {
    words[j] = 1;
  }
  for (int64_t first = begin; first < end; first += kBlockElements) {
    const int count = end - first < kBlockElements ? static_cast<int>(end - first) : kBlockElements;
    for (int j = 0; j < kBlockElements; ++j) {
      sum[j] = A(0);
    }
    for (int64_t s = 0; s < num_samples; ++s) {
      if (rule.drops) {
        philox_block({seed, static_cast<uint32_t>(s), 0},
                     static_cast<uint64_t>(first) / kWordsPerCall, words);
      }
      const T* sample = from + s * from_sample_stride;
      if (contiguous) {
#pragma omp simd
        for (int j = 0; j < count; ++j) {
          const A value = widen(sample[first + j]);
          sum[j] += words[j] > last_dropped ? value : A(0);
        }
      } else {
        StridedCursor cursor = block_start;
        for (int j = 0; j < count; ++j, cursor.next()) {
          sum[j] += words[j] > last_dropped ? widen(sample[cursor.from]) : A(0);
        }
      }
    }
    if (contiguous) {
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        to[first + j] = narrow<T>(sum[j] * scale);
      }
    } else {
      for (int j = 0; j < count; ++j, block_start.next()) {
        to[block_start.to] = narrow<T>(sum[j] * scale);
      }
    }
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
