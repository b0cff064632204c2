// Sorting of columns of numbers together with their places, in two ways.
//
// A network takes several columns of float side by side, one a lane, and no branch: it is the
// faster one by far up to some thousand rows, where its log^2 steps and the cache catch up.
// Anything else is sorted by the bytes of the key, a column at a time. Both order equal numbers by
// their place, -0 before 0, and NaN outside of all numbers.
#pragma once

#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

constexpr int64_t kMostRowsOfNetwork = 8192;
constexpr int kSortLanes = kLanes<int64_t>;

// A number as an integer of the same order: of negative numbers all bits but the sign turn over.
static inline int32_t ordered(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
static inline int64_t ordered(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF);
}
static inline float number(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7FFFFFFF);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
static inline double number(int64_t key) {
  const int64_t bits = key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF);
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// STEPS consecutive steps of a bitonic merge, the last of them between rows `stride` apart: groups
// of 2^STEPS rows go through them in registers. Runs of `block` rows come out ascending and
// descending in turn; a descending one is walked from its end.
template <int STEPS>
static void merge_steps(int64_t* items, int64_t rows, int64_t block, int64_t stride) {
  constexpr int kCount = 1 << STEPS;
  for (int64_t outer = 0; outer < rows; outer += kCount * stride) {
    const bool descending = outer & block;
    const int64_t step = (descending ? -stride : stride) * kSortLanes;
    int64_t* first = items + (descending ? outer + (kCount - 1) * stride : outer) * kSortLanes;
    for (int64_t inner = 0; inner < stride; ++inner, first += kSortLanes) {
      Vector<int64_t> item[kCount];
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) {
        item[m] = load(first + m * step);
      }
#pragma GCC unroll 3
      for (int half = kCount / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) {
          if ((m & half) == 0) {
            const Vector<int64_t> low = item[m], high = item[m + half];
            item[m] = low < high ? low : high;
            item[m + half] = low < high ? high : low;
          }
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) {
        store(first + m * step, item[m]);
      }
    }
  }
}

// Sorts every lane of items [rows][kSortLanes]; rows is a power of two.
static void sort_network(int64_t* items, int64_t rows) {
  for (int64_t block = 2; block <= rows; block *= 2) {
    int64_t stride = block / 2;
    for (; stride >= 4; stride /= 8) {
      merge_steps<3>(items, rows, block, stride / 4);
    }
    if (stride == 2) {
      merge_steps<2>(items, rows, block, 1);
    } else if (stride == 1) {
      merge_steps<1>(items, rows, block, 1);
    }
  }
}

static inline int64_t network_rows(int64_t rows) {
  int64_t padded = 1;
  while (padded < rows) {
    padded *= 2;
  }
  return padded;
}

template <typename A>
struct Ranked;
template <>
struct Ranked<float> {
  int32_t key, place;
};
template <>
struct Ranked<double> {
  int64_t key, place;
};

// Sorts by key with a counting sort for each byte, lowest first. `spare` is of the same size; the
// result is what is returned, one of the two.
template <typename A>
static Ranked<A>* sort_by_bytes(Ranked<A>* items, Ranked<A>* spare, int64_t count) {
  constexpr int kBytes = sizeof(A), kValues = 256;
  const auto digit = [](const Ranked<A>& item, int byte) {
    const int value = static_cast<int>(item.key >> (8 * byte) & 0xFF);
    return byte == kBytes - 1 ? value ^ 0x80 : value;  // the sign: negative keys first
  };
  int64_t starts[kBytes][kValues] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int byte = 0; byte < kBytes; ++byte) {
      ++starts[byte][digit(items[i], byte)];
    }
  }
  for (int byte = 0; byte < kBytes; ++byte) {
    int64_t* start = starts[byte];
    if (start[digit(items[0], byte)] == count) {
      continue;  // one value in all keys
    }
    int64_t total = 0;
    for (int value = 0; value < kValues; ++value) {
      const int64_t here = start[value];
      start[value] = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      spare[start[digit(items[i], byte)]++] = items[i];
    }
    Ranked<A>* const sorted = spare;
    spare = items;
    items = sorted;
  }
  return items;
}

}  // namespace regularizers::REGULARIZERS_ISA
