// Elementary functions in forms that GCC vectorises: exponentials, logarithms, sine and cosine,
// roots.
#pragma once

#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

// exp by x = n ln 2 + r, |r| <= ln(2) / 2, and a Taylor polynomial in r: the truncation error at
// degree 7 is below 6e-9 (float), at degree 13 below 4e-17 (double). inf, -inf, NaN and the flush
// to zero below the smallest normal number come out right. libm's own vector exp is reached by GCC
// only under -ffast-math, which would break those.
static inline float exponential(float x) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x > 89.0f ? 89.0f : (x < -88.0f ? -88.0f : x);
  const float shifted = clamped * kLog2e + kMagic;
  const float n = shifted - kMagic;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float sum = 1.0f / 5040.0f;
  sum = sum * r + 1.0f / 720.0f;
  sum = sum * r + 1.0f / 120.0f;
  sum = sum * r + 1.0f / 24.0f;
  sum = sum * r + 1.0f / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  // The low mantissa bits of `shifted` hold n. 2^n is applied in two halves: n reaches 128, which
  // no exponent holds.
  const int32_t power = static_cast<int32_t>(bits - 0x4B400000u);
  const uint32_t first_bits = static_cast<uint32_t>((power >> 1) + 127) << 23;
  const uint32_t second_bits = static_cast<uint32_t>(power - (power >> 1) + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  const float result = sum * first * second;
  return x < -87.33654f ? 0.0f : result;
}

static inline double exponential(double x) {
  constexpr double kLog2e = 1.4426950408889634074, kLn2High = 6.93147180369123816490e-01;
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  const double clamped = x > 710.0 ? 710.0 : (x < -709.0 ? -709.0 : x);
  const double shifted = clamped * kLog2e + kMagic;
  const double n = shifted - kMagic;
  const double r = (clamped - n * kLn2High) - n * kLn2Low;
  double sum = 1.0 / 6227020800.0;
  sum = sum * r + 1.0 / 479001600.0;
  sum = sum * r + 1.0 / 39916800.0;
  sum = sum * r + 1.0 / 3628800.0;
  sum = sum * r + 1.0 / 362880.0;
  sum = sum * r + 1.0 / 40320.0;
  sum = sum * r + 1.0 / 5040.0;
  sum = sum * r + 1.0 / 720.0;
  sum = sum * r + 1.0 / 120.0;
  sum = sum * r + 1.0 / 24.0;
  sum = sum * r + 1.0 / 6.0;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int64_t power = static_cast<int64_t>(bits - 0x4338000000000000ull);
  const uint64_t first_bits = static_cast<uint64_t>((power >> 1) + 1023) << 52;
  const uint64_t second_bits = static_cast<uint64_t>(power - (power >> 1) + 1023) << 52;
  double first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  const double result = sum * first * second;
  return x < -708.39641853226408 ? 0.0 : result;
}

// 1 where |x| <= bound, 0 elsewhere, by integers: around a selection between numbers GCC builds
// branches, which keep a loop from being vectorised.
static inline float within(float bound, float x) {
  int32_t bits, bound_bits, one = 0x3F800000;
  std::memcpy(&bits, &x, sizeof(bits));
  std::memcpy(&bound_bits, &bound, sizeof(bound_bits));
  one &= -static_cast<int32_t>((bits & 0x7FFFFFFF) <= bound_bits);
  float result;
  std::memcpy(&result, &one, sizeof(result));
  return result;
}
static inline double within(double bound, double x) {
  int64_t bits, bound_bits, one = 0x3FF0000000000000;
  std::memcpy(&bits, &x, sizeof(bits));
  std::memcpy(&bound_bits, &bound, sizeof(bound_bits));
  one &= -static_cast<int64_t>((bits & 0x7FFFFFFFFFFFFFFF) <= bound_bits);
  double result;
  std::memcpy(&result, &one, sizeof(result));
  return result;
}

// Sine and cosine by x = n pi / 2 + r, |r| <= pi / 4, and Taylor polynomials in r: truncation
// errors below 2e-9 (float) and 5e-17 (double). The parts of pi / 2 are so short that their
// products with n are exact, with or without fused multiplication, for |x| up to 1e4 (float) and
// 1e6 (double); beyond, digits of the phase are lost one by one, as in x itself. Where n is no
// integer any more, r is taken to 0, so that results lie in [-1, 1] for any finite x. Infinities
// and NaN give NaN.
static inline void sine_cosine(float x, float* sine, float* cosine) {
  constexpr float kTwoOverPi = 0.636619772367581343f, kMagic = 12582912.0f;
  constexpr float kHigh = 1.5703125f, kMiddle = 4.8375129699707031e-4f,
                  kLow = 7.5497899548918822e-8f;
  const float shifted = x * kTwoOverPi + kMagic;
  const float n = shifted - kMagic;
  float r = ((x - n * kHigh) - n * kMiddle) - n * kLow;
  r *= within(1.0f, r);
  const float z = r * r;
  const float odd =
      r +
      r * z * (-1.0f / 6.0f + z * (1.0f / 120.0f + z * (-1.0f / 5040.0f + z * (1.0f / 362880.0f))));
  const float even =
      1.0f +
      z * (-0.5f + z * (1.0f / 24.0f +
                        z * (-1.0f / 720.0f + z * (1.0f / 40320.0f - z * (1.0f / 3628800.0f)))));
  uint32_t quadrant, odd_bits, even_bits;  // the low mantissa bits of `shifted` hold n
  std::memcpy(&quadrant, &shifted, sizeof(quadrant));
  std::memcpy(&odd_bits, &odd, sizeof(odd_bits));
  std::memcpy(&even_bits, &even, sizeof(even_bits));
  const uint32_t swapped = (odd_bits ^ even_bits) & (uint32_t(0) - (quadrant & 1u));
  const uint32_t sine_bits = odd_bits ^ swapped ^ ((quadrant & 2u) << 30);
  const uint32_t cosine_bits = even_bits ^ swapped ^ (((quadrant + 1u) & 2u) << 30);
  std::memcpy(sine, &sine_bits, sizeof(sine_bits));
  std::memcpy(cosine, &cosine_bits, sizeof(cosine_bits));
}

static inline void sine_cosine(double x, double* sine, double* cosine) {
  constexpr double kTwoOverPi = 0.63661977236758134308, kMagic = 6755399441055744.0;
  constexpr double kHigh = 1.57079632673412561417, kMiddle = 6.07710050630396597660e-11,
                   kLow = 2.02226624879595063154e-21;
  const double shifted = x * kTwoOverPi + kMagic;
  const double n = shifted - kMagic;
  double r = ((x - n * kHigh) - n * kMiddle) - n * kLow;
  r *= within(1.0, r);
  const double z = r * r;
  double odd = -1.0 / 1307674368000.0;
  odd = odd * z + 1.0 / 6227020800.0;
  odd = odd * z - 1.0 / 39916800.0;
  odd = odd * z + 1.0 / 362880.0;
  odd = odd * z - 1.0 / 5040.0;
  odd = odd * z + 1.0 / 120.0;
  odd = odd * z - 1.0 / 6.0;
  odd = r + r * z * odd;
  double even = 1.0 / 20922789888000.0;
  even = even * z - 1.0 / 87178291200.0;
  even = even * z + 1.0 / 479001600.0;
  even = even * z - 1.0 / 3628800.0;
  even = even * z + 1.0 / 40320.0;
  even = even * z - 1.0 / 720.0;
  even = even * z + 1.0 / 24.0;
  even = even * z - 0.5;
  even = even * z + 1.0;
  uint64_t quadrant, odd_bits, even_bits;
  std::memcpy(&quadrant, &shifted, sizeof(quadrant));
  std::memcpy(&odd_bits, &odd, sizeof(odd_bits));
  std::memcpy(&even_bits, &even, sizeof(even_bits));
  const uint64_t swapped = (odd_bits ^ even_bits) & (uint64_t(0) - (quadrant & 1u));
  const uint64_t sine_bits = odd_bits ^ swapped ^ ((quadrant & 2u) << 62);
  const uint64_t cosine_bits = even_bits ^ swapped ^ (((quadrant + 1u) & 2u) << 62);
  std::memcpy(sine, &sine_bits, sizeof(sine_bits));
  std::memcpy(cosine, &cosine_bits, sizeof(cosine_bits));
}

// 2^t, elementwise: t = n + r with |r| <= 1/2, a polynomial in r (Chebyshev interpolation; relative
// error 1e-7 at degree 5 for float, 1e-17 at degree 11 for double), then the exponent. Exactly 0
// below the smallest subnormal number and at -inf, inf above the largest number, NaN for NaN (and
// NaN or inf for inf).
static inline Vector<float> exp2_polynomial(Vector<float> r) {
  Vector<float> sum = broadcast(0.0013390863364666f);
  sum = sum * r + 0.0096760319183221f;
  sum = sum * r + 0.0555035711421908f;
  sum = sum * r + 0.240221074853083f;
  sum = sum * r + 0.693147188026229f;
  return sum * r + 1.0000000754548972f;
}

static inline Vector<double> exp2_polynomial(Vector<double> r) {
  Vector<double> sum = broadcast(4.455817908336064493e-10);
  sum = sum * r + 7.0741942972885210056e-9;
  sum = sum * r + 1.0178057087733941105e-7;
  sum = sum * r + 1.3215432535912376166e-6;
  sum = sum * r + 1.5252733841556772589e-5;
  sum = sum * r + 1.5403530463724354209e-4;
  sum = sum * r + 1.3333558146406470697e-3;
  sum = sum * r + 9.6181291075872566681e-3;
  sum = sum * r + 5.5504108664821627039e-2;
  sum = sum * r + 0.24022650695910159567;
  sum = sum * r + 0.69314718055994530925;
  return sum * r + 1.0;
}

#if defined(__AVX512F__)
static inline Vector<float> exp2(Vector<float> t) {
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-152.0f), (__m512)t);  // keeps a NaN of t
  const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector<float> power = exp2_polynomial((Vector<float>)_mm512_sub_ps(bounded, n));
  return (Vector<float>)_mm512_scalef_ps((__m512)power, n);
}

static inline Vector<double> exp2(Vector<double> t) {
  const __m512d bounded = _mm512_max_pd(_mm512_set1_pd(-1076.0), (__m512d)t);
  const __m512d n = _mm512_roundscale_pd(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector<double> power = exp2_polynomial((Vector<double>)_mm512_sub_pd(bounded, n));
  return (Vector<double>)_mm512_scalef_pd((__m512d)power, n);
}
#else
// Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits. 2^n is applied in two
// halves, since n reaches 128 (float), which no exponent holds.
static inline Vector<float> exp2(Vector<float> t) {
  const Vector<float> low = broadcast(-152.0f), high = broadcast(129.0f);
  Vector<float> bounded = t < low ? low : t;
  bounded = bounded > high ? high : bounded;
  const Vector<float> shifted = bounded + 12582912.0f;
  const Vector<float> power = exp2_polynomial(bounded - (shifted - 12582912.0f));
  const Vector<int32_t> n = (Vector<int32_t>)shifted - 0x4B400000, half = n >> 1;
  return power * (Vector<float>)((half + 127) << 23) * (Vector<float>)((n - half + 127) << 23);
}

static inline Vector<double> exp2(Vector<double> t) {
  const Vector<double> low = broadcast(-1076.0), high = broadcast(1025.0);
  Vector<double> bounded = t < low ? low : t;
  bounded = bounded > high ? high : bounded;
  const Vector<double> shifted = bounded + 6755399441055744.0;
  const Vector<double> power = exp2_polynomial(bounded - (shifted - 6755399441055744.0));
  const Vector<int64_t> n = (Vector<int64_t>)shifted - 0x4338000000000000;
  // No 64-bit arithmetic shift before AVX-512: n fits 32 bits, so halve it as a shifted sum.
  const Vector<int64_t> half = ((n + 2048) >> 1) - 1024;
  return power * (Vector<double>)((half + 1023) << 52) * (Vector<double>)((n - half + 1023) << 52);
}
#endif

// The natural logarithm of a positive normal number by x = 2^n m, m in [sqrt(1/2), sqrt(2)), and
// log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172, as a series. Not for 0, subnormal
// numbers, inf or NaN.
static inline float logarithm(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const int32_t n = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  bits -= static_cast<uint32_t>(n) << 23;
  float m;
  std::memcpy(&m, &bits, sizeof(m));
  const float s = (m - 1.0f) / (m + 1.0f), square = s * s;
  float sum = 2.0f / 9.0f;
  sum = sum * square + 2.0f / 7.0f;
  sum = sum * square + 2.0f / 5.0f;
  sum = sum * square + 2.0f / 3.0f;
  sum = sum * square + 2.0f;
  return static_cast<float>(n) * 0.693147180559945309f + sum * s;
}

static inline double logarithm(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const int64_t n = static_cast<int64_t>(bits - 0x3FE6A09E667F3BCDull) >> 52;
  bits -= static_cast<uint64_t>(n) << 52;
  double m;
  std::memcpy(&m, &bits, sizeof(m));
  const double s = (m - 1.0) / (m + 1.0), square = s * s;
  double sum = 2.0 / 21.0;
  for (int k = 19; k >= 1; k -= 2) {
    sum = sum * square + 2.0 / k;
  }
  return static_cast<double>(n) * 0.69314718055994530942 + sum * s;
}

static inline Vector<float> square_root(Vector<float> x) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_sqrt_ps((__m256)x);
#else
  for (int j = 0; j < kLanes<float>; ++j) {
    x[j] = __builtin_sqrtf(x[j]);
  }
  return x;
#endif
}

static inline Vector<double> square_root(Vector<double> x) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Vector<double>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int j = 0; j < kLanes<double>; ++j) {
    x[j] = __builtin_sqrt(x[j]);
  }
  return x;
#endif
}

}  // namespace regularizers::REGULARIZERS_ISA
