// Inverted dropout of one sample and its adjoint: y_e = r keep_e x_e. Dropped elements are selected
// out, never multiplied by zero, so a NaN under a dropped element stays there.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

// Walks over logical elements in runs along the innermost dimension: within a run both sides move
// by fixed strides.
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

  // Calls body(offset in the block, length, from, to) for the runs of the next `count` elements.
  template <typename Body>
  inline void runs(int count, const Body& body) {
    const int inner = box->dimensions - 1;
    for (int done = 0; done < count;) {
      const int64_t left = box->size[inner] - index[inner];
      const int length = left < count - done ? static_cast<int>(left) : count - done;
      body(done, length, from, to);
      done += length;
      advance(inner, length);
    }
  }

 private:
  inline void advance(int d, int64_t steps) {
    while (true) {
      index[d] += steps;
      from += steps * box->from_stride[d];
      to += steps * box->to_stride[d];
      if (index[d] < box->size[d] || d == 0) {
        return;
      }
      index[d] = 0;
      from -= box->size[d] * box->from_stride[d];
      to -= box->size[d] * box->to_stride[d];
      --d;
      steps = 1;
    }
  }
};

// Words of the next block of one sample; without dropout all ones, so that one rule serves both.
static inline uint32_t block_words(PhiloxStream source, DropRule rule, int64_t first,
                                   uint32_t* words) {
  if (rule.drops) {
    philox_block(source, static_cast<uint64_t>(first) / kWordsPerCall, words);
    return rule.last_dropped;
  }
  std::memset(words, 0xFF, sizeof(uint32_t) * kBlockElements);
  return 0;
}

static inline int block_count(int64_t first, int64_t end) {
  return end - first < kBlockElements ? static_cast<int>(end - first) : kBlockElements;
}

template <typename T>
static void dropout_sample(const StridedBox& box, const void* from_, void* to_, int64_t begin,
                           int64_t end, PhiloxStream source, double p) {
  using A = Accumulate<T>;
  const T* from = static_cast<const T*>(from_);
  T* to = static_cast<T*>(to_);
  const DropRule rule = drop_rule(p);
  const A scale = static_cast<A>(keep_scale(p));
  const int64_t from_step = box.from_stride[box.dimensions - 1];
  const int64_t to_step = box.to_stride[box.dimensions - 1];
  const bool contiguous = is_contiguous(box);
  StridedCursor cursor(box, begin);
  alignas(64) uint32_t words[kBlockElements];
  for (int64_t first = begin; first < end; first += kBlockElements) {
    const int count = block_count(first, end);
    const uint32_t last_dropped = block_words(source, rule, first, words);
    if (contiguous) {
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const A value = widen(from[first + j]) * scale;
        to[first + j] = narrow<T>(words[j] > last_dropped ? value : A(0));
      }
      continue;
    }
    cursor.runs(count, [&](int offset, int length, int64_t source_at, int64_t target_at) {
      for (int j = 0; j < length; ++j) {
        const A value = widen(from[source_at + j * from_step]) * scale;
        to[target_at + j * to_step] = narrow<T>(words[offset + j] > last_dropped ? value : A(0));
      }
    });
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
  const A scale = static_cast<A>(keep_scale(p));
  const int64_t from_step = box.from_stride[box.dimensions - 1];
  const int64_t to_step = box.to_stride[box.dimensions - 1];
  const bool contiguous = is_contiguous(box);
  StridedCursor block_start(box, begin);
  alignas(64) uint32_t words[kBlockElements];
  alignas(64) A sum[kBlockElements];
  for (int64_t first = begin; first < end; first += kBlockElements) {
    const int count = block_count(first, end);
    for (int j = 0; j < kBlockElements; ++j) {
      sum[j] = A(0);
    }
    for (int64_t s = 0; s < num_samples; ++s) {
      const uint32_t last_dropped =
          block_words({seed, static_cast<uint32_t>(s), 0}, rule, first, words);
      const T* sample = from + s * from_sample_stride;
      if (contiguous) {
#pragma omp simd
        for (int j = 0; j < count; ++j) {
          const A value = widen(sample[first + j]);
          sum[j] += words[j] > last_dropped ? value : A(0);
        }
        continue;
      }
      StridedCursor cursor = block_start;
      cursor.runs(count, [&](int offset, int length, int64_t source_at, int64_t) {
        for (int j = 0; j < length; ++j) {
          const A value = widen(sample[source_at + j * from_step]);
          sum[offset + j] += words[offset + j] > last_dropped ? value : A(0);
        }
      });
    }
    if (contiguous) {
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        to[first + j] = narrow<T>(sum[j] * scale);
      }
      continue;
    }
    block_start.runs(count, [&](int offset, int length, int64_t, int64_t target_at) {
      for (int j = 0; j < length; ++j) {
        to[target_at + j * to_step] = narrow<T>(sum[offset + j] * scale);
      }
    });
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
