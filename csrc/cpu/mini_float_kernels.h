// Numbers to small floating-point codes and back.
//
//   s = |x| 2^(b - kMiddleBias)      the format's exponents, moved where A has room on both sides
//   code = round(bits(s) >> drop)    from the first normal number on: the fields of A are the
//   fields
//                                    of the code, with more mantissa; a carry runs into the
//                                    exponent
//   code = round(s / step)           below, by adding the number whose last place is one step
//
// Both round half to the even code. A scale of two powers of two, applied one after the other,
// reaches every bias: what overflows or underflows in between is beyond the format anyway.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

template <typename A>
struct FloatLayout;
template <>
struct FloatLayout<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct FloatLayout<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
};
template <typename A>
using BitsOf = typename FloatLayout<A>::Bits;

// The exponent fields of a small format, up to seven bits, lie inside those of float with this
// bias. With eight they do not, and A is double.
constexpr int kMiddleBias = 63;

// 2^exponent, a normal number.
template <typename A>
static inline A power_of_two(int64_t exponent) {
  const BitsOf<A> bits = static_cast<BitsOf<A>>(exponent + FloatLayout<A>::kBias)
                         << FloatLayout<A>::kMantissa;
  A value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A format's numbers in every lane. `from_middle`: the scale takes kMiddleBias to the format's
// bias, else back.
template <typename A>
struct MiniFloatLanes {
  using I = BitsOf<A>;
  static constexpr I kMagnitude = static_cast<I>(~(I(1) << (8 * sizeof(I) - 1)));
  static constexpr I kInfinity = (I(2) * FloatLayout<A>::kBias + 1) << FloatLayout<A>::kMantissa;

  int drop;        // mantissa bits that A has and the format has not
  I offset;        // bits of A that stand for the field 0
  I first_normal;  // bits of the least number with a field above 0
  A magic;         // its last place is one step of the numbers with field 0
  I magic_bits;
  A first_scale, second_scale;

  MiniFloatLanes(const MiniFloatFormat& format, bool from_middle) {
    using Layout = FloatLayout<A>;
    drop = Layout::kMantissa - static_cast<int>(format.man_bits);
    offset = I(Layout::kBias - kMiddleBias) << Layout::kMantissa;
    first_normal = offset + (I(1) << Layout::kMantissa);
    magic = power_of_two<A>(Layout::kMantissa + 1 - kMiddleBias - format.man_bits);
    std::memcpy(&magic_bits, &magic, sizeof(magic));
    int64_t shift = format.bias - kMiddleBias;
    shift = from_middle ? -shift : shift;
    // Each half is a normal number of float. What the limit cuts off has left the format, or float.
    const int64_t limit = sizeof(A) == 4 ? 252 : 1024;
    shift = shift > limit ? limit : (shift < -limit ? -limit : shift);
    first_scale = power_of_two<A>(shift / 2);
    second_scale = power_of_two<A>(shift - shift / 2);
  }
};

// Codes of one vector; `bad` gathers the lanes that are not finite.
template <typename A, bool has_nan>
static inline Vector<BitsOf<A>> encode_vector(const MiniFloatFormat& format,
                                              const MiniFloatLanes<A>& lanes, Vector<A> x,
                                              Vector<BitsOf<A>>& bad) {
  using I = BitsOf<A>;
  using V = Vector<I>;
  const V bits = (V)x, size = bits & MiniFloatLanes<A>::kMagnitude;
  const Vector<A> middle = (Vector<A>)size * lanes.first_scale * lanes.second_scale;
  const V shifted = (V)middle - lanes.offset;
  const I half_less = (I(1) << (lanes.drop - 1)) - 1;
  const V normal = (shifted + half_less + ((shifted >> lanes.drop) & 1)) >> lanes.drop;
  const V low = (V)(middle + lanes.magic) - lanes.magic_bits;
  V code = (V)middle < lanes.first_normal ? low : normal;
  const V largest = V{} + static_cast<I>(format.largest);
  code = code < largest ? code : largest;
  const V negative = bits < 0;
  if (format.is_signed) {
    code |= negative & (I(1) << (format.bits - 1));
  } else {
    code &= ~negative;
  }
  if (has_nan) {
    const V nan = size > MiniFloatLanes<A>::kInfinity;
    const V sign = format.is_signed ? code & (I(1) << (format.bits - 1)) : V{};
    code = nan ? sign | (largest + 1) : code;
  } else {
    bad |= size >= MiniFloatLanes<A>::kInfinity;
  }
  return code;
}

template <typename A>
static inline Vector<A> decode_vector(const MiniFloatFormat& format, const MiniFloatLanes<A>& lanes,
                                      Vector<BitsOf<A>> code) {
  using I = BitsOf<A>;
  using V = Vector<I>;
  const I top = format.is_signed ? I(1) << (format.bits - 1) : 0;
  const V magnitude = top == 0 ? code : code & (top - 1);
  const Vector<A> normal = (Vector<A>)((magnitude << lanes.drop) + lanes.offset);
  const Vector<A> low = (Vector<A>)(magnitude + lanes.magic_bits) - lanes.magic;
  const V field_0 = magnitude < (I(1) << format.man_bits);
  V bits = (V)((field_0 ? low : normal) * lanes.first_scale * lanes.second_scale);
  if (format.has_inf_nan) {
    constexpr I kInfinity = MiniFloatLanes<A>::kInfinity;
    const V infinity = V{} + kInfinity,
            nan = infinity + (I(1) << (lanes.drop + format.man_bits - 1));
    const I largest = static_cast<I>(format.largest);
    bits = magnitude == largest ? infinity : bits;
    bits = magnitude > largest ? nan : bits;
  }
  const V negative = top == 0 ? V{} : (V)((code & top) != 0);
  return (Vector<A>)(bits | (negative & (I(1) << (8 * sizeof(I) - 1))));
}

// kMiniFloatBlock numbers from and to memory, in the type that is computed in.
template <typename T, typename A>
static inline void read_block(const T* from, A* to) {
  if constexpr (sizeof(A) == sizeof(Accumulate<T>)) {
    for (int64_t j = 0; j < kMiniFloatBlock; j += kLanes<A>) {
      store(to + j, load_wide(from + j));
    }
  } else {
    for (int64_t j = 0; j < kMiniFloatBlock; ++j) {
      to[j] = static_cast<A>(widen(from[j]));
    }
  }
}
template <typename T, typename A>
static inline void write_block(const A* from, T* to) {
  if constexpr (sizeof(A) == sizeof(Accumulate<T>)) {
    for (int64_t j = 0; j < kMiniFloatBlock; j += kLanes<A>) {
      store_whole(to + j, load(from + j));
    }
  } else {
    for (int64_t j = 0; j < kMiniFloatBlock; ++j) {
      to[j] = narrow<T>(static_cast<Accumulate<T>>(from[j]));
    }
  }
}

// Eight codes, one a byte, to the low 8 * width bits of a word, and back: neighbours are joined
// three times.
static inline uint64_t join_codes(uint64_t codes, int width) {
  constexpr uint64_t kBytes = 0x00FF00FF00FF00FF, kPairs = 0x0000FFFF0000FFFF;
  codes = (codes & kBytes) | ((codes & ~kBytes) >> (8 - width));
  codes = (codes & kPairs) | ((codes & ~kPairs) >> (16 - 2 * width));
  return (codes & 0xFFFFFFFF) | ((codes >> 32) << (4 * width));
}
static inline uint64_t part_codes(uint64_t word, int width) {
  const uint64_t quad = (uint64_t{1} << (4 * width)) - 1;
  const uint64_t pair = ((uint64_t{1} << (2 * width)) - 1) * 0x0000000100000001;
  const uint64_t one = ((uint64_t{1} << width) - 1) * 0x0001000100010001;
  word = (word & quad) | (((word >> (4 * width)) & quad) << 32);
  word = (word & pair) | (((word >> (2 * width)) & pair) << 16);
  return (word & one) | (((word >> width) & one) << 8);
}

constexpr int kBlockWords = kMiniFloatBlock / 8;

template <typename T, typename A, bool has_nan>
static bool encode_numbers(const MiniFloatFormat& format, const T* x, int64_t count, uint8_t* to) {
  using I = BitsOf<A>;
  const MiniFloatLanes<A> lanes(format, false);
  const int width = static_cast<int>(format.stored_bits);
  Vector<I> bad{};
  for (int64_t first = 0; first < count; first += kMiniFloatBlock) {
    alignas(64) A wide[kMiniFloatBlock];
    alignas(64) I codes[kMiniFloatBlock];
    alignas(64) uint8_t bytes[kMiniFloatBlock];
    const int64_t inside = count - first < kMiniFloatBlock ? count - first : kMiniFloatBlock;
    if (inside == kMiniFloatBlock) {
      read_block(x + first, wide);
    } else {
      T rest[kMiniFloatBlock] = {};
      std::memcpy(rest, x + first, static_cast<size_t>(inside) * sizeof(T));
      read_block(rest, wide);
    }
    for (int64_t j = 0; j < kMiniFloatBlock; j += kLanes<A>) {
      store(codes + j, encode_vector<A, has_nan>(format, lanes, load(wide + j), bad));
    }
    const bool direct = width == 8 && inside == kMiniFloatBlock;
    uint8_t* narrow_codes = direct ? to + first : bytes;
    for (int64_t j = 0; j < kMiniFloatBlock; ++j) {
      narrow_codes[j] = static_cast<uint8_t>(codes[j]);
    }
    if (width == 8) {
      if (!direct) {
        std::memcpy(to + first, bytes, static_cast<size_t>(inside));
      }
      continue;
    }
    uint64_t words[kBlockWords];
    std::memcpy(words, bytes, sizeof(bytes));
    for (int i = 0; i < kBlockWords; ++i) {
      words[i] = join_codes(words[i], width);
    }
    // Each word overwrites what its predecessor left above its own bytes.
    uint8_t joined[kMiniFloatBlock + 8];
    for (int i = 0; i < kBlockWords; ++i) {
      std::memcpy(joined + i * width, words + i, 8);
    }
    std::memcpy(to + first * width / 8, joined, static_cast<size_t>((inside * width + 7) / 8));
  }
  I found = 0;
  for (int j = 0; j < kLanes<A>; ++j) {
    found |= bad[j];
  }
  return found == 0;
}

template <typename T, typename A>
static bool decode_codes(const MiniFloatFormat& format, const uint8_t* from, int64_t count, T* to) {
  using I = BitsOf<A>;
  const MiniFloatLanes<A> lanes(format, true);
  const int width = static_cast<int>(format.stored_bits);
  uint8_t seen = 0;
  for (int64_t first = 0; first < count; first += kMiniFloatBlock) {
    alignas(64) A wide[kMiniFloatBlock];
    alignas(64) I codes[kMiniFloatBlock];
    alignas(64) uint8_t bytes[kMiniFloatBlock + 8] = {};
    const int64_t inside = count - first < kMiniFloatBlock ? count - first : kMiniFloatBlock;
    const uint8_t* source = bytes;
    if (width == 8 && inside == kMiniFloatBlock) {
      source = from + first;
    } else {
      std::memcpy(bytes, from + first * width / 8, static_cast<size_t>((inside * width + 7) / 8));
    }
    if (width < 8) {
      uint64_t words[kBlockWords];
      for (int i = 0; i < kBlockWords; ++i) {
        std::memcpy(words + i, bytes + i * width, 8);
      }
      for (int i = 0; i < kBlockWords; ++i) {
        words[i] = part_codes(words[i], width);
      }
      std::memcpy(bytes, words, sizeof(words));
    }
    for (int64_t j = 0; j < kMiniFloatBlock; ++j) {
      seen |= source[j];
      codes[j] = source[j];
    }
    for (int64_t j = 0; j < kMiniFloatBlock; j += kLanes<A>) {
      store(wide + j, decode_vector<A>(format, lanes, load(codes + j)));
    }
    if (inside == kMiniFloatBlock) {
      write_block(wide, to + first);
    } else {
      T rest[kMiniFloatBlock];
      write_block(wide, rest);
      std::memcpy(to + first, rest, static_cast<size_t>(inside) * sizeof(T));
    }
  }
  return (seen >> format.bits) == 0;
}

template <typename T>
static bool mini_float_encode(const MiniFloatFormat& format, const void* x, int64_t count,
                              uint8_t* to) {
  using A = Accumulate<T>;
  const T* from = static_cast<const T*>(x);
  if (format.exp_bits > 7) {  // unsigned, with no mantissa and so without NaN
    return encode_numbers<T, double, false>(format, from, count, to);
  }
  return format.has_inf_nan ? encode_numbers<T, A, true>(format, from, count, to)
                            : encode_numbers<T, A, false>(format, from, count, to);
}

template <typename T>
static bool mini_float_decode(const MiniFloatFormat& format, const uint8_t* from, int64_t count,
                              void* to) {
  if (format.exp_bits > 7) {
    return decode_codes<T, double>(format, from, count, static_cast<T*>(to));
  }
  return decode_codes<T, Accumulate<T>>(format, from, count, static_cast<T*>(to));
}

// The largest finite |x|; the order of sizes is that of their bits.
template <typename T>
static double mini_float_largest(const void* x_, int64_t count) {
  using A = Accumulate<T>;
  using V = Vector<BitsOf<A>>;
  const T* x = static_cast<const T*>(x_);
  V largest[4] = {};
  const auto take = [](V& most, Vector<A> value) {
    const V size = (V)value & MiniFloatLanes<A>::kMagnitude;
    const V finite = size < MiniFloatLanes<A>::kInfinity ? size : V{};
    most = finite > most ? finite : most;
  };
  int64_t j = 0;
  for (; j + 4 * kLanes<A> <= count; j += 4 * kLanes<A>) {
    for (int part = 0; part < 4; ++part) {
      take(largest[part], load_wide(x + j + part * kLanes<A>));
    }
  }
  for (; j < count; j += kLanes<A>) {
    take(largest[0], load_wide(x + j, count - j));
  }
  BitsOf<A> most = 0;
  for (const V& part : largest) {
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      most = part[lane] > most ? part[lane] : most;
    }
  }
  A value;
  std::memcpy(&value, &most, sizeof(value));
  return static_cast<double>(value);
}

template <typename T>
static constexpr MiniFloatKernels mini_float_kernels() {
  return {mini_float_largest<T>, mini_float_encode<T>, mini_float_decode<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
