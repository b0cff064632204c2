// Search in a codebook without the matrix of distances.
//
// |z - e_j|^2 = |z|^2 - 2 s_j with s_j = z . e_j - |e_j|^2 / 2, so the nearest code has the largest
// s_j. A tile begins with -|e_j|^2 / 2 and adds the product. Tokens and codes are taken relative to
// the mean code: distances do not depend on it, and the rounding of s_j does.
//
// A draw of j != i with probability softmax_j(-|e_j - e_i|^2 / tau) is the largest
// v_j = slope s_j + weight G_j with G_j = -log(-log u_j), where slope / weight = 2 / tau (Gumbel).
// Since 1 - u <= -log u, code j beats the best one so far only if
//
//   1 - u_j < exp(-(best - slope s_j) / weight),
//
// which costs one exponential in place of two logarithms and holds some log(K) times a token.
//
// A group of panels is read by all rows of a block before the next one: the panels stay in the
// first-level cache, the rows in the second.
#pragma once

#include "elementary.h"
#include "gemm.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

// Panels whose words one Philox block holds.
template <typename A>
constexpr int64_t kGroupPanels = kBlockElements / kPanelWidth<A>;

// sums[d] += sum over rows [begin, end) of the codebook.
template <typename T>
static void add_codes(const void* codebook, int64_t features, int64_t begin, int64_t end,
                      double* sums) {
  const T* row = static_cast<const T*>(codebook) + begin * features;
  for (int64_t r = begin; r < end; ++r, row += features) {
    for (int64_t d = 0; d < features; ++d) {
      sums[d] += widen(row[d]);
    }
  }
}

// Panels [begin, end) of codes relative to the mean, and -|e_j|^2 / 2; -inf in the padding.
template <typename T>
static void pack_codes(const CodeSearch& search, const void* codebook, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const A* centre = static_cast<const A*>(search.centre);
  A* panels = static_cast<A*>(search.panels);
  A* offset = static_cast<A*>(search.offset);
  pack_rows(static_cast<const T*>(codebook), search.codes, search.features, begin, end, panels);
  for (int64_t panel = begin; panel < end; ++panel) {
    A* packed = panels + panel * search.features * kPanelWidth<A>;
    A half_norm[kPanelWidth<A>] = {};
    for (int64_t d = 0; d < search.features; ++d, packed += kPanelWidth<A>) {
#pragma omp simd
      for (int j = 0; j < kPanelWidth<A>; ++j) {
        packed[j] -= centre[d];
        half_norm[j] += A(0.5) * packed[j] * packed[j];
      }
    }
    const int64_t filled = panel_columns<A>(panel, search.codes);
    for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
      offset[panel * kPanelWidth<A> + j] = j < filled ? -half_norm[j] : -__builtin_inf();
    }
  }
}

// Whether some lane of two vectors is greater than the same lane of two others.
template <typename A>
static inline __attribute__((always_inline)) bool any_greater(const Vector<A>* left,
                                                              const Vector<A>* right) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return (_mm512_cmp_ps_mask((__m512)left[0], (__m512)right[0], _CMP_GT_OQ) |
            _mm512_cmp_ps_mask((__m512)left[1], (__m512)right[1], _CMP_GT_OQ)) != 0;
  } else {
    return (_mm512_cmp_pd_mask((__m512d)left[0], (__m512d)right[0], _CMP_GT_OQ) |
            _mm512_cmp_pd_mask((__m512d)left[1], (__m512d)right[1], _CMP_GT_OQ)) != 0;
  }
#else
  const auto greater = (left[0] > right[0]) | (left[1] > right[1]);
#if defined(__AVX2__)
  return sizeof(A) == 4 ? _mm256_movemask_ps((__m256)greater) != 0
                        : _mm256_movemask_pd((__m256d)greater) != 0;
#else
  bool any = false;
  for (int j = 0; j < kLanes<A>; ++j) {
    any |= greater[j] != 0;
  }
  return any;
#endif
#endif
}

// What is known of one token: the code that it has (only a draw uses it) and the best one so far.
template <typename A>
struct CodeState {
  A best;
  int64_t code, own;
};

// A token's uniform numbers for the codes of one group of panels, as 1 - u, which is exact.
template <typename A>
static inline void complements(const CodeSearch& search, int64_t place, int64_t group, A* rest) {
  uint32_t words[kBlockElements];
  philox_block({search.seed, static_cast<uint32_t>(place), 0},
               static_cast<uint64_t>(group) * kBlockCalls, words);
#pragma omp simd
  for (int j = 0; j < kBlockElements; ++j) {
    const A u = (static_cast<A>(static_cast<int32_t>(words[j] >> 9)) + A(0.5)) * A(1.0 / 8388608.0);
    rest[j] = A(1) - u;
  }
}

// The codes of one panel in order: of equal ones the first stays.
template <typename A>
static void keep_best(const A* value, int64_t first, CodeState<A>& state) {
  for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
    if (value[j] > state.best) {
      state.best = value[j];
      state.code = first + j;
    }
  }
}

// slope s_j + weight G_j, in place; -inf at the code that the token has.
template <typename A>
static void add_gumbel(const CodeSearch& search, const A* rest, int64_t first, int64_t own,
                       A* value) {
  const A slope = static_cast<A>(search.slope), weight = static_cast<A>(search.weight);
#pragma omp simd
  for (int j = 0; j < kPanelWidth<A>; ++j) {
    value[j] = slope * value[j] - weight * logarithm(-logarithm(A(1) - rest[j]));
  }
  if (own >= first && own < first + kPanelWidth<A>) {
    value[own - first] = -__builtin_inf();
  }
}

// ROWS tokens against one panel; `rest` [ROWS][kBlockElements] is read from `offset` on.
template <typename A, bool DRAW, int ROWS>
static inline void search_panel(const CodeSearch& search, const A* rows, int64_t panel,
                                const A* rest, CodeState<A>* state) {
  constexpr A kLog2e = A(1.44269504088896340736), kSlack = A(1.0001);
  const int64_t first = panel * kPanelWidth<A>;
  const A* offset = static_cast<const A*>(search.offset) + first;
  Tile<A, ROWS, kPanelVectors> tile;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      tile.sum[r][v] = load(offset + v * kLanes<A>);
    }
  }
  tile.accumulate(search.features, rows, search.features, 1,
                  static_cast<const A*>(search.panels) + first * search.features);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    Vector<A> left[kPanelVectors], right[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) {
      if constexpr (DRAW) {
        const A scale = kLog2e / static_cast<A>(search.weight);
        const Vector<A> lead = static_cast<A>(search.slope) * tile.sum[r][v] - state[r].best;
        left[v] = kSlack * exp2(lead * scale);
        right[v] = load(rest + r * kBlockElements + v * kLanes<A>);
      } else {
        left[v] = tile.sum[r][v];
        right[v] = broadcast(state[r].best);
      }
    }
    if (__builtin_expect(any_greater<A>(left, right), 0)) {
      A value[kPanelWidth<A>];
      for (int v = 0; v < kPanelVectors; ++v) {
        store(value + v * kLanes<A>, tile.sum[r][v]);
      }
      if constexpr (DRAW) {
        add_gumbel(search, rest + r * kBlockElements, first, state[r].own, value);
      }
      keep_best(value, first, state[r]);
    }
  }
}

// Token number `token` relative to the mean code; false if it is not finite.
template <typename T>
static bool centre_token(const CodeSearch& search, int64_t token, Accumulate<T>* row) {
  using A = Accumulate<T>;
  const T* from = static_cast<const T*>(search.tokens) + token * search.features;
  const A* centre = static_cast<const A*>(search.centre);
  A probe = 0;
#pragma omp simd reduction(+ : probe)
  for (int64_t d = 0; d < search.features; ++d) {
    row[d] = widen(from[d]) - centre[d];
    probe += row[d] * A(0);
  }
  return probe == A(0);
}

// Tokens [begin, end), at most kCodeRows; `scratch` holds so many rows of features.
template <typename T, bool DRAW>
static void search_codes(const CodeSearch& search, int64_t begin, int64_t end, void* scratch) {
  using A = Accumulate<T>;
  A* rows = static_cast<A*>(scratch);
  CodeState<A> state[kCodeRows];
  bool finite[kCodeRows];
  const int64_t count = end - begin;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = DRAW ? search.places[begin + r] : begin + r;
    const int64_t token = DRAW ? search.index[place] : place;
    finite[r] = centre_token<T>(search, token, rows + r * search.features);
    state[r] = {static_cast<A>(-__builtin_inf()), 0, token};
  }
  const int64_t panels = (search.codes + kPanelWidth<A> - 1) / kPanelWidth<A>;
  for (int64_t group = 0; group * kGroupPanels<A> < panels; ++group) {
    const int64_t first = group * kGroupPanels<A>;
    const int64_t last = first + kGroupPanels<A> < panels ? first + kGroupPanels<A> : panels;
    for_row_tiles(0, count, [&](auto height, int64_t r) {
      constexpr int kRows = decltype(height)::value;
      A rest[DRAW ? kRows * kBlockElements : 1];
      if constexpr (DRAW) {
        for (int m = 0; m < kRows; ++m) {
          complements(search, search.places[begin + r + m], group, rest + m * kBlockElements);
        }
      }
      for (int64_t panel = first; panel < last; ++panel) {
        search_panel<A, DRAW, kRows>(search, rows + r * search.features, panel,
                                     DRAW ? rest + (panel - first) * kPanelWidth<A> : rest,
                                     state + r);
      }
    });
  }
  for (int64_t r = 0; r < count; ++r) {
    search.found[DRAW ? search.places[begin + r] : begin + r] = finite[r] ? state[r].code : 0;
  }
}

template <typename T>
static constexpr CodeSearchKernels code_search_kernels() {
  return {kPanelWidth<Accumulate<T>>, add_codes<T>, pack_codes<T>, search_codes<T, false>,
          search_codes<T, true>};
}

}  // namespace regularizers::REGULARIZERS_ISA
