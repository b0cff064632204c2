// Short vectors and conversions for the kernels, compiled once for each instruction set. Raw
// pointers only, everything inside namespace REGULARIZERS_ISA: a function shared with another
// instruction set would be kept once by the linker, and a processor without AVX-512 would meet it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../philox.h"

namespace regularizers::REGULARIZERS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(alignof(T))));
};

template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Integers as wide as a number.
template <typename A>
struct LaneIntegerOf {
  using type = int32_t;
};
template <>
struct LaneIntegerOf<double> {
  using type = int64_t;
};
template <typename A>
using LaneInteger = typename LaneIntegerOf<A>::type;

template <typename T>
static inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <typename T>
static inline void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

template <typename T>
static inline Vector<T> broadcast(T value) {
  return value -
         Vector<T>{};  // GCC splats a scalar that meets a vector; x - 0 keeps the sign of zero
}

// Mask bytes 0x00 and 0xFF widened to lanes of zeros and ones. GCC 12 takes __builtin_convertvector
// of bytes apart, hence the intrinsics.
static inline Vector<int32_t> widen_mask(const uint8_t* mask, float) {
#if defined(__AVX512F__)
  return (Vector<int32_t>)_mm512_cvtepi8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask)));
#elif defined(__AVX2__)
  return (Vector<int32_t>)_mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
#else
  Vector<int32_t> lanes;
  for (int j = 0; j < kLanes<float>; ++j) {
    lanes[j] = static_cast<int8_t>(mask[j]);
  }
  return lanes;
#endif
}

static inline Vector<int64_t> widen_mask(const uint8_t* mask, double) {
#if defined(__AVX512F__)
  return (Vector<int64_t>)_mm512_cvtepi8_epi64(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
#elif defined(__AVX2__)
  return (Vector<int64_t>)_mm256_cvtepi8_epi64(_mm_loadu_si32(mask));
#else
  Vector<int64_t> lanes;
  for (int j = 0; j < kLanes<double>; ++j) {
    lanes[j] = static_cast<int8_t>(mask[j]);
  }
  return lanes;
#endif
}

// The value where the mask byte of a lane is 0xFF, zero where it is 0x00.
template <typename A>
static inline Vector<A> keep_lanes(const uint8_t* mask, Vector<A> value) {
  const auto lanes = widen_mask(mask, A{});
  return (Vector<A>)((decltype(lanes))value & lanes);
}

// Low 32 bits of every 64-bit lane times a 32-bit constant, all 64 bits of the product: one
// instruction where there is one, which GCC does not find by itself.
static inline Vector<uint64_t> multiply_wide(Vector<uint64_t> lanes, uint32_t factor) {
#if defined(__AVX512F__)
  return (Vector<uint64_t>)_mm512_mul_epu32((__m512i)lanes, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)lanes, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (Vector<uint64_t>)_mm_mul_epu32((__m128i)lanes, _mm_set1_epi64x(factor));
#else
  return (lanes & 0xFFFFFFFFu) * static_cast<uint64_t>(factor);
#endif
}

// Storage types that are not computed in: bfloat16 and float16 are widened to float on load.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using NativeHalf = __fp16;  // g++ knows _Float16 there from version 13 on
#else
using NativeHalf = _Float16;
#endif

template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
static inline float widen(float16 value) {
  NativeHalf half;
  std::memcpy(&half, &value, sizeof(half));
  return static_cast<float>(half);
}

// Rounding to the storage type, to nearest even.
template <typename T>
static inline T narrow(Accumulate<T> value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline double narrow<double>(double value) {
  return value;
}
template <>
inline bfloat16 narrow<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded >> 16)};
}
template <>
inline float16 narrow<float16>(float value) {
  const NativeHalf half = static_cast<NativeHalf>(value);
  float16 result;
  std::memcpy(&result, &half, sizeof(half));
  return result;
}

// kLanes consecutive elements, widened.
static inline Vector<float> load_wide(const float* from) { return load(from); }
static inline Vector<double> load_wide(const double* from) { return load(from); }
static inline Vector<float> load_wide(const bfloat16* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  Vector<float> lanes;
  for (int j = 0; j < kLanes<float>; ++j) {
    lanes[j] = widen(from[j]);
  }
  return lanes;
#endif
}
static inline Vector<float> load_wide(const float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vector<float> lanes;
  for (int j = 0; j < kLanes<float>; ++j) {
    lanes[j] = widen(from[j]);
  }
  return lanes;
#endif
}

// The first `count` of them, the rest 0; nothing is read past them.
template <typename T>
static inline Vector<Accumulate<T>> load_wide(const T* from, int64_t count) {
  if (count >= kLanes<Accumulate<T>>) {
    return load_wide(from);
  }
  T lanes[kLanes<Accumulate<T>>] = {};
  for (int64_t j = 0; j < count; ++j) {
    lanes[j] = from[j];
  }
  return load_wide(lanes);
}

// Stores the first `count` lanes, rounded to the storage type.
template <typename T>
static inline void store_narrow(T* to, Vector<Accumulate<T>> value, int64_t count) {
  for (int64_t j = 0; j < (count < kLanes<Accumulate<T>> ? count : kLanes<Accumulate<T>>); ++j) {
    to[j] = narrow<T>(value[j]);
  }
}

// Stores all lanes, rounded to the storage type.
static inline void store_whole(float* to, Vector<float> value) { store(to, value); }
static inline void store_whole(double* to, Vector<double> value) { store(to, value); }
static inline void store_whole(bfloat16* to, Vector<float> value) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)value;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
  const __m512i high =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
#else
  store_narrow(to, value, kLanes<float>);
#endif
}
static inline void store_whole(float16* to, Vector<float> value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  store_narrow(to, value, kLanes<float>);
#endif
}

// Sum and maximum of the lanes, by halves.
template <typename A>
static inline A sum_lanes(Vector<A> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return _mm512_reduce_add_ps((__m512)value);
  } else {
    return _mm512_reduce_add_pd((__m512d)value);
  }
#else
  A lanes[kLanes<A>];
  store(lanes, value);
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j) {
      lanes[j] += lanes[j + half];
    }
  }
  return lanes[0];
#endif
}

template <typename A>
static inline A max_lanes(Vector<A> value) {
  A largest = value[0];
  for (int j = 1; j < kLanes<A>; ++j) {
    largest = value[j] > largest ? value[j] : largest;
  }
  return largest;
}

// Philox words for kBlockElements consecutive elements (kBlockCalls calls, the first is `call`), in
// element order. A counter word lives in the low half of a 64-bit lane. The high half may hold
// anything: multiply_wide does not read it, so a round is two products, two shifts and four
// exclusive ors, with no masking.
constexpr int kBlockCalls = 32;
constexpr int kBlockElements = kBlockCalls * kWordsPerCall;

static inline void philox_block(const PhiloxStream& source, uint64_t call, uint32_t* words) {
  constexpr int kCalls = kLanes<uint64_t>;
  constexpr int kGroups =
      kBlockCalls / kCalls;  // independent chains, to cover the latency of the products
  Vector<uint64_t> c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  Vector<uint64_t> lane;
  for (int j = 0; j < kCalls; ++j) {
    lane[j] = static_cast<uint64_t>(j);
  }
  for (int g = 0; g < kGroups; ++g) {
    const Vector<uint64_t> counter = lane + (call + static_cast<uint64_t>(g * kCalls));
    c0[g] = counter;
    c1[g] = counter >> 32;
    c2[g] = broadcast<uint64_t>(source.stream);
    c3[g] = broadcast<uint64_t>(source.step);
  }
  uint32_t key0 = static_cast<uint32_t>(source.seed),
           key1 = static_cast<uint32_t>(source.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      const Vector<uint64_t> product0 = multiply_wide(c0[g], kPhiloxMultiplier0);
      const Vector<uint64_t> product2 = multiply_wide(c2[g], kPhiloxMultiplier2);
      c0[g] = (product2 >> 32) ^ c1[g] ^ static_cast<uint64_t>(key0);
      c1[g] = product2;
      c2[g] = (product0 >> 32) ^ c3[g] ^ static_cast<uint64_t>(key1);
      c3[g] = product0;
    }
    key0 += kPhiloxKeyBump0;
    key1 += kPhiloxKeyBump1;
  }
  // Words 0 and 1 of a call share a lane, 2 and 3 another; then the lanes of the two interleave.
  Vector<uint64_t> low_half, high_half;
  for (int j = 0; j < kCalls; ++j) {
    low_half[j] = static_cast<uint64_t>(j / 2 + (j % 2) * kCalls);
    high_half[j] = static_cast<uint64_t>(kCalls / 2 + j / 2 + (j % 2) * kCalls);
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g, words += 4 * kCalls) {
    const Vector<uint64_t> first = (c0[g] & 0xFFFFFFFFu) | (c1[g] << 32);
    const Vector<uint64_t> second = (c2[g] & 0xFFFFFFFFu) | (c3[g] << 32);
    store(words, (Vector<uint32_t>)__builtin_shuffle(first, second, low_half));
    store(words + 2 * kCalls, (Vector<uint32_t>)__builtin_shuffle(first, second, high_half));
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
