// Sinkhorn sweeps over points, without a cost matrix: the exponents come from a small matrix
// product, tile by tile, and live for one stripe of rows.
//
// In base 2, with unit = log2(e) / epsilon and shift_j = g_j + epsilon log b_j, the exponent
// unit (alpha_i + shift_j - C_ij) is, for
//
//   s |x - y|^2      x'_i . y_j + row_i + column_j        x' = 2 s unit x, |.|^2 in row and column
//   s (1 - cos)      the same                             x' = s unit x / |x|, y / |y|
//   s |x - y|        unit (alpha_i + shift_j) - slope sqrt(x'_i . y_j + row_i + column_j),
//                                                         x' = -2 x, slope = s unit
//
// A stripe of kTileRows rows keeps its exponentials K_ij in the second-level cache: row sums first,
// then the columns accumulate a_i u_i K_ij from the same numbers, as in sinkhorn_kernels.h. The
// anchor alpha_i is the row's last potential, which makes every sum of a row near 1; where the sum
// overflows or is lost, and in the first sweep, the row's largest exponent is found first.
#pragma once

#include "elementary.h"
#include "gemm.h"
#include "sinkhorn_kernels.h"

namespace regularizers::REGULARIZERS_ISA {

// The exponents of ROWS rows and one panel of columns.
template <typename A, PointCost COST, int ROWS>
struct Exponents {
  Tile<A, ROWS, kPanelVectors> tile;
  // kEuclidean: 1 / distance, 0 at distance 0
  inline __attribute__((always_inline)) Vector<A> inverse_distance(int r, int v) const {
    const Vector<A> square = tile.sum[r][v], zero{};
    return square > zero ? A{1} / square_root(square) : zero;
  }

  inline __attribute__((always_inline)) void compute(const SinkhornPoints& points, int64_t row,
                                                     int64_t panel) {
    const A* row_term = static_cast<const A*>(points.row_term) + row;
    const A* column_term = static_cast<const A*>(points.column_term) + panel * kPanelWidth<A>;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        tile.sum[r][v] = load(column_term + v * kLanes<A>) + row_term[r];
      }
    }
    tile.accumulate(points.features, static_cast<const A*>(points.x) + row * points.features,
                    points.features, 1,
                    static_cast<const A*>(points.y) + panel * points.features * kPanelWidth<A>);
  }

  // Exponent of (r, v) with the row's anchor (in base 2) added.
  inline __attribute__((always_inline)) Vector<A> exponent(const SinkhornPoints& points, int r,
                                                           int v, int64_t panel, A anchor) const {
    if constexpr (COST == kEuclidean) {
      const Vector<A> zero{}, square = tile.sum[r][v];
      const Vector<A> distance = square_root(square > zero ? square : zero);
      const A* shift = static_cast<const A*>(points.column_shift) + panel * kPanelWidth<A>;
      return (load(shift + v * kLanes<A>) + anchor) - static_cast<A>(points.slope) * distance;
    } else {
      return tile.sum[r][v] + anchor;
    }
  }
};

template <typename A, PointCost COST, int ROWS>
static inline void find_anchors(const SinkhornSweep& sweep, const SinkhornPoints& points,
                                int64_t row) {
  const Vector<A> lowest = broadcast(-kInfinity<A>);
  Vector<A> top[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    top[r] = lowest;
  }
  for (int64_t panel = 0; panel * kPanelWidth<A> < sweep.padded_columns; ++panel) {
    Exponents<A, COST, ROWS> exponents;
    exponents.compute(points, row, panel);
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vector<A> value = exponents.exponent(points, r, v, panel, A{0});
        top[r] = value > top[r] ? value : top[r];
      }
    }
  }
  A* alpha = static_cast<A*>(sweep.alpha);
  for (int r = 0; r < ROWS; ++r) {
    const A largest = max_lanes<A>(top[r]);
    alpha[row + r] = largest > -kInfinity<A> ? static_cast<A>(-largest / points.unit) : A{0};
  }
}

// Exponentials of a stripe into scratch [ROWS][padded]; row sums.
template <typename A, PointCost COST, int ROWS>
static inline void exponentiate_stripe(const SinkhornSweep& sweep, const SinkhornPoints& points,
                                       int64_t row, A* scratch, A* sums) {
  const A* alpha = static_cast<const A*>(sweep.alpha);
  A anchor[ROWS];
  Vector<A> sum[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    anchor[r] = static_cast<A>(alpha[row + r] * points.unit);
    sum[r] = Vector<A>{};
  }
  for (int64_t panel = 0; panel * kPanelWidth<A> < sweep.padded_columns; ++panel) {
    Exponents<A, COST, ROWS> exponents;
    exponents.compute(points, row, panel);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vector<A> value = exp2(exponents.exponent(points, r, v, panel, anchor[r]));
        sum[r] += value;
        store(scratch + r * sweep.padded_columns + panel * kPanelWidth<A> + v * kLanes<A>, value);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = sum_lanes<A>(sum[r]);
  }
}

template <typename A, PointCost COST, int ROWS>
static inline void points_stripe(const SinkhornSweep& sweep, const SinkhornPoints& points,
                                 const RowUpdate<A>& update, int64_t row, A* partial, A* scratch,
                                 double* residual) {
  A* alpha = static_cast<A*>(sweep.alpha);
  A sums[ROWS];
  bool good = !sweep.cold;
  if (good) {
    for (int r = 0; r < ROWS; ++r) {
      alpha[row + r] = static_cast<A>(sweep.f_old[row + r]);
    }
    exponentiate_stripe<A, COST, ROWS>(sweep, points, row, scratch, sums);
    for (int r = 0; r < ROWS; ++r) {
      good = good && ((sums[r] > A(1e-20) && sums[r] < A(1e20)) || !(update.a[row + r] > 0));
    }
  }
  if (!good) {
    find_anchors<A, COST, ROWS>(sweep, points, row);
    exponentiate_stripe<A, COST, ROWS>(sweep, points, row, scratch, sums);
  }
  const A* kernel[ROWS];
  A weight[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    kernel[r] = scratch + r * sweep.padded_columns;
    if (!(update.a[row + r] > 0)) {  // whatever the point is, it has no say
      clear(scratch + r * sweep.padded_columns, sweep.padded_columns);
      sums[r] = 1;
    }
  }
  update.template stripe<ROWS>(sums, row, sweep.f_old, weight, residual);
  if (partial != nullptr) {
    accumulate_columns<A, ROWS>(kernel, weight, partial, sweep.padded_columns);
  }
}

template <typename A, PointCost COST>
static void points_sweep_of(const SinkhornSweep& sweep, const SinkhornPoints& points, int64_t begin,
                            int64_t end, A* partial, A* scratch, double* residual) {
  if (partial != nullptr) {
    clear(partial, sweep.padded_columns);
  }
  const RowUpdate<A> update(sweep);
  const auto stripe = [&](auto height, int64_t row) {
    points_stripe<A, COST, decltype(height)::value>(sweep, points, update, row, partial, scratch,
                                                    residual);
  };
  // Fewer rows where a full tile of them would leave the second-level cache.
  constexpr int64_t kCacheBytes = 1 << 20;
  if (kTileRows * sweep.padded_columns * static_cast<int64_t>(sizeof(A)) <= kCacheBytes) {
    for_row_tiles(begin, end, stripe);
  } else {
    for_row_tiles<kTileRows / 2>(begin, end, stripe);
  }
}

template <typename A>
static void sinkhorn_points_sweep(const SinkhornSweep& sweep, const SinkhornPoints& points,
                                  int64_t begin, int64_t end, void* partial, void* scratch,
                                  double* residual) {
  const auto run = [&](auto cost) {
    points_sweep_of<A, static_cast<PointCost>(decltype(cost)::value)>(
        sweep, points, begin, end, static_cast<A*>(partial), static_cast<A*>(scratch), residual);
  };
  if (points.cost == kEuclidean) {
    run(Constant<kEuclidean>{});
  } else {
    run(Constant<kSquaredEuclidean>{});
  }
}

template <typename A, PointCost COST, int ROWS>
static inline void apply_stripe(const SinkhornSweep& sweep, const SinkhornPoints& points,
                                const A* v, int64_t v_panels, bool over_distance, int64_t row,
                                A* product, A* row_sums, A* scratch) {
  constexpr int64_t kStep = kApplyColumns / kPanelWidth<A>;  // panels
  const A* alpha = static_cast<const A*>(sweep.alpha);
  const int64_t panels = sweep.padded_columns / kPanelWidth<A>;
  const int64_t stride = v_panels * kPanelWidth<A>;
  Vector<A> sum[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    sum[r] = Vector<A>{};
    clear(product + (row + r) * stride, stride);
  }
  for (int64_t first = 0; first < panels; first += kStep) {
    const int64_t last = first + kStep < panels ? first + kStep : panels;
    for (int64_t panel = first; panel < last; ++panel) {
      Exponents<A, COST, ROWS> exponents;
      exponents.compute(points, row, panel);
      for (int r = 0; r < ROWS; ++r) {
        const A anchor = static_cast<A>(alpha[row + r] * points.unit);
        for (int w = 0; w < kPanelVectors; ++w) {
          Vector<A> value = exp2(exponents.exponent(points, r, w, panel, anchor));
          if constexpr (COST == kEuclidean) {
            if (over_distance) {
              value *= exponents.inverse_distance(r, w);
            }
          }
          sum[r] += value;
          store(scratch + r * kApplyColumns + (panel - first) * kPanelWidth<A> + w * kLanes<A>,
                value);
        }
      }
    }
    for (int64_t panel = 0; panel < v_panels; ++panel) {
      Tile<A, ROWS, kPanelVectors> tile;
      for (int r = 0; r < ROWS; ++r) {
        for (int w = 0; w < kPanelVectors; ++w) {
          tile.sum[r][w] =
              load(product + (row + r) * stride + panel * kPanelWidth<A> + w * kLanes<A>);
        }
      }
      tile.accumulate((last - first) * kPanelWidth<A>, scratch, kApplyColumns, 1,
                      v + (panel * panels + first) * kPanelWidth<A> * kPanelWidth<A>);
      for (int r = 0; r < ROWS; ++r) {
        for (int w = 0; w < kPanelVectors; ++w) {
          store(product + (row + r) * stride + panel * kPanelWidth<A> + w * kLanes<A>,
                tile.sum[r][w]);
        }
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    row_sums[row + r] = sum_lanes<A>(sum[r]);
  }
}

template <typename A>
static void sinkhorn_points_apply(const SinkhornSweep& sweep, const SinkhornPoints& points,
                                  const void* v, int64_t v_panels, bool over_distance,
                                  int64_t begin, int64_t end, void* product, void* row_sums,
                                  void* scratch) {
  const auto run = [&](auto cost) {
    for_row_tiles(begin, end, [&](auto height, int64_t row) {
      apply_stripe<A, static_cast<PointCost>(decltype(cost)::value), decltype(height)::value>(
          sweep, points, static_cast<const A*>(v), v_panels, over_distance, row,
          static_cast<A*>(product), static_cast<A*>(row_sums), static_cast<A*>(scratch));
    });
  };
  if (points.cost == kEuclidean) {
    run(Constant<kEuclidean>{});
  } else {
    run(Constant<kSquaredEuclidean>{});
  }
}

template <typename A>
static constexpr SinkhornPointsKernels sinkhorn_points_kernels() {
  return {kPanelWidth<A>, kTileRows, sinkhorn_points_sweep<A>, sinkhorn_points_apply<A>};
}

}  // namespace regularizers::REGULARIZERS_ISA
