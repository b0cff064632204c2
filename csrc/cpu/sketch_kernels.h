// Sliced statistics of a batch z [rows, features]: what is made of the columns of p = z A, the
// projections on the slices A [features, slices], without keeping p.
//
//   Epps-Pulley   c_l = mean_n cos(t_l p_n), s_l = mean_n sin(t_l p_n), t_l = l spacing
//                 loss = scale sum over slices of rows sum_l w_l [(c_l - phi_l)^2 + s_l^2]
//                 dloss/dp_n = 2 scale sum_l w_l t_l [s_l cos(t_l p_n) - (c_l - phi_l) sin(t_l
//                 p_n)]
//   quantiles     loss = scale sum over slices and i of (p_(i) - q_i)^2, p_(i) in ascending order
//   both          dz = (dloss/dp) A^T
//
// A block of slices at a time: its projections come from the matrix tile, are turned into their
// gradient where they lie, in the second-level cache, and go through the tile again. Nothing of
// size rows x slices exists.
#pragma once

#include "elementary.h"
#include "gemm.h"
#include "kernels.h"
#include "sort.h"

namespace regularizers::REGULARIZERS_ISA {

// dz += g A^T for the slices [first, first + count) of one view; g_nk lies at g[n * stride + k].
template <typename A>
static void sketch_gradient(const Sketch& sketch, int64_t view, int64_t first, int64_t count,
                            const A* g, int64_t stride) {
  const int64_t group = view / sketch.views_per_group;
  const int64_t panels = (sketch.features + kPanelWidth<A> - 1) / kPanelWidth<A>;
  A* out = static_cast<A*>(sketch.grad_z) + view * sketch.rows * sketch.features;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const A* packed = static_cast<const A*>(sketch.slices_by_feature) +
                      ((group * panels + panel) * sketch.slices + first) * kPanelWidth<A>;
    const int64_t filled = panel_columns<A>(panel, sketch.features);
    with_vectors(panel_vectors<A>(panel, sketch.features), [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      for_row_tiles(0, sketch.rows, [&](auto height, int64_t n) {
        constexpr int kRows = decltype(height)::value;
        Tile<A, kRows, kVectors> tile;
        tile.clear();
        tile.accumulate(count, g + n * stride, stride, 1, packed);
        for (int m = 0; m < kRows; ++m) {
          add_to_row<A, kVectors>(out + (n + m) * sketch.features + panel * kPanelWidth<A>,
                                  tile.sum[m], filled);
        }
      });
    });
  }
}

// A panel of slices: [features][width].
template <typename A>
static inline const A* slice_panel(const Sketch& sketch, int64_t view, int64_t panel) {
  const int64_t panels = (sketch.slices + kPanelWidth<A> - 1) / kPanelWidth<A>;
  return static_cast<const A*>(sketch.slices_by_slice) +
         (view / sketch.views_per_group * panels + panel) * sketch.features * kPanelWidth<A>;
}

// Calls use(first row, rows, tile) with tiles of p = z A that cover rows [begin, end) of one panel
// of slices.
template <typename A, typename Use>
static void projections(const Sketch& sketch, int64_t view, int64_t panel, int64_t begin,
                        int64_t end, const Use& use) {
  const A* z = static_cast<const A*>(sketch.z) + view * sketch.rows * sketch.features;
  const A* packed = slice_panel<A>(sketch, view, panel);
  for_row_tiles(begin, end, [&](auto height, int64_t n) {
    constexpr int kRows = decltype(height)::value;
    Tile<A, kRows, kPanelVectors> tile;
    tile.clear();
    tile.accumulate(sketch.features, z + n * sketch.features, sketch.features, 1, packed);
    use(n, kRows, tile);
  });
}

// Epps-Pulley and characteristic sums.

// Rows whose rotations fit the registers together: cosine and sine of an angle and of its multiple.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRotatedRows = 4;
#else
constexpr int kRotatedRows = 2;
#endif
// Rows that are added up by themselves first, so that the rounding error of a sum over many rows
// stays small.
constexpr int64_t kSumRows = 256;

// cos(spacing p) and sin(spacing p) of rows [begin, end) and one panel of slices: [row][width].
template <typename A>
static void angles(const Characteristic& problem, int64_t view, int64_t panel, int64_t begin,
                   int64_t end, A* cosine, A* sine) {
  const A spacing = static_cast<A>(problem.spacing);
  projections<A>(problem.sketch, view, panel, begin, end, [&](int64_t n, int64_t rows, auto& tile) {
    A* to_cosine = cosine + n * kPanelWidth<A>;
    A* to_sine = sine + n * kPanelWidth<A>;
    tile.store_rows(to_sine, kPanelWidth<A>);
#pragma omp simd
    for (int64_t j = 0; j < rows * kPanelWidth<A>; ++j) {
      A s, c;
      sine_cosine(spacing * to_sine[j], &s, &c);
      to_sine[j] = s;
      to_cosine[j] = c;
    }
  });
}

// sums[0][l] += cos(l angle), sums[1][l] += sin(l angle) over rows [begin, end), by rotation:
// e^{i (l + 1) angle} = e^{i l angle} e^{i angle}.
template <typename A>
static void add_characteristic(int64_t knots, int64_t begin, int64_t end, const A* cosine,
                               const A* sine, A* sums) {
  for_row_tiles<kRotatedRows>(begin, end, [&](auto height, int64_t n) {
    constexpr int kRows = decltype(height)::value;
    for (int v = 0; v < kPanelVectors; ++v) {
      Vector<A> c1[kRows], s1[kRows], c[kRows], s[kRows];
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        c[m] = c1[m] = load(cosine + (n + m) * kPanelWidth<A> + v * kLanes<A>);
        s[m] = s1[m] = load(sine + (n + m) * kPanelWidth<A> + v * kLanes<A>);
      }
      A* to_cosine = sums + v * kLanes<A>;
      A* to_sine = to_cosine + knots * kPanelWidth<A>;
      for (int64_t l = 0; l < knots; ++l) {
        Vector<A> cosine_sum = c[0], sine_sum = s[0];
#pragma GCC unroll 4
        for (int m = 1; m < kRows; ++m) {
          cosine_sum += c[m];
          sine_sum += s[m];
        }
        store(to_cosine, load(to_cosine) + cosine_sum);
        store(to_sine, load(to_sine) + sine_sum);
        to_cosine += kPanelWidth<A>;
        to_sine += kPanelWidth<A>;
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const Vector<A> rotated = c[m] * c1[m] - s[m] * s1[m];
          s[m] = s[m] * c1[m] + c[m] * s1[m];
          c[m] = rotated;
        }
      }
    }
  });
}

// g_n = sum_l a_l cos(l angle_n) + b_l sin(l angle_n), coefficients [2][knots][width]: the real
// part of sum_l (a_l - i b_l) e^{i l angle}, by Horner's rule.
template <typename A>
static void characteristic_gradient(int64_t knots, int64_t rows, const A* cosine, const A* sine,
                                    const A* coefficients, A* g, int64_t g_stride) {
  for_row_tiles<kRotatedRows>(0, rows, [&](auto height, int64_t n) {
    constexpr int kRows = decltype(height)::value;
    for (int v = 0; v < kPanelVectors; ++v) {
      Vector<A> c1[kRows], s1[kRows], real[kRows], imaginary[kRows];
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        c1[m] = load(cosine + (n + m) * kPanelWidth<A> + v * kLanes<A>);
        s1[m] = load(sine + (n + m) * kPanelWidth<A> + v * kLanes<A>);
        real[m] = imaginary[m] = Vector<A>{};
      }
      const A* a = coefficients + v * kLanes<A>;
      const A* b = a + knots * kPanelWidth<A>;
      for (int64_t l = knots - 1; l >= 0; --l) {
        const Vector<A> a_l = load(a + l * kPanelWidth<A>), b_l = load(b + l * kPanelWidth<A>);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const Vector<A> rotated = a_l + real[m] * c1[m] - imaginary[m] * s1[m];
          imaginary[m] = imaginary[m] * c1[m] + real[m] * s1[m] - b_l;
          real[m] = rotated;
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        store(g + (n + m) * g_stride + v * kLanes<A>, real[m] * c1[m] - imaginary[m] * s1[m]);
      }
    }
  });
}

// The statistic of `count` slices from their sums, times scale; the sums become the coefficients of
// its gradient.
template <typename A>
static double epps_pulley(const Characteristic& problem, int64_t count, A* sums) {
  const A rows = static_cast<A>(problem.sketch.rows);
  double loss = 0.0;
  for (int64_t l = 0; l < problem.knots; ++l) {
    A* cosine = sums + l * kPanelWidth<A>;
    A* sine = cosine + problem.knots * kPanelWidth<A>;
    const A target = static_cast<A>(problem.knot_target[l]);
    const double knot = problem.spacing * static_cast<double>(l + 1);
    const A factor = static_cast<A>(2.0 * problem.scale * problem.knot_weight[l] * knot);
    double squares = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const A c = cosine[j] / rows - target, s = sine[j] / rows;
      squares += static_cast<double>(c * c + s * s);
      cosine[j] = factor * s;
      sine[j] = -factor * c;
    }
    loss += problem.knot_weight[l] * squares;
  }
  return loss * problem.scale * static_cast<double>(problem.sketch.rows);
}

// dsum_n cos(t_l p_n) / dp_n = -t_l sin(t_l p_n), dsum_n sin(t_l p_n) / dp_n = t_l cos(t_l p_n)
template <typename A>
static void upstream_coefficients(const Characteristic& problem, int64_t view, int64_t first,
                                  int64_t count, A* coefficients) {
  const int64_t plane = problem.views * problem.knots * problem.sketch.slices;
  for (int64_t l = 0; l < problem.knots; ++l) {
    const A* of_cosine = static_cast<const A*>(problem.grad_sums) +
                         (view * problem.knots + l) * problem.sketch.slices + first;
    const A* of_sine = of_cosine + plane;
    A* a = coefficients + l * kPanelWidth<A>;
    A* b = a + problem.knots * kPanelWidth<A>;
    const A knot = static_cast<A>(problem.spacing * static_cast<double>(l + 1));
    for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
      a[j] = j < count ? knot * of_sine[j] : A(0);
      b[j] = j < count ? -knot * of_cosine[j] : A(0);
    }
  }
}

template <typename A>
static void write_sums(const Characteristic& problem, int64_t view, int64_t first, int64_t count,
                       const A* sums) {
  for (int64_t part = 0; part < 2; ++part) {
    for (int64_t l = 0; l < problem.knots; ++l) {
      A* out = static_cast<A*>(problem.sums) +
               ((part * problem.views + view) * problem.knots + l) * problem.sketch.slices + first;
      const A* from = sums + (part * problem.knots + l) * kPanelWidth<A>;
      std::memcpy(out, from, sizeof(A) * count);
    }
  }
}

template <typename A>
static int64_t characteristic_scratch(const Characteristic& problem) {
  const int64_t gradient = problem.sketch.rows * problem.sketch.block_panels;
  return (2 * problem.sketch.rows + gradient + 4 * problem.knots) * kPanelWidth<A>;
}

template <typename A>
static double characteristic(const Characteristic& problem, int64_t view, int64_t begin,
                             int64_t end) {
  const Sketch& sketch = problem.sketch;
  const int64_t table = 2 * problem.knots * kPanelWidth<A>;
  A* cosine = static_cast<A*>(sketch.scratch);
  A* sine = cosine + sketch.rows * kPanelWidth<A>;
  A* sums = sine + sketch.rows * kPanelWidth<A>;
  A* partial = sums + table;
  A* gradient = partial + table;
  const int64_t stride = sketch.block_panels * kPanelWidth<A>;
  double loss = 0.0;
  for (int64_t block = begin; block < end; block += sketch.block_panels) {
    const int64_t stop = block + sketch.block_panels < end ? block + sketch.block_panels : end;
    for (int64_t panel = block; panel < stop; ++panel) {
      const int64_t first = panel * kPanelWidth<A>;
      const int64_t count = panel_columns<A>(panel, sketch.slices);
      std::memset(sums, 0, sizeof(A) * table);
      for (int64_t n = 0; n < sketch.rows; n += kSumRows) {
        const int64_t last = n + kSumRows < sketch.rows ? n + kSumRows : sketch.rows;
        angles<A>(problem, view, panel, n, last, cosine, sine);
        if (problem.grad_sums == nullptr) {
          std::memset(partial, 0, sizeof(A) * table);
          add_characteristic<A>(problem.knots, n, last, cosine, sine, partial);
#pragma omp simd
          for (int64_t j = 0; j < table; ++j) {
            sums[j] += partial[j];
          }
        }
      }
      if (problem.sums != nullptr) {
        write_sums<A>(problem, view, first, count, sums);
      } else if (problem.grad_sums != nullptr) {
        upstream_coefficients<A>(problem, view, first, count, sums);
      } else {
        loss += epps_pulley<A>(problem, count, sums);
      }
      if (sketch.grad_z != nullptr) {
        characteristic_gradient<A>(problem.knots, sketch.rows, cosine, sine, sums,
                                   gradient + (panel - block) * kPanelWidth<A>, stride);
      }
    }
    if (sketch.grad_z != nullptr) {
      const int64_t first = block * kPanelWidth<A>;
      const int64_t left = sketch.slices - first, most = (stop - block) * kPanelWidth<A>;
      sketch_gradient<A>(sketch, view, first, left < most ? left : most, gradient, stride);
    }
  }
  return loss;
}

// Quantiles.

// kSortLanes columns of p, `stride` apart from row to row: adds the squares of (p_(i) - q_i) to
// `squares`, a lane each; p becomes its gradient, factor (p_(i) - q_i) at the place of p_(i).
static void match_by_network(int64_t rows, const float* quantiles, float factor, float* p,
                             int64_t stride, int64_t* items, double* squares) {
  const int64_t padded = network_rows(rows);
  for (int64_t n = 0; n < rows; ++n) {
#pragma omp simd
    for (int j = 0; j < kSortLanes; ++j) {
      const uint64_t key = static_cast<uint64_t>(ordered(p[n * stride + j]));
      items[n * kSortLanes + j] = static_cast<int64_t>(key << 32 | static_cast<uint64_t>(n));
    }
  }
  for (int64_t e = rows * kSortLanes; e < padded * kSortLanes; ++e) {
    items[e] = INT64_MAX;
  }
  sort_network(items, padded);
  for (int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < kSortLanes; ++j) {
      const int64_t item = items[i * kSortLanes + j];
      const float residual = number(static_cast<int32_t>(item >> 32)) - quantiles[i];
      squares[j] += static_cast<double>(residual) * static_cast<double>(residual);
      p[(item & 0xFFFFFFFF) * stride + j] = factor * residual;
    }
  }
}

// As match_by_network, one column.
template <typename A>
static double match_by_bytes(int64_t rows, const A* quantiles, A factor, A* p, int64_t stride,
                             Ranked<A>* items) {
  for (int64_t n = 0; n < rows; ++n) {
    items[n].key = ordered(p[n * stride]);
    items[n].place = static_cast<decltype(items[n].place)>(n);
  }
  const Ranked<A>* sorted = sort_by_bytes<A>(items, items + rows, rows);
  double squares = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    const A residual = number(sorted[i].key) - quantiles[i];
    squares += static_cast<double>(residual) * static_cast<double>(residual);
    p[sorted[i].place * stride] = factor * residual;
  }
  return squares;
}

template <typename A>
static constexpr bool takes_network(int64_t rows) {
  return sizeof(A) == sizeof(float) && rows <= kMostRowsOfNetwork;
}

template <typename A>
static int64_t quantile_scratch(const Quantile& problem) {
  const int64_t rows = problem.sketch.rows;
  const int64_t items = takes_network<A>(rows) ? network_rows(rows) * kSortLanes * sizeof(int64_t)
                                               : 2 * rows * static_cast<int64_t>(sizeof(Ranked<A>));
  return problem.sketch.block_panels * kPanelWidth<A> * rows +
         items / static_cast<int64_t>(sizeof(A));
}

// A panel of p, [row][stride], becomes its gradient; returns the sum of squares of `count` columns.
template <typename A>
static double match_quantiles(const Quantile& problem, int64_t count, A* p, int64_t stride,
                              void* items) {
  const int64_t rows = problem.sketch.rows;
  const A* quantiles = static_cast<const A*>(problem.quantiles);
  const A factor = static_cast<A>(2.0 * problem.scale);
  double sum = 0.0;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (takes_network<A>(rows)) {
      for (int64_t first = 0; first < count; first += kSortLanes) {
        double squares[kSortLanes] = {};
        match_by_network(rows, quantiles, factor, p + first, stride, static_cast<int64_t*>(items),
                         squares);
        for (int64_t j = 0; j < kSortLanes && first + j < count; ++j) {
          sum += squares[j];
        }
      }
      return sum;
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    sum +=
        match_by_bytes<A>(rows, quantiles, factor, p + k, stride, static_cast<Ranked<A>*>(items));
  }
  return sum;
}

template <typename A>
static double quantile(const Quantile& problem, int64_t view, int64_t begin, int64_t end) {
  const Sketch& sketch = problem.sketch;
  const int64_t stride = sketch.block_panels * kPanelWidth<A>;
  A* p = static_cast<A*>(sketch.scratch);
  void* items = p + sketch.rows * stride;
  double sum = 0.0;
  for (int64_t block = begin; block < end; block += sketch.block_panels) {
    const int64_t stop = block + sketch.block_panels < end ? block + sketch.block_panels : end;
    for (int64_t panel = block; panel < stop; ++panel) {
      A* here = p + (panel - block) * kPanelWidth<A>;
      projections<A>(sketch, view, panel, 0, sketch.rows, [&](int64_t n, int64_t, auto& tile) {
        tile.store_rows(here + n * stride, stride);
      });
      sum +=
          match_quantiles<A>(problem, panel_columns<A>(panel, sketch.slices), here, stride, items);
    }
    if (sketch.grad_z != nullptr) {
      const int64_t first = block * kPanelWidth<A>;
      const int64_t left = sketch.slices - first, most = (stop - block) * kPanelWidth<A>;
      sketch_gradient<A>(sketch, view, first, left < most ? left : most, p, stride);
    }
  }
  return sum * problem.scale;
}

template <typename A>
static void pack_columns_of(const void* matrix, int64_t rows, int64_t columns, int64_t begin,
                            int64_t end, void* packed) {
  pack_columns(static_cast<const A*>(matrix), rows, columns, begin, end, static_cast<A*>(packed));
}

template <typename A>
static void pack_rows_of(const void* matrix, int64_t rows, int64_t columns, int64_t begin,
                         int64_t end, void* packed) {
  pack_rows(static_cast<const A*>(matrix), rows, columns, begin, end, static_cast<A*>(packed));
}

template <typename A>
static constexpr SketchKernels sketch_kernels() {
  return {kPanelWidth<A>,      pack_columns_of<A>, pack_rows_of<A>, characteristic_scratch<A>,
          quantile_scratch<A>, characteristic<A>,  quantile<A>};
}

}  // namespace regularizers::REGULARIZERS_ISA
