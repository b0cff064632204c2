// The inner product tile from which the fused products are built: rows of a strided operand against
// a packed panel.
//
//   accumulator[m][lane] += sum over k of a[m * a_row + k * a_step] * panel[k][lane]
//
// A panel row is kPanelWidth elements; a tile may read fewer vectors of it. The strided side needs
// no packing, so one tile serves z = h W^T (a = operand), dx = g W (a = g) and dW = g^T h (a = g,
// transposed by its strides).
#pragma once

#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

// Tile height and width that keep all accumulators, the panel row and one broadcast in registers: 8
// x 2 of 32 registers, 6 x 2 of 16; two 512-bit vectors a row run at 97 % of the peak of a Zen 4
// core.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanelVectors = 2;

template <typename A>
constexpr int kPanelWidth = kPanelVectors * kLanes<A>;

template <int N>
struct Constant {
  static constexpr int value = N;
};

template <typename A, int ROWS, int VECTORS>
struct Tile {
  Vector<A> sum[ROWS][VECTORS];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        sum[m][v] = Vector<A>{};
      }
    }
  }

  inline __attribute__((always_inline)) void store_rows(A* to, int64_t stride) const {
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        store(to + m * stride + v * kLanes<A>, sum[m][v]);
      }
    }
  }

  inline __attribute__((always_inline)) void accumulate(int64_t depth, const A* a, int64_t a_row,
                                                        int64_t a_step, const A* panel) {
    for (int64_t k = 0; k < depth; ++k) {
      Vector<A> b[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        b[v] = load(panel + k * kPanelWidth<A> + v * kLanes<A>);
      }
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const Vector<A> value = broadcast(a[m * a_row + k * a_step]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          sum[m][v] += value * b[v];
        }
      }
    }
  }
};

// Calls body(Constant<height>{}, first row) with tiles that cover `rows` rows: full ones, then
// halves of a tile.
template <int ROWS = kTileRows, typename Body>
static inline void for_row_tiles(int64_t begin, int64_t end, const Body& body) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) {
    body(Constant<ROWS>{}, row);
  }
  if constexpr (ROWS > 1) {
    if (row < end) {
      for_row_tiles<ROWS / 2>(row, end, body);
    }
  }
}

// How many vectors hold the columns of panel number `panel` of `columns` columns.
template <typename A>
static inline int panel_vectors(int64_t panel, int64_t columns) {
  const int64_t left = columns - panel * kPanelWidth<A>;
  return left >= kPanelWidth<A> ? kPanelVectors
                                : static_cast<int>((left + kLanes<A> - 1) / kLanes<A>);
}

// Calls body(Constant<vectors>{}) for a width known at run time.
template <int VECTORS = kPanelVectors, typename Body>
static inline void with_vectors(int vectors, const Body& body) {
  if constexpr (VECTORS > 1) {
    if (vectors < VECTORS) {
      with_vectors<VECTORS - 1>(vectors, body);
      return;
    }
  }
  body(Constant<VECTORS>{});
}

// How many of a panel's columns exist; the rest of the panel is zero.
template <typename A>
static inline int64_t panel_columns(int64_t panel, int64_t columns) {
  const int64_t left = columns - panel * kPanelWidth<A>;
  return left < kPanelWidth<A> ? left : kPanelWidth<A>;
}

// Panels [begin, end) of the columns of a row-major matrix: packed[panel][row][lane].
template <typename T>
static void pack_columns(const T* matrix, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                         Accumulate<T>* packed) {
  using A = Accumulate<T>;
  packed += begin * rows * kPanelWidth<A>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t filled = panel_columns<A>(panel, columns);
    const T* source = matrix + panel * kPanelWidth<A>;
    for (int64_t r = 0; r < rows; ++r, source += columns, packed += kPanelWidth<A>) {
      for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
        packed[j] = j < filled ? widen(source[j]) : A(0);
      }
    }
  }
}

// Panels [begin, end) of the rows of a row-major matrix, transposed: packed[panel][column][lane].
// Columns go in short blocks, so that both sides stay in cache.
template <typename T>
static void pack_rows(const T* matrix, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                      Accumulate<T>* packed) {
  using A = Accumulate<T>;
  constexpr int64_t kBlock = 64;
  packed += begin * columns * kPanelWidth<A>;
  for (int64_t panel = begin; panel < end; ++panel, packed += columns * kPanelWidth<A>) {
    const int64_t first = panel * kPanelWidth<A>;
    const int64_t filled = panel_columns<A>(panel, rows);
    for (int64_t block = 0; block < columns; block += kBlock) {
      const int64_t stop = block + kBlock < columns ? block + kBlock : columns;
      for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
        const T* row = matrix + (first + j) * columns;
        for (int64_t d = block; d < stop; ++d) {
          packed[d * kPanelWidth<A> + j] = j < filled ? widen(row[d]) : A(0);
        }
      }
    }
  }
}

// row[j] += values[j] for j < count, which is a whole number of vectors except in the last panel.
template <typename A, int VECTORS>
static inline void add_to_row(A* row, const Vector<A> (&values)[VECTORS], int64_t count) {
  for (int v = 0; v < VECTORS; ++v, row += kLanes<A>, count -= kLanes<A>) {
    if (count >= kLanes<A>) {
      store(row, load(row) + values[v]);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        row[j] += values[v][j];
      }
    }
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
