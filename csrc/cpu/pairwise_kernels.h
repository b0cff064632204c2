// Log-sum-exp over pairs of points, and its gradients, by blocks: no array of all pairs.
//
// In base 2, a pair of row i and column j has the score
//
//   e_ij = unit d(x_i, y_j) + bias_j,   unit = scale log2(e),
//
// d the inner product, |x_i|^2 + |y_j|^2 - 2 x_i . y_j or its root. A block of d is one small
// product that stays in the second-level cache. Forward, every row keeps the largest exponent so
// far and the sum of 2^(exponent - largest). Backward makes the block again, turns d into the
// derivative
//
//   g_ij = w_ij 2^(e_ij - logsumexp_i) grad_logsumexp_i + grad_total_i   (over d_ij for a distance)
//
// in place and multiplies it from both sides: G Y for the rows, G^T X for the columns.
//
// Where the columns are the rows, d is symmetric: a block of pairs (i, j) serves (j, i) too. Then
// the same numbers are also read by columns, with i and j exchanged: a pair has an `own` point,
// whose sums it adds to, and an `other` one; one of the two lies along the lanes.
#pragma once

#include "elementary.h"
#include "gemm.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

// A vector of zeros and ones: which lanes hold.
template <typename A>
using LaneMask = Vector<LaneInteger<A>>;

// A point of a pair: the same one in every lane, or one point a lane.
struct OnePoint {
  int64_t index;
  template <typename T>
  inline Vector<T> of(const void* array) const {
    return broadcast(static_cast<const T*>(array)[index]);
  }
  template <typename I>
  inline Vector<I> places() const {
    return broadcast(static_cast<I>(index));
  }
};
struct LanePoints {
  int64_t index;  // of the first lane
  template <typename T>
  inline Vector<T> of(const void* array) const {
    return load(static_cast<const T*>(array) + index);
  }
  template <typename I>
  inline Vector<I> places() const {
    Vector<I> lane;
    for (int j = 0; j < kLanes<I>; ++j) {
      lane[j] = static_cast<I>(j);
    }
    return lane + static_cast<I>(index);
  }
};

template <typename A>
struct PairScore {
  LaneMask<A> allowed;
  Vector<A> score;     // 0 where not allowed
  Vector<A> exponent;  // score and logarithm of the weight; -inf where not allowed
  Vector<A> factor;    // kFalselyNearLinear: the weight, without `push`
};

// The mean absolute difference of targets [values][padded].
template <typename A, typename Own, typename Other>
static inline __attribute__((always_inline)) Vector<A> target_difference(const Pairwise& pairs,
                                                                         const void* targets,
                                                                         Own own, Other other) {
  const A* target = static_cast<const A*>(targets);
  Vector<A> sum{};
  for (int64_t l = 0; l < pairs.values; ++l, target += pairs.padded) {
    const Vector<A> difference = own.template of<A>(target) - other.template of<A>(target);
    sum += difference < A(0) ? -difference : difference;
  }
  return pairs.values == 1 ? sum : sum / static_cast<A>(pairs.values);
}

template <typename A, PairRule RULE, typename Own, typename Other>
static inline __attribute__((always_inline)) PairScore<A> score_pair(const Pairwise& pairs,
                                                                     Vector<A> distance, Own own,
                                                                     Other other) {
  using I = LaneInteger<A>;
  const Vector<I> own_place = own.template places<I>(), other_place = other.template places<I>();
  // The lanes of the last panel reach beyond the last point.
  LaneMask<A> allowed =
      (other_place < static_cast<I>(pairs.columns)) & (own_place < static_cast<I>(pairs.rows));
  if (pairs.exclude_self) {
    allowed &= own_place != other_place;
  }
  PairScore<A> found{};
  const Vector<A> score = distance * static_cast<A>(pairs.unit) + other.template of<A>(pairs.bias);
  Vector<A> exponent = score;
  if constexpr (RULE == kSameLabel || RULE == kOtherLabel) {
    const LaneMask<A> same =
        own.template of<I>(pairs.row_label) == other.template of<I>(pairs.column_label);
    allowed &= RULE == kSameLabel ? same : ~same;
  } else if constexpr (RULE != kEveryPair) {
    const A window = static_cast<A>(pairs.window);
    const Vector<A> far = target_difference<A>(pairs, pairs.target, own, other);
    if constexpr (RULE == kLabelWindow) {
      allowed &= (LaneMask<A>)(far <= window);
    } else {
      const Vector<A> near = target_difference<A>(pairs, pairs.prediction, own, other);
      allowed &= (LaneMask<A>)(far > window) & (LaneMask<A>)(near <= window);
      if constexpr (RULE == kFalselyNearExp) {
        exponent += static_cast<A>(pairs.push) * far;
      } else {
        found.factor = far;
      }
    }
  }
  found.allowed = allowed;
  found.score = allowed ? score : Vector<A>{};
  found.exponent = allowed ? exponent : broadcast(static_cast<A>(-__builtin_inf()));
  return found;
}

// d of rows [i, last_row) and columns [j, last_column), j at the beginning of a panel, into
// block[row - i][column - j].
template <typename A, PairKind KIND>
static void measure_pairs(const Pairwise& pairs, const PairBlock& at, A* block) {
  const A *x = static_cast<const A*>(pairs.x), *x_norm = static_cast<const A*>(pairs.x_norm);
  const A *y = static_cast<const A*>(pairs.y), *y_norm = static_cast<const A*>(pairs.y_norm);
  for_row_tiles(at.row, at.last_row, [&](auto height, int64_t row) {
    constexpr int kRows = decltype(height)::value;
    for (int64_t column = at.column; column < at.last_column; column += kPanelWidth<A>) {
      Tile<A, kRows, kPanelVectors> tile;
      if constexpr (KIND == kInnerProduct) {
        tile.clear();
      } else {
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kPanelVectors; ++v) {
            tile.sum[r][v] = load(y_norm + column + v * kLanes<A>) + x_norm[row + r];
          }
        }
      }
      tile.accumulate(pairs.features, x + row * pairs.features, pairs.features, 1,
                      y + column * pairs.features);
      if constexpr (KIND != kInnerProduct) {
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kPanelVectors; ++v) {
            const Vector<A> square = tile.sum[r][v];
            const Vector<A> rounded = square < A(0) ? Vector<A>{} : square;  // NaN stays
            tile.sum[r][v] = KIND == kDistance ? square_root(rounded) : rounded;
          }
        }
      }
      tile.store_rows(block + (row - at.row) * pairs.stride + (column - at.column), pairs.stride);
    }
  });
}

template <typename A>
static void measure(const Pairwise& pairs, const PairBlock& at, A* block) {
  if (pairs.kind == kInnerProduct) {
    return measure_pairs<A, kInnerProduct>(pairs, at, block);
  }
  if (pairs.kind == kSquaredDistance) {
    measure_pairs<A, kSquaredDistance>(pairs, at, block);
  } else {
    measure_pairs<A, kDistance>(pairs, at, block);
  }
  // No rounding between a point and itself.
  for (int64_t r = 0; pairs.own && at.row == at.column && r < at.last_row - at.row; ++r) {
    A& self = block[r * pairs.stride + r];
    self -= self;  // NaN stays
  }
}

// What an exponent is taken relative to: the largest one, or 0 where there is none.
template <typename A>
static inline Vector<A> anchor_of(Vector<A> top) {
  return top > static_cast<A>(-__builtin_inf()) ? top : Vector<A>{};
}

// Adds the pairs of a line, whose exponents (and factors) are stored, to a sum relative to `top`.
template <typename A, PairRule RULE>
static inline Vector<A> sum_of_powers(const A* exponents, const A* factors, int64_t count,
                                      Vector<A> anchor) {
  Vector<A> sum{};
  for (int64_t k = 0; k < count; k += kLanes<A>) {
    Vector<A> power = exp2(load(exponents + k) - anchor);
    if constexpr (RULE == kFalselyNearLinear) {
      power *= load(factors + k);
    }
    sum += power;
  }
  return sum;
}

// The sums of one row: its pairs lie along the lanes.
template <typename A, PairRule RULE>
static void reduce_row(const Pairwise& pairs, const PairBlock& at, int64_t row, const A* line,
                       const PairSums& sums) {
  constexpr bool kFactors = RULE == kFalselyNearLinear;
  alignas(64) A exponents[kPairBlock], factors[kFactors ? kPairBlock : 1];
  Vector<A> top = broadcast(static_cast<A>(-__builtin_inf())), total{};
  LaneMask<A> count{};
  int64_t k = 0;
  for (; at.column + k < at.last_column; k += kLanes<A>) {
    const PairScore<A> found =
        score_pair<A, RULE>(pairs, load(line + k), OnePoint{row}, LanePoints{at.column + k});
    store(exponents + k, found.exponent);
    if constexpr (kFactors) {
      store(factors + k, found.allowed ? found.factor : Vector<A>{});
    }
    top = found.exponent > top ? found.exponent : top;
    total += found.score;
    count -= found.allowed;
  }
  A *old_top = static_cast<A*>(sums.top) + row, *sum = static_cast<A*>(sums.sum) + row;
  const A largest = max_lanes<A>(top), new_top = largest > *old_top ? largest : *old_top;
  const Vector<A> anchor = anchor_of<A>(broadcast(new_top));
  const A shrink = exp2(broadcast(*old_top) - anchor)[0];
  *sum = *sum * shrink + sum_lanes<A>(sum_of_powers<A, RULE>(exponents, factors, k, anchor));
  *old_top = new_top;
  static_cast<A*>(sums.total)[row] += sum_lanes<A>(total);
  LaneInteger<A> counted = 0;
  for (int j = 0; j < kLanes<A>; ++j) {
    counted += count[j];
  }
  static_cast<LaneInteger<A>*>(sums.count)[row] += counted;
}

// The sums of a vector of columns as rows: their pairs follow each other down the block.
template <typename A, PairRule RULE>
static void reduce_lanes(const Pairwise& pairs, const PairBlock& at, int64_t column, const A* block,
                         const PairSums& sums) {
  constexpr bool kFactors = RULE == kFalselyNearLinear;
  Vector<A> exponents[kPairBlock], factors[kFactors ? kPairBlock : 1];
  A *top_at = static_cast<A*>(sums.top) + column, *sum_at = static_cast<A*>(sums.sum) + column;
  A* total_at = static_cast<A*>(sums.total) + column;
  LaneInteger<A>* count_at = static_cast<LaneInteger<A>*>(sums.count) + column;
  const Vector<A> old_top = load(top_at);
  Vector<A> top = old_top, total{}, sum{};
  LaneMask<A> count{};
  const int64_t rows = at.last_row - at.row;
  for (int64_t r = 0; r < rows; ++r) {
    const PairScore<A> found =
        score_pair<A, RULE>(pairs, load(block + r * pairs.stride + (column - at.column)),
                            LanePoints{column}, OnePoint{at.row + r});
    exponents[r] = found.exponent;
    if constexpr (kFactors) {
      factors[r] = found.allowed ? found.factor : Vector<A>{};
    }
    top = found.exponent > top ? found.exponent : top;
    total += found.score;
    count -= found.allowed;
  }
  const Vector<A> anchor = anchor_of<A>(top);
  for (int64_t r = 0; r < rows; ++r) {
    const Vector<A> power = exp2(exponents[r] - anchor);
    if constexpr (kFactors) {
      sum += power * factors[r];
    } else {
      sum += power;
    }
  }
  store(sum_at, load(sum_at) * exp2(old_top - anchor) + sum);
  store(top_at, top);
  store(total_at, load(total_at) + total);
  store(count_at, load(count_at) + count);
}

// The pairs of a block: sums of its rows, and with `both` sums of its columns as rows.
template <typename A, PairRule RULE>
static void reduce_block(const Pairwise& pairs, const PairBlock& at, bool both,
                         const PairSums& row_sums, const PairSums& column_sums, A* block) {
  measure(pairs, at, block);
  for (int64_t row = at.row; row < at.last_row; ++row) {
    reduce_row<A, RULE>(pairs, at, row, block + (row - at.row) * pairs.stride, row_sums);
  }
  for (int64_t column = at.column; both && column < at.last_column; column += kLanes<A>) {
    reduce_lanes<A, RULE>(pairs, at, column, block, column_sums);
  }
}

// The derivative of the result in the score of a pair.
template <typename A, PairRule RULE, typename Own, typename Other>
static inline __attribute__((always_inline)) Vector<A> differentiate_pair(
    const Pairwise& pairs, const PairGradient& gradient, Vector<A> distance, Own own, Other other) {
  const PairScore<A> found = score_pair<A, RULE>(pairs, distance, own, other);
  Vector<A> power = exp2(found.exponent - own.template of<A>(gradient.logsumexp));
  if constexpr (RULE == kFalselyNearLinear) {
    power *= found.factor;
  }
  const Vector<A> slope =
      power * own.template of<A>(gradient.grad_logsumexp) + own.template of<A>(gradient.grad_total);
  return found.allowed ? slope : Vector<A>{};
}

template <typename A>
static inline void add_to(void* sums, int64_t index, Vector<A> value) {
  A* at = static_cast<A*>(sums) + index;
  store(at, load(at) + value);
}

// Turns a block of d into derivatives, and adds up their rows and columns. With OWN, a pair also
// counts as the pair of its column and its row.
template <typename A, PairRule RULE, bool OWN>
static void differentiate_block(const Pairwise& pairs, const PairGradient& gradient,
                                const PairBlock& at, bool both, A* block) {
  const bool over_distance = pairs.kind == kDistance;
  for (int64_t row = at.row; row < at.last_row; ++row) {
    A* line = block + (row - at.row) * pairs.stride;
    Vector<A> row_sum{}, row_bias{};
    for (int64_t column = at.column; column < at.last_column; column += kLanes<A>) {
      A* here = line + (column - at.column);
      const Vector<A> distance = load(here);
      const OnePoint one{row};
      const LanePoints lanes{column};
      Vector<A> slope = differentiate_pair<A, RULE>(pairs, gradient, distance, one, lanes);
      add_to<A>(gradient.column_bias, column, slope);
      if constexpr (OWN) {
        const Vector<A> back = differentiate_pair<A, RULE>(pairs, gradient, distance, lanes, one);
        row_bias += back;
        slope += back;
      }
      if (over_distance) {
        slope = distance == A(0) ? Vector<A>{} : slope / distance;
      }
      row_sum += slope;
      if (both) {
        add_to<A>(gradient.column_sum, column, slope);
      }
      store(here, slope);
    }
    static_cast<A*>(gradient.row_sum)[row] += sum_lanes<A>(row_sum);
    if (OWN && both) {
      static_cast<A*>(gradient.row_bias)[row] += sum_lanes<A>(row_bias);
    }
  }
}

// product[row][features] += sum over k < depth of weight(row, k) points[k][features].
template <typename A>
static void add_product(const PairGradient& gradient, int64_t features, const A* weight,
                        int64_t weight_row, int64_t weight_step, int64_t rows, int64_t depth,
                        const A* points, int64_t points_panel, A* product) {
  const int64_t width = gradient.padded_features;
  for_row_tiles(0, rows, [&](auto height, int64_t row) {
    constexpr int kRows = decltype(height)::value;
    for (int64_t panel = 0; panel * kPanelWidth<A> < features; ++panel) {
      with_vectors(panel_vectors<A>(panel, features), [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        A* to = product + row * width + panel * kPanelWidth<A>;
        Tile<A, kRows, kVectors> tile;
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) {
            tile.sum[r][v] = load(to + r * width + v * kLanes<A>);
          }
        }
        tile.accumulate(depth, weight + row * weight_row, weight_row, weight_step,
                        points + panel * points_panel);
        tile.store_rows(to, width);
      });
    }
  });
}

template <typename A, PairRule RULE>
static void backward_block(const Pairwise& pairs, const PairGradient& gradient, const PairBlock& at,
                           bool both, A* block) {
  measure(pairs, at, block);
  if (pairs.own) {
    differentiate_block<A, RULE, true>(pairs, gradient, at, both, block);
  } else {
    differentiate_block<A, RULE, false>(pairs, gradient, at, both, block);
  }
  const int64_t rows = at.last_row - at.row, columns = at.last_column - at.column;
  const int64_t features = pairs.features, width = gradient.padded_features;
  if (gradient.row_product != nullptr) {
    add_product<A>(gradient, features, block, pairs.stride, 1, rows, columns,
                   static_cast<const A*>(gradient.y) + at.column * kPanelWidth<A>,
                   pairs.columns * kPanelWidth<A>,
                   static_cast<A*>(gradient.row_product) + at.row * width);
  }
  if (both && gradient.column_product != nullptr) {
    add_product<A>(gradient, features, block, 1, pairs.stride, columns, rows,
                   static_cast<const A*>(gradient.x) + at.row * kPanelWidth<A>,
                   pairs.rows * kPanelWidth<A>,
                   static_cast<A*>(gradient.column_product) + at.column * width);
  }
}

// Calls body(Constant<rule>{}) for a rule known at run time.
template <int RULE = kEveryPair, typename Body>
static inline void with_rule(PairRule rule, const Body& body) {
  if constexpr (RULE + 1 < kPairRules) {
    if (rule != RULE) {
      with_rule<RULE + 1>(rule, body);
      return;
    }
  }
  body(Constant<RULE>{});
}

template <typename A>
static void pairwise_forward(const Pairwise& pairs, const PairBlock& at, bool both,
                             const PairSums& row_sums, const PairSums& column_sums, void* block) {
  with_rule(pairs.rule, [&](auto rule) {
    reduce_block<A, static_cast<PairRule>(decltype(rule)::value)>(
        pairs, at, both, row_sums, column_sums, static_cast<A*>(block));
  });
}

template <typename A>
static void pairwise_backward(const Pairwise& pairs, const PairGradient& gradient,
                              const PairBlock& at, bool both, void* block) {
  with_rule(pairs.rule, [&](auto rule) {
    backward_block<A, static_cast<PairRule>(decltype(rule)::value)>(pairs, gradient, at, both,
                                                                    static_cast<A*>(block));
  });
}

template <typename A>
static void pairwise_pack_rows(const void* points, int64_t count, int64_t features, int64_t begin,
                               int64_t end, void* packed) {
  pack_rows(static_cast<const A*>(points), count, features, begin, end, static_cast<A*>(packed));
}

template <typename A>
static void pairwise_pack_features(const void* points, int64_t count, int64_t features,
                                   int64_t begin, int64_t end, void* packed) {
  pack_columns(static_cast<const A*>(points), count, features, begin, end, static_cast<A*>(packed));
}

template <typename A>
static constexpr PairwiseKernels pairwise_kernels() {
  return {kPanelWidth<A>, pairwise_pack_rows<A>, pairwise_pack_features<A>, pairwise_forward<A>,
          pairwise_backward<A>};
}

}  // namespace regularizers::REGULARIZERS_ISA
