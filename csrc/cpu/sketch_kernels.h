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

#include "gemm.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

// dz += g A^T for the slices [first, first + count) of one view; g_nk lies at
// g[n * row_stride + k * slice_stride].
template <typename A>
static void sketch_gradient(const Sketch& sketch, int64_t view, int64_t first, int64_t count,
                            const A* g, int64_t row_stride, int64_t slice_stride) {
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
        tile.accumulate(count, g + n * row_stride, row_stride, slice_stride, packed);
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

// --- Epps-Pulley and characteristic sums
// ----------------------------------------------------------

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
  const Sketch& sketch = problem.sketch;
  const A spacing = static_cast<A>(problem.spacing);
  const A* z = static_cast<const A*>(sketch.z) + view * sketch.rows * sketch.features;
  const A* packed = slice_panel<A>(sketch, view, panel);
  for_row_tiles(begin, end, [&](auto height, int64_t n) {
    constexpr int kRows = decltype(height)::value;
    Tile<A, kRows, kPanelVectors> tile;
    tile.clear();
    tile.accumulate(sketch.features, z + n * sketch.features, sketch.features, 1, packed);
    A* to_cosine = cosine + n * kPanelWidth<A>;
    A* to_sine = sine + n * kPanelWidth<A>;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        store(to_sine + m * kPanelWidth<A> + v * kLanes<A>, tile.sum[m][v] * spacing);
      }
    }
#pragma omp simd
    for (int64_t j = 0; j < kRows * kPanelWidth<A>; ++j) {
      A s, c;
      sine_cosine(to_sine[j], &s, &c);
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
      sketch_gradient<A>(sketch, view, first, left < most ? left : most, gradient, stride, 1);
    }
  }
  return loss;
}

// --- Quantiles
// ------------------------------------------------------------------------------------

// A number as an unsigned one of the same order (negative numbers below positive ones, by size; NaN
// outside), and its place in the column.
template <typename A>
struct Ranked;
template <>
struct Ranked<float> {
  uint32_t key, place;
};
template <>
struct Ranked<double> {
  uint64_t key, place;
};

template <typename A>
static inline Ranked<A> ranked(A value, int64_t place) {
  Ranked<A> item;
  std::memcpy(&item.key, &value, sizeof(A));
  const auto sign = static_cast<decltype(item.key)>(1) << (8 * sizeof(A) - 1);
  item.key ^= item.key & sign ? ~static_cast<decltype(sign)>(0) : sign;
  item.place = static_cast<decltype(item.place)>(place);
  return item;
}

// Sorts by key, equal keys by place: a counting sort for each byte of the key, lowest first, and
// insertion for a few items. `spare` is of the same size; the result is what is returned, one of
// the two.
template <typename A>
static Ranked<A>* sort(Ranked<A>* items, Ranked<A>* spare, int64_t count) {
  constexpr int kBytes = sizeof(A), kValues = 256;
  constexpr int64_t kInsertion = 48;
  if (count <= kInsertion) {
    for (int64_t i = 1; i < count; ++i) {
      const Ranked<A> item = items[i];
      int64_t j = i;
      for (; j > 0 && items[j - 1].key > item.key; --j) {
        items[j] = items[j - 1];
      }
      items[j] = item;
    }
    return items;
  }
  int64_t starts[kBytes][kValues] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int byte = 0; byte < kBytes; ++byte) {
      ++starts[byte][items[i].key >> (8 * byte) & 0xFF];
    }
  }
  for (int byte = 0; byte < kBytes; ++byte) {
    int64_t* start = starts[byte];
    if (start[items[0].key >> (8 * byte) & 0xFF] == count) {
      continue;  // one value in all keys
    }
    int64_t total = 0;
    for (int value = 0; value < kValues; ++value) {
      const int64_t here = start[value];
      start[value] = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      spare[start[items[i].key >> (8 * byte) & 0xFF]++] = items[i];
    }
    Ranked<A>* const sorted = spare;
    spare = items;
    items = sorted;
  }
  return items;
}

// Rows of p^T and items of the sort, in scratch. The stride is not a whole number of pages, which
// would put a column into one cache set.
template <typename A>
static inline int64_t column_stride(const Quantile& problem) {
  const int64_t padded =
      (problem.sketch.rows + kPanelWidth<A> - 1) / kPanelWidth<A> * kPanelWidth<A>;
  return padded % 512 == 0 ? padded + kPanelWidth<A> : padded;
}

template <typename A>
static int64_t quantile_scratch(const Quantile& problem) {
  constexpr int64_t kItems = 2 * sizeof(Ranked<A>) / sizeof(A);  // two arrays of them
  return problem.sketch.block_panels * kPanelWidth<A> * column_stride<A>(problem) +
         kItems * problem.sketch.rows;
}

// p^T of one panel of slices: [width][stride].
template <typename A>
static void transposed_projections(const Quantile& problem, int64_t view, int64_t panel, A* p,
                                   int64_t stride) {
  const Sketch& sketch = problem.sketch;
  const A* slices = slice_panel<A>(sketch, view, panel);
  const int64_t row_panels = (sketch.rows + kPanelWidth<A> - 1) / kPanelWidth<A>;
  const A* z = static_cast<const A*>(problem.z_by_row) +
               view * row_panels * sketch.features * kPanelWidth<A>;
  const int64_t count = panel_columns<A>(panel, sketch.slices);
  for (int64_t n = 0; n < row_panels; ++n, z += sketch.features * kPanelWidth<A>) {
    for_row_tiles(0, count, [&](auto height, int64_t k) {
      constexpr int kRows = decltype(height)::value;
      Tile<A, kRows, kPanelVectors> tile;
      tile.clear();
      tile.accumulate(sketch.features, slices + k, 1, kPanelWidth<A>, z);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) {
          store(p + (k + m) * stride + n * kPanelWidth<A> + v * kLanes<A>, tile.sum[m][v]);
        }
      }
    });
  }
}

// One column: returns the sum of (p_(i) - q_i)^2; p becomes its gradient, 2 scale (p_(i) - q_i) at
// the place of p_(i).
template <typename A>
static double match_quantiles(const Quantile& problem, A* p, Ranked<A>* items) {
  const int64_t rows = problem.sketch.rows;
  const A* quantiles = static_cast<const A*>(problem.quantiles);
  const A factor = static_cast<A>(2.0 * problem.scale);
  for (int64_t n = 0; n < rows; ++n) {
    items[n] = ranked<A>(p[n], n);
  }
  const Ranked<A>* sorted = sort<A>(items, items + rows, rows);
  double sum = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    auto key = sorted[i].key;
    const auto sign = static_cast<decltype(key)>(1) << (8 * sizeof(A) - 1);
    key ^= key & sign ? sign : ~static_cast<decltype(key)>(0);
    A residual;
    std::memcpy(&residual, &key, sizeof(A));
    residual -= quantiles[i];
    sum += static_cast<double>(residual) * static_cast<double>(residual);
    p[sorted[i].place] = factor * residual;
  }
  return sum;
}

template <typename A>
static double quantile(const Quantile& problem, int64_t view, int64_t begin, int64_t end) {
  const Sketch& sketch = problem.sketch;
  const int64_t stride = column_stride<A>(problem);
  A* p = static_cast<A*>(sketch.scratch);
  auto* items = reinterpret_cast<Ranked<A>*>(p + sketch.block_panels * kPanelWidth<A> * stride);
  double sum = 0.0;
  for (int64_t block = begin; block < end; block += sketch.block_panels) {
    const int64_t stop = block + sketch.block_panels < end ? block + sketch.block_panels : end;
    const int64_t first = block * kPanelWidth<A>;
    const int64_t left = sketch.slices - first, most = (stop - block) * kPanelWidth<A>;
    const int64_t count = left < most ? left : most;
    for (int64_t panel = block; panel < stop; ++panel) {
      transposed_projections<A>(problem, view, panel, p + (panel - block) * kPanelWidth<A> * stride,
                                stride);
    }
    for (int64_t k = 0; k < count; ++k) {
      sum += match_quantiles<A>(problem, p + k * stride, items);
    }
    if (sketch.grad_z != nullptr) {
      sketch_gradient<A>(sketch, view, first, count, p, 1, stride);
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
