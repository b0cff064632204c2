// One optimizer step with a decoupled decay, in one pass:
//   m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  u = step_size m / (sqrt(v) inverse_root +
//   eps) y = x - u,  x' = y - D(y)        or, decay first,        x' = (x - D(x)) - u
// with D(y) = clip(slope (y - r), -bound, bound), which is every decay of the library: L2 has no
// bound, Huber has the bound tau delta, L1 the slope 1 (its prox) or a huge one (its gradient).
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

template <typename A>
static inline Vector<A> absolute(Vector<A> x) {
  if constexpr (sizeof(A) == 4) {
    return (Vector<A>)((Vector<int32_t>)x & 0x7FFFFFFF);
  } else {
    return (Vector<A>)((Vector<int64_t>)x & 0x7FFFFFFFFFFFFFFF);
  }
}

// NaN stays NaN.
template <typename A>
static inline Vector<A> clip(Vector<A> x, Vector<A> bound) {
  x = x < -bound ? -bound : x;
  return x > bound ? bound : x;
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

template <typename T>
static double adam_step(const AdamTensor& tensor, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int kStep = kLanes<A>;
  T* param = static_cast<T*>(tensor.param);
  const T* grad = static_cast<const T*>(tensor.grad);
  A* exp_avg = static_cast<A*>(tensor.exp_avg);
  A* exp_avg_sq = static_cast<A*>(tensor.exp_avg_sq);
  A* max_exp_avg_sq = static_cast<A*>(tensor.max_exp_avg_sq);
  A* master = static_cast<A*>(tensor.master);
  const T* reference = static_cast<const T*>(tensor.reference);
  const Vector<A> grad_factor = broadcast(static_cast<A>(tensor.grad_factor));
  const Vector<A> beta1 = broadcast(static_cast<A>(tensor.beta1));
  const Vector<A> rest1 = broadcast(static_cast<A>(1.0 - tensor.beta1));
  const Vector<A> beta2 = broadcast(static_cast<A>(tensor.beta2));
  const Vector<A> rest2 = broadcast(static_cast<A>(1.0 - tensor.beta2));
  const Vector<A> eps = broadcast(static_cast<A>(tensor.eps));
  const Vector<A> step_size = broadcast(static_cast<A>(tensor.step_size));
  const Vector<A> inverse_root = broadcast(static_cast<A>(tensor.inverse_root));
  const Vector<A> slope = broadcast(static_cast<A>(tensor.slope));
  const Vector<A> bound = broadcast(static_cast<A>(tensor.bound));
  const bool decay_first = tensor.decay_first;

  alignas(64) uint32_t words[kDecayBlock];
  Vector<A> total{};
  for (int64_t block = begin; block < end; block += kDecayBlock) {
    const int64_t block_end = end - block < kDecayBlock ? end : block + kDecayBlock;
    if (tensor.stochastic) {
      philox_block(tensor.random, static_cast<uint64_t>(block) / kWordsPerCall, words);
    }
    for (int64_t e = block; e < block_end; e += kStep) {
      const int64_t count = block_end - e;
      const Vector<A> g = load_wide(grad + e, count) * grad_factor;
      const Vector<A> m = load_wide(exp_avg + e, count) * beta1 + g * rest1;
      const Vector<A> v = load_wide(exp_avg_sq + e, count) * beta2 + g * g * rest2;
      store_lanes(exp_avg + e, m, count);
      store_lanes(exp_avg_sq + e, v, count);
      Vector<A> largest = v;
      if (max_exp_avg_sq != nullptr) {
        const Vector<A> before = load_wide(max_exp_avg_sq + e, count);
        largest = before > v ? before : v;
        store_lanes(max_exp_avg_sq + e, largest, count);
      }
      const Vector<A> update = step_size * m / (square_root(largest) * inverse_root + eps);
      const Vector<A> x =
          master == nullptr ? load_wide(param + e, count) : load_wide(master + e, count);
      const Vector<A> base = decay_first ? x : x - update;
      const Vector<A> offset = reference == nullptr ? base : base - load_wide(reference + e, count);
      Vector<A> decay = clip<A>(slope * offset, bound);
      if (tensor.mask != nullptr) {
        decay = where_mask<A>(tensor.mask + e, decay, count);
      }
      const Vector<A> next = decay_first ? (base - decay) - update : base - decay;
      if (master != nullptr) {
        store_lanes(master + e, next, count);
      }
      if (tensor.stochastic) {
        store_randomly(param + e, next, count, words + (e - block));
      } else {
        store_lanes(param + e, next, count);
      }
      total += count < kStep ? first_lanes<A>(absolute<A>(next), count) : absolute<A>(next);
    }
  }
  return static_cast<double>(sum_lanes<A>(total));
}

template <typename T>
static constexpr DecayKernels decay_kernels() {
  return {adam_step<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
