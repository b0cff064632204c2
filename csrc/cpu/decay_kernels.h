// One optimizer step with a decoupled decay, in one pass:
//   m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  u = step_size m / (sqrt(v) inverse_root +
//   eps) y = x - u,  x' = y - D(y)        or, decay first,        x' = (x - D(x)) - u
// with D(y) = clip(slope (y - r), -bound, bound), which is every decay of the library: L2 has no
// bound, Huber has the bound tau delta, L1 the slope 1 (its prox) or a huge one (its gradient).
#pragma once

#include "elementary.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

template <typename A>
static inline Vector<A> absolute(Vector<A> x) {
  if constexpr (sizeof(A) == 4) {
    return (Vector<A>)((Vector<int32_t>)x & 0x7FFFFFFF);
  } else {
    return (Vector<A>)((Vector<int64_t>)x & 0x7FFFFFFFFFFFFFFF);
  }
}

// NaN stays NaN: of these intrinsics the second operand is returned where one is NaN.
static inline Vector<float> clip(Vector<float> x, Vector<float> bound) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_min_ps((__m512)bound, _mm512_max_ps((__m512)-bound, (__m512)x));
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_min_ps((__m256)bound, _mm256_max_ps((__m256)-bound, (__m256)x));
#else
  x = x < -bound ? -bound : x;
  return x > bound ? bound : x;
#endif
}

static inline Vector<double> clip(Vector<double> x, Vector<double> bound) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_min_pd((__m512d)bound, _mm512_max_pd((__m512d)-bound, (__m512d)x));
#elif defined(__AVX2__)
  return (Vector<double>)_mm256_min_pd((__m256d)bound, _mm256_max_pd((__m256d)-bound, (__m256d)x));
#else
  x = x < -bound ? -bound : x;
  return x > bound ? bound : x;
#endif
}

// bfloat16 with probability proportional to nearness: random bits are added below the last one that
// stays, and the rest is cut off. Infinities and NaN are rounded to nearest.
static inline bfloat16 narrow_stochastically(float value, uint32_t word) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7F800000u) == 0x7F800000u) {
    return narrow<bfloat16>(value);
  }
  return {static_cast<uint16_t>((bits + (word & 0xFFFFu)) >> 16)};
}

// Stores the first `count` lanes, to nearest.
template <typename T>
static inline void store_lanes(T* to, Vector<Accumulate<T>> value, int64_t count) {
  if constexpr (sizeof(T) == sizeof(Accumulate<T>)) {
    if (count >= kLanes<T>) {
      store(to, value);
      return;
    }
  }
  store_narrow(to, value, count);
}

// The same, at random: only bfloat16 is stored so.
template <typename T>
static inline void store_randomly(T* to, Vector<Accumulate<T>> value, int64_t count,
                                  const uint32_t*) {
  store_lanes(to, value, count);
}
static inline void store_randomly(bfloat16* to, Vector<float> value, int64_t count,
                                  const uint32_t* words) {
  for (int64_t j = 0; j < (count < kLanes<float> ? count : kLanes<float>); ++j) {
    to[j] = narrow_stochastically(value[j], words[j]);
  }
}

// The value where the mask holds, else 0.
template <typename A>
static inline Vector<A> where_mask(const uint8_t* mask, Vector<A> value, int64_t count) {
  uint8_t lanes[kLanes<A>] = {};
  for (int64_t j = 0; j < (count < kLanes<A> ? count : kLanes<A>); ++j) {
    lanes[j] = mask[j] != 0 ? 0xFF : 0;
  }
  return keep_lanes<A>(lanes, value);
}

template <typename A>
static inline Vector<A> first_lanes(Vector<A> value, int64_t count) {
  for (int64_t j = count; j < kLanes<A>; ++j) {
    value[j] = A(0);
  }
  return value;
}

// The scalars of a step, in every lane.
template <typename A>
struct AdamLanes {
  Vector<A> grad_factor, beta1, rest1, beta2, rest2, eps, step_size, inverse_root, slope, bound;

  explicit inline AdamLanes(const AdamTensor& tensor)
      : grad_factor(broadcast(static_cast<A>(tensor.grad_factor))),
        beta1(broadcast(static_cast<A>(tensor.beta1))),
        rest1(broadcast(static_cast<A>(1.0 - tensor.beta1))),
        beta2(broadcast(static_cast<A>(tensor.beta2))),
        rest2(broadcast(static_cast<A>(1.0 - tensor.beta2))),
        eps(broadcast(static_cast<A>(tensor.eps))),
        step_size(broadcast(static_cast<A>(tensor.step_size))),
        inverse_root(broadcast(static_cast<A>(tensor.inverse_root))),
        slope(broadcast(static_cast<A>(tensor.slope))),
        bound(broadcast(static_cast<A>(tensor.bound))) {}
};

// One vector of elements; returns |parameter| after the step. `plain`: no column is optional, which
// spares the common case its branches; without it GCC holds less of it in registers.
template <typename T, bool plain, bool decay_first>
static inline Vector<Accumulate<T>> adam_vector(const AdamTensor& tensor,
                                                const AdamLanes<Accumulate<T>>& lanes, int64_t e,
                                                int64_t count, const uint32_t* words) {
  using A = Accumulate<T>;
  T* param = static_cast<T*>(tensor.param) + e;
  A* exp_avg = static_cast<A*>(tensor.exp_avg) + e;
  A* exp_avg_sq = static_cast<A*>(tensor.exp_avg_sq) + e;
  const Vector<A> g = load_wide(static_cast<const T*>(tensor.grad) + e, count) * lanes.grad_factor;
  const Vector<A> m = load_wide(exp_avg, count) * lanes.beta1 + g * lanes.rest1;
  const Vector<A> v = load_wide(exp_avg_sq, count) * lanes.beta2 + g * g * lanes.rest2;
  store_lanes(exp_avg, m, count);
  store_lanes(exp_avg_sq, v, count);
  Vector<A> largest = v;
  if (!plain && tensor.max_exp_avg_sq != nullptr) {
    A* max_exp_avg_sq = static_cast<A*>(tensor.max_exp_avg_sq) + e;
    const Vector<A> before = load_wide(max_exp_avg_sq, count);
    largest = before > v ? before : v;
    store_lanes(max_exp_avg_sq, largest, count);
  }
  const Vector<A> update =
      lanes.step_size * m / (square_root(largest) * lanes.inverse_root + lanes.eps);
  const bool has_master = !plain && tensor.master != nullptr;
  A* master = static_cast<A*>(tensor.master) + e;
  const Vector<A> x = has_master ? load_wide(master, count) : load_wide(param, count);
  const Vector<A> base = decay_first ? x : x - update;
  Vector<A> offset = base;
  if (!plain && tensor.reference != nullptr) {
    offset = base - load_wide(static_cast<const T*>(tensor.reference) + e, count);
  }
  Vector<A> decay = clip(lanes.slope * offset, lanes.bound);
  if (!plain && tensor.mask != nullptr) {
    decay = where_mask<A>(tensor.mask + e, decay, count);
  }
  const Vector<A> next = decay_first ? (base - decay) - update : base - decay;
  if (has_master) {
    store_lanes(master, next, count);
  }
  if (!plain && tensor.stochastic) {
    store_randomly(param, next, count, words);
  } else {
    store_lanes(param, next, count);
  }
  return absolute<A>(next);
}

template <typename T, bool plain, bool decay_first>
static double adam_elements(const AdamTensor& tensor, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int kStep = kLanes<A>;
  const AdamLanes<A> lanes(tensor);
  alignas(64) uint32_t words[kDecayBlock];
  Vector<A> total{};
  for (int64_t block = begin; block < end; block += kDecayBlock) {
    const int64_t block_end = end - block < kDecayBlock ? end : block + kDecayBlock;
    if (!plain && tensor.stochastic) {
      philox_block(tensor.random, static_cast<uint64_t>(block) / kWordsPerCall, words);
    }
    int64_t e = block;
    for (; e + kStep <= block_end; e += kStep) {
      total += adam_vector<T, plain, decay_first>(tensor, lanes, e, kStep, words + (e - block));
    }
    if (e < block_end) {
      total += first_lanes<A>(
          adam_vector<T, plain, decay_first>(tensor, lanes, e, block_end - e, words + (e - block)),
          block_end - e);
    }
  }
  return static_cast<double>(sum_lanes<A>(total));
}

template <typename T>
static double adam_step(const AdamTensor& tensor, int64_t begin, int64_t end) {
  const bool plain = tensor.max_exp_avg_sq == nullptr && tensor.master == nullptr &&
                     tensor.reference == nullptr && tensor.mask == nullptr && !tensor.stochastic;
  const auto elements =
      plain ? (tensor.decay_first ? adam_elements<T, true, true> : adam_elements<T, true, false>)
            : (tensor.decay_first ? adam_elements<T, false, true> : adam_elements<T, false, false>);
  return elements(tensor, begin, end);
}

template <typename T>
static constexpr DecayKernels decay_kernels() {
  return {adam_step<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
