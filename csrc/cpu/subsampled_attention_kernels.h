// Attention to the keys of a list, for one (sample, head, list):
//
//   s_ic = scale q_i . k_c + b_ic,   p_ic = exp(s_ic - lse_i),   O_i = sum_c p_ic v_c
//   dV_c = sum_i p_ic dO_i,   dS_ic = p_ic (dO_i . v_c - delta_i),   delta_i = dO_i . O_i
//   dQ_i = scale sum_c dS_ic k_c,   dK_c = scale sum_i dS_ic q_i
//
// over the keys c of the list that query i sees. Keys and values are gathered once into the panels
// that the products read. Blocks of queries meet tiles of keys: logits live in a block of scratch,
// the softmax runs along (largest logit, sum and result so far), and the backward pass makes the
// logits again from the saved log-sum-exp. Logits are kept in powers of two: queries carry
// scale log2(e).
#pragma once

#include "elementary.h"
#include "gemm.h"
#include "kernels.h"

namespace regularizers::REGULARIZERS_ISA {

constexpr int64_t kAttentionRows = 64;   // queries of a block
constexpr int64_t kAttentionKeys = 128;  // keys of a tile: whole panels of every type
constexpr double kLog2OfE = 1.4426950408889634074, kLogOf2 = 0.69314718055994530942;

static inline int64_t padded(int64_t size, int64_t width) {
  return (size + width - 1) / width * width;
}

// A row of a tensor whose last stride is 1.
template <typename T>
static inline const T* row_of(const AttentionRows& rows, int64_t index) {
  return static_cast<const T*>(rows.data) + index * rows.stride;
}
template <typename T>
static inline T* row_of(const AttentionOutput& rows, int64_t index) {
  return static_cast<T*>(rows.data) + index * rows.stride;
}

// Where the parts of one task's scratch lie; sizes in elements of A, rounded to whole vectors.
template <typename A>
struct AttentionScratch {
  int64_t features, value_features, keys;  // padded to whole panels
  A* logits;                               // [rows of a block][keys of a tile]
  A* row_terms;                            // four numbers a row
  A* key_by_key;                           // K^T: panels of keys [panel][E][width]
  A* operand;                              // [rows][features]: queries
  A* result;                               // [rows][the wider of both features]
  A* value_by_feature;                     // forward: V [panel][n][width]
  A *value_by_key, *key_by_feature;        // backward: V^T, K
  A *operand_by_feature, *grad_by_feature, *grad_logits;
  int32_t* place;  // the place of each key; of none, and in the padding, kNoKey

  int64_t size = 0;

  AttentionScratch(const Attention& problem, void* base, bool backward) {
    features = padded(problem.features, kPanelWidth<A>);
    value_features = padded(problem.value_features, kPanelWidth<A>);
    keys = padded(problem.keys, kPanelWidth<A>);
    const auto take = [&](int64_t count) {
      A* part = static_cast<A*>(base) + size;
      size += padded(count, kLanes<A>);
      return part;
    };
    logits = take(kAttentionRows * kAttentionKeys);
    row_terms = take(4 * kAttentionRows);
    result = take(kAttentionRows * (features > value_features ? features : value_features));
    key_by_key = take(keys * problem.features);
    operand = value_by_feature = value_by_key = key_by_feature = nullptr;
    operand_by_feature = grad_by_feature = grad_logits = nullptr;
    if (backward) {
      value_by_key = take(keys * problem.value_features);
      key_by_feature = take(features * problem.keys);
      operand_by_feature = take(features * kAttentionRows);
      grad_by_feature = take(value_features * kAttentionRows);
      grad_logits = take(kAttentionRows * kAttentionKeys);
    } else {
      operand = take(kAttentionRows * features);
      value_by_feature = take(value_features * problem.keys);
    }
    place = reinterpret_cast<int32_t*>(take(keys));
  }
};

constexpr int32_t kNoKey = 0x7FFFFFFF;  // no query sees it: limits lie below

template <typename T>
static int64_t attention_scratch(const Attention& problem, bool backward) {
  return AttentionScratch<Accumulate<T>>(problem, nullptr, backward).size;
}

// packed[panel][row][lane] of the listed rows; zeros for no key.
template <typename T>
static void gather_columns(const AttentionRows& rows, const int32_t* place, int64_t count,
                           int64_t columns, Accumulate<T>* packed) {
  using A = Accumulate<T>;
  for (int64_t c = 0; c < count; ++c) {
    const T* row = place[c] == kNoKey ? nullptr : row_of<T>(rows, place[c]);
    for (int64_t d = 0; d < columns; d += kPanelWidth<A>) {
      const int64_t filled = panel_columns<A>(d / kPanelWidth<A>, columns);
      A* to = packed + d * count + c * kPanelWidth<A>;
      for (int64_t j = 0; j < kPanelWidth<A>; ++j) {
        to[j] = row != nullptr && j < filled ? widen(row[d + j]) : A(0);
      }
    }
  }
}

// packed[panel][column][lane]: the listed rows transposed.
template <typename T>
static void gather_rows(const AttentionRows& rows, const int32_t* place, int64_t count,
                        int64_t columns, Accumulate<T>* packed) {
  using A = Accumulate<T>;
  for (int64_t c = 0; c < padded(count, kPanelWidth<A>); ++c) {
    const T* row = place[c] == kNoKey ? nullptr : row_of<T>(rows, place[c]);
    A* to = packed + c / kPanelWidth<A> * columns * kPanelWidth<A> + c % kPanelWidth<A>;
    for (int64_t d = 0; d < columns; ++d) {
      to[d * kPanelWidth<A>] = row == nullptr ? A(0) : widen(row[d]);
    }
  }
}

// A row times a factor, in panels: to[panel][lane], panels kAttentionRows rows apart.
template <typename T>
static inline void load_operand(const T* row, int64_t count, Accumulate<T> factor,
                                Accumulate<T>* to) {
  using A = Accumulate<T>;
  for (int64_t d = 0; d < count; d += kPanelWidth<A>, to += kAttentionRows * kPanelWidth<A>) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t first = d + v * kLanes<A>;
      store(to + v * kLanes<A>, load_wide(row + first, count - first) * factor);
    }
  }
}

template <typename T>
static inline Accumulate<T> dot_product(const T* left, const T* right, int64_t count) {
  using A = Accumulate<T>;
  Vector<A> sum{};
  for (int64_t d = 0; d < count; d += kLanes<A>) {
    sum += load_wide(left + d, count - d) * load_wide(right + d, count - d);
  }
  return sum_lanes<A>(sum);
}

template <typename A>
static void read_places(const Attention& problem, const AttentionScratch<A>& scratch) {
  for (int64_t c = 0; c < scratch.keys; ++c) {
    const bool exists = c < problem.keys && problem.key_index[c] >= 0;
    scratch.place[c] = exists ? static_cast<int32_t>(problem.key_index[c]) : kNoKey;
  }
}

// One block of queries: which they are, and the last place that each of them sees.
struct AttentionBlock {
  int64_t rows;
  int64_t query[kAttentionRows];
  int32_t limit[kAttentionRows];
  int32_t least_limit = kNoKey, largest_limit = -1;

  AttentionBlock(const Attention& problem, int64_t begin, int64_t end) : rows(0) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t index = problem.query_index == nullptr ? r : problem.query_index[r];
      if (index < 0) {
        continue;
      }
      query[rows] = index;
      limit[rows] = problem.causal ? static_cast<int32_t>(index) : kNoKey - 1;
      least_limit = limit[rows] < least_limit ? limit[rows] : least_limit;
      largest_limit = limit[rows] > largest_limit ? limit[rows] : largest_limit;
      ++rows;
    }
  }
};

// A tile of keys, and whether all of them, or none, are seen by all queries of a block.
struct AttentionTile {
  int64_t first, keys, padded_keys;
  bool masked, unseen;

  template <typename A>
  AttentionTile(const Attention& problem, const AttentionScratch<A>& scratch,
                const AttentionBlock& block, int64_t first)
      : first(first) {
    const auto upto = [&](int64_t all) {
      return all - first < kAttentionKeys ? all - first : kAttentionKeys;
    };
    keys = upto(problem.keys);
    padded_keys = upto(scratch.keys);
    int32_t least = kNoKey, largest = -1;
    for (int64_t c = first; c < first + padded_keys; ++c) {
      least = scratch.place[c] < least ? scratch.place[c] : least;
      largest = scratch.place[c] > largest ? scratch.place[c] : largest;
    }
    masked = largest > block.least_limit;
    unseen = least > block.largest_limit;
  }
};

// Adds the bias of a row and sets what it does not see to -inf.
template <typename T>
static inline void bias_and_mask(const Attention& problem, const int32_t* place,
                                 const AttentionBlock& block, const AttentionTile& tile, int64_t r,
                                 Accumulate<T>* logits) {
  using A = Accumulate<T>;
  if (problem.bias.data != nullptr) {
    const T* bias = row_of<T>(problem.bias, block.query[r]);
    for (int64_t c = 0; c < tile.keys; ++c) {
      if (place[c] != kNoKey) {
        logits[c] += static_cast<A>(kLog2OfE) * widen(bias[place[c] * problem.bias_column]);
      }
    }
  }
  if (tile.masked) {
    const int32_t limit = block.limit[r];
    for (int64_t c = 0; c < tile.padded_keys; ++c) {
      logits[c] = place[c] > limit ? -static_cast<A>(__builtin_inf()) : logits[c];
    }
  }
}

// to[r][panel columns] = sum over panels of operand (as panels of features) times packed columns.
template <typename A>
static inline void multiply_panels(const A* operand, int64_t features, const A* packed,
                                   int64_t columns, int64_t rows, A* to) {
  for (int64_t c = 0; c < columns; c += kPanelWidth<A>, packed += features * kPanelWidth<A>) {
    for_row_tiles(0, rows, [&](auto height, int64_t r) {
      Tile<A, decltype(height)::value, kPanelVectors> tile;
      tile.clear();
      for (int64_t d = 0; d < features; d += kPanelWidth<A>) {
        tile.accumulate(panel_columns<A>(d / kPanelWidth<A>, features),
                        operand + d * kAttentionRows + r * kPanelWidth<A>, kPanelWidth<A>, 1,
                        packed + d * kPanelWidth<A>);
      }
      tile.store_rows(to + r * kAttentionKeys + c, kAttentionKeys);
    });
  }
}

// to[row][columns] += sum over k < depth of a(row, k) packed(k): `packed` are panels of columns,
// panel_stride apart, `to` has rows of `stride` elements, padded to whole panels.
template <typename A>
static inline void add_product(const A* a, int64_t a_row, int64_t a_step, int64_t rows,
                               int64_t depth, const A* packed, int64_t panel_stride,
                               int64_t columns, A* to, int64_t stride) {
  for (int64_t d = 0; d < columns; d += kPanelWidth<A>, packed += panel_stride) {
    with_vectors(panel_vectors<A>(d / kPanelWidth<A>, columns), [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      for_row_tiles(0, rows, [&](auto height, int64_t r) {
        constexpr int kRows = decltype(height)::value;
        Tile<A, kRows, kVectors> tile;
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            tile.sum[m][v] = load(to + (r + m) * stride + d + v * kLanes<A>);
          }
        }
        tile.accumulate(depth, a + r * a_row, a_row, a_step, packed);
        tile.store_rows(to + r * stride + d, stride);
      });
    });
  }
}

template <typename T>
static inline Accumulate<T> own_logit(const Attention& problem, int64_t i) {
  using A = Accumulate<T>;
  A sum = dot_product(row_of<T>(problem.q, i), row_of<T>(problem.k, i), problem.features) *
          static_cast<A>(problem.scale * kLog2OfE);
  if (problem.bias.data != nullptr) {
    sum += static_cast<A>(kLog2OfE) * widen(row_of<T>(problem.bias, i)[i * problem.bias_column]);
  }
  return sum;
}

// Takes a row of logits into the running softmax: logits become weights relative to the largest
// logit so far, what was summed up before shrinks accordingly.
template <typename A>
static inline void softmax_step(A* logits, int64_t keys, A* largest, A* sum, A* result,
                                int64_t value_features) {
  Vector<A> top = broadcast(*largest);
  for (int64_t c = 0; c < keys; c += kLanes<A>) {
    const Vector<A> value = load(logits + c);
    top = value > top ? value : top;
  }
  const A new_largest = max_lanes<A>(top);
  // While nothing was seen, exp2(-inf - 0) = 0 is right and exp2(-inf + inf) would not be.
  const A base = new_largest == -static_cast<A>(__builtin_inf()) ? A(0) : new_largest;
  Vector<A> total{};
  for (int64_t c = 0; c < keys; c += kLanes<A>) {
    const Vector<A> weight = exp2(load(logits + c) - base);
    store(logits + c, weight);
    total += weight;
  }
  if (new_largest != *largest) {
    const A shrink = exp2(broadcast(*largest - base))[0];
    *sum *= shrink;
    for (int64_t d = 0; d < value_features; d += kLanes<A>) {
      store(result + d, load(result + d) * shrink);
    }
    *largest = new_largest;
  }
  *sum += sum_lanes<A>(total);
}

// Queries [begin, end) of the list.
template <typename T>
static void attention_forward(const Attention& problem, void* base, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const AttentionScratch<A> scratch(problem, base, false);
  read_places(problem, scratch);
  gather_rows<T>(problem.k, scratch.place, problem.keys, problem.features, scratch.key_by_key);
  gather_columns<T>(problem.v, scratch.place, problem.keys, problem.value_features,
                    scratch.value_by_feature);
  A *largest = scratch.row_terms, *sum = largest + kAttentionRows;
  const A unit = static_cast<A>(problem.scale * kLog2OfE);
  for (int64_t first = begin; first < end; first += kAttentionRows) {
    const AttentionBlock block(problem, first,
                               first + kAttentionRows < end ? first + kAttentionRows : end);
    std::memset(scratch.result, 0, sizeof(A) * kAttentionRows * scratch.value_features);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t i = block.query[r];
      load_operand(row_of<T>(problem.q, i), problem.features, unit,
                   scratch.operand + r * kPanelWidth<A>);
      largest[r] = -static_cast<A>(__builtin_inf());
      sum[r] = A(0);
      const A own =
          problem.own != nullptr && problem.own[i] ? own_logit<T>(problem, i) : largest[r];
      if (own != largest[r]) {  // a logit of -inf hides the key
        largest[r] = own;
        sum[r] = A(1) + (own - own);  // NaN or an infinity shows
        const T* value = row_of<T>(problem.v, i);
        for (int64_t d = 0; d < problem.value_features; ++d) {
          scratch.result[r * scratch.value_features + d] = widen(value[d]);
        }
      }
    }
    for (int64_t key = 0; key < problem.keys; key += kAttentionKeys) {
      const AttentionTile tile(problem, scratch, block, key);
      if (tile.unseen) {
        continue;
      }
      multiply_panels(scratch.operand, problem.features,
                      scratch.key_by_key + key * problem.features, tile.padded_keys, block.rows,
                      scratch.logits);
      for (int64_t r = 0; r < block.rows; ++r) {
        A* logits = scratch.logits + r * kAttentionKeys;
        bias_and_mask<T>(problem, scratch.place + key, block, tile, r, logits);
        softmax_step(logits, tile.padded_keys, largest + r, sum + r,
                     scratch.result + r * scratch.value_features, scratch.value_features);
      }
      add_product(scratch.logits, kAttentionKeys, 1, block.rows, tile.keys,
                  scratch.value_by_feature + key * kPanelWidth<A>, problem.keys * kPanelWidth<A>,
                  problem.value_features, scratch.result, scratch.value_features);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      T* out = row_of<T>(problem.out, block.query[r]);
      const A* result = scratch.result + r * scratch.value_features;
      const A inverse = sum[r] == A(0) ? A(0) : A(1) / sum[r];
      for (int64_t d = 0; d < problem.value_features; ++d) {
        out[d] = narrow<T>(result[d] * inverse);
      }
      static_cast<A*>(problem.lse)[block.query[r]] =
          largest[r] * static_cast<A>(kLogOf2) +
          static_cast<A>(__builtin_log(static_cast<double>(sum[r])));
    }
  }
}

// The own key of query i, which stands in no list: its gradients are written at once.
template <typename T>
static inline void own_gradient(const Attention& problem, int64_t i, Accumulate<T> lse,
                                Accumulate<T> delta, Accumulate<T>* grad_query) {
  using A = Accumulate<T>;
  const T *q = row_of<T>(problem.q, i), *k = row_of<T>(problem.k, i);
  const T *v = row_of<T>(problem.v, i), *grad = row_of<T>(problem.grad, i);
  const A weight = exp2(broadcast(own_logit<T>(problem, i) - lse))[0];
  const A dot = dot_product(grad, v, problem.value_features);
  const A slope = weight * (dot - delta);
  T *grad_key = row_of<T>(problem.grad_k, i), *grad_value = row_of<T>(problem.grad_v, i);
  for (int64_t d = 0; d < problem.features; ++d) {
    grad_query[d] += slope * widen(k[d]);
    grad_key[d] = narrow<T>(slope * static_cast<A>(problem.scale) * widen(q[d]));
  }
  for (int64_t d = 0; d < problem.value_features; ++d) {
    grad_value[d] = narrow<T>(weight * widen(grad[d]));
  }
  if (problem.grad_bias.data != nullptr) {
    row_of<T>(problem.grad_bias, i)[i] = narrow<T>(slope);
  }
}

// Queries [begin, end) of the list: their gradients, and their part of those of the keys, added to
// `sums`: dK [n][padded features], without the factor scale log2(e), and dV.
template <typename T>
static void attention_backward(const Attention& problem, void* base, int64_t begin, int64_t end,
                               void* sums) {
  using A = Accumulate<T>;
  const AttentionScratch<A> scratch(problem, base, true);
  A* grad_keys = static_cast<A*>(sums);
  A* grad_values = grad_keys + problem.keys * scratch.features;
  read_places(problem, scratch);
  gather_rows<T>(problem.k, scratch.place, problem.keys, problem.features, scratch.key_by_key);
  gather_columns<T>(problem.k, scratch.place, problem.keys, problem.features,
                    scratch.key_by_feature);
  gather_rows<T>(problem.v, scratch.place, problem.keys, problem.value_features,
                 scratch.value_by_key);
  A *lse = scratch.row_terms, *delta = lse + kAttentionRows;
  const A unit = static_cast<A>(problem.scale * kLog2OfE);
  const A infinity = static_cast<A>(__builtin_inf());
  const int64_t block_stride = kAttentionRows * kPanelWidth<A>;
  for (int64_t first = begin; first < end; first += kAttentionRows) {
    const AttentionBlock block(problem, first,
                               first + kAttentionRows < end ? first + kAttentionRows : end);
    std::memset(scratch.result, 0, sizeof(A) * kAttentionRows * scratch.features);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t i = block.query[r];
      const T* grad = row_of<T>(problem.grad, i);
      load_operand(row_of<T>(problem.q, i), problem.features, unit,
                   scratch.operand_by_feature + r * kPanelWidth<A>);
      load_operand(grad, problem.value_features, A(1),
                   scratch.grad_by_feature + r * kPanelWidth<A>);
      delta[r] = dot_product(grad, row_of<T>(problem.out, i), problem.value_features);
      const A natural = static_cast<const A*>(problem.lse)[i];
      lse[r] = natural == -infinity ? infinity : natural * static_cast<A>(kLog2OfE);
      if (problem.own != nullptr && problem.own[i]) {
        own_gradient<T>(problem, i, lse[r], delta[r], scratch.result + r * scratch.features);
      }
    }
    for (int64_t key = 0; key < problem.keys; key += kAttentionKeys) {
      const AttentionTile tile(problem, scratch, block, key);
      if (tile.unseen) {
        continue;
      }
      multiply_panels(scratch.operand_by_feature, problem.features,
                      scratch.key_by_key + key * problem.features, tile.padded_keys, block.rows,
                      scratch.logits);
      multiply_panels(scratch.grad_by_feature, problem.value_features,
                      scratch.value_by_key + key * problem.value_features, tile.padded_keys,
                      block.rows, scratch.grad_logits);
      for (int64_t r = 0; r < block.rows; ++r) {
        A *weight = scratch.logits + r * kAttentionKeys,
          *slope = scratch.grad_logits + r * kAttentionKeys;
        bias_and_mask<T>(problem, scratch.place + key, block, tile, r, weight);
        for (int64_t c = 0; c < tile.padded_keys; c += kLanes<A>) {
          const Vector<A> p = exp2(load(weight + c) - lse[r]);
          store(weight + c, p);
          store(slope + c, p * (load(slope + c) - delta[r]));
        }
        if (problem.grad_bias.data != nullptr) {
          T* to = row_of<T>(problem.grad_bias, block.query[r]);
          for (int64_t c = 0; c < tile.keys; ++c) {
            if (scratch.place[key + c] != kNoKey) {
              to[scratch.place[key + c]] = narrow<T>(slope[c]);
            }
          }
        }
      }
      add_product(scratch.grad_logits, kAttentionKeys, 1, block.rows, tile.keys,
                  scratch.key_by_feature + key * kPanelWidth<A>, problem.keys * kPanelWidth<A>,
                  problem.features, scratch.result, scratch.features);
      add_product(scratch.grad_logits, 1, kAttentionKeys, tile.keys, block.rows,
                  scratch.operand_by_feature, block_stride, problem.features,
                  grad_keys + key * scratch.features, scratch.features);
      add_product(scratch.logits, 1, kAttentionKeys, tile.keys, block.rows, scratch.grad_by_feature,
                  block_stride, problem.value_features, grad_values + key * scratch.value_features,
                  scratch.value_features);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      T* grad_query = row_of<T>(problem.grad_q, block.query[r]);
      for (int64_t d = 0; d < problem.features; ++d) {
        grad_query[d] =
            narrow<T>(scratch.result[r * scratch.features + d] * static_cast<A>(problem.scale));
      }
    }
  }
}

// Elements of `sums` for one part of a list's queries.
template <typename T>
static int64_t attention_sums(const Attention& problem) {
  using A = Accumulate<T>;
  return problem.keys * (padded(problem.features, kPanelWidth<A>) +
                         padded(problem.value_features, kPanelWidth<A>));
}

// Adds up the parts and writes the gradients of the listed keys and values.
template <typename T>
static void attention_key_gradients(const Attention& problem, void* sums, int64_t parts) {
  using A = Accumulate<T>;
  const int64_t features = padded(problem.features, kPanelWidth<A>);
  const int64_t value_features = padded(problem.value_features, kPanelWidth<A>);
  A* total = static_cast<A*>(sums);
  const int64_t size = attention_sums<T>(problem);
  for (int64_t part = 1; part < parts; ++part) {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      total[j] += total[part * size + j];
    }
  }
  for (int64_t c = 0; c < problem.keys; ++c) {
    if (problem.key_index[c] < 0) {
      continue;
    }
    const A *grad_key = total + c * features,
            *grad_value = total + problem.keys * features + c * value_features;
    T* to = row_of<T>(problem.grad_k, problem.key_index[c]);
    for (int64_t d = 0; d < problem.features; ++d) {
      to[d] = narrow<T>(grad_key[d] * static_cast<A>(kLogOf2));
    }
    to = row_of<T>(problem.grad_v, problem.key_index[c]);
    for (int64_t d = 0; d < problem.value_features; ++d) {
      to[d] = narrow<T>(grad_value[d]);
    }
  }
}

template <typename T>
static constexpr AttentionKernels attention_kernels() {
  return {kAttentionRows,       attention_scratch<T>,  attention_sums<T>,
          attention_forward<T>, attention_backward<T>, attention_key_gradients<T>};
}

}  // namespace regularizers::REGULARIZERS_ISA
