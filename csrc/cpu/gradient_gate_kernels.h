// Gradient dropout in one pass: read two gradients (and what is gated, where it is another tensor),
// make the random words, write one.
//   P = (1 + sign(a) (a + b) / (|a| + |b| + eps)) / 2      1 where that is no number
//   y = value where U < P, else (1 - strength) value       U = upper 24 bits of the word / 2^24
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

constexpr int64_t kGateBlock = kBlockElements;

// Zeros behind the last element, so that every block is whole.
template <typename T>
static inline const T* whole_block(const void* data, int64_t first, int64_t inside, T* buffer) {
  const T* from = static_cast<const T*>(data) + first;
  if (inside == kGateBlock) {
    return from;
  }
  std::memset(buffer, 0, kGateBlock * sizeof(T));
  std::memcpy(buffer, from, static_cast<size_t>(inside) * sizeof(T));
  return buffer;
}

template <typename T>
static void gradient_gate(const GradientGate& gate, const void* value_, const void* task_,
                          const void* reg_, void* to_, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Vector<A> zero{}, one = broadcast(A(1)), eps = broadcast(static_cast<A>(gate.eps));
  const bool drops = gate.strength >= 1.0;
  const Vector<A> rest = broadcast(static_cast<A>(1.0 - gate.strength));
  alignas(64) uint32_t words[kGateBlock];
  alignas(64) A uniform[kGateBlock];
  T value_rest[kGateBlock], task_rest[kGateBlock], reg_rest[kGateBlock], to_rest[kGateBlock];
  for (int64_t first = begin; first < end; first += kGateBlock) {
    const int64_t inside = end - first < kGateBlock ? end - first : kGateBlock;
    const T* task = whole_block(task_, first, inside, task_rest);
    const T* reg = whole_block(reg_, first, inside, reg_rest);
    const T* value = value_ == task_ ? task : whole_block(value_, first, inside, value_rest);
    T* to = inside == kGateBlock ? static_cast<T*>(to_) + first : to_rest;
    philox_block(gate.random, static_cast<uint64_t>(first) / kWordsPerCall, words);
    for (int64_t j = 0; j < kGateBlock; ++j) {
      uniform[j] = static_cast<A>(static_cast<int32_t>(words[j] >> 8)) * A(0x1p-24);
    }
    for (int64_t j = 0; j < kGateBlock; j += kLanes<A>) {
      const Vector<A> a = load_wide(task + j), b = load_wide(reg + j), v = load_wide(value + j);
      // sign(a) b, with 0 for a = 0; NaN goes through the sum.
      const Vector<A> toward = a > zero ? b : (a < zero ? -b : a * b);
      const Vector<A> size = a < zero ? -a : a, other = b < zero ? -b : b;
      Vector<A> agreement = (toward + size) / (size + other + eps);
      agreement = agreement != agreement ? one : agreement;
      const Vector<A> keep = agreement * A(0.5) + A(0.5);
      store_whole(to + j, load(uniform + j) < keep ? v : (drops ? zero : v * rest));
    }
    if (inside < kGateBlock) {
      std::memcpy(static_cast<T*>(to_) + first, to_rest, static_cast<size_t>(inside) * sizeof(T));
    }
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
