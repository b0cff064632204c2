// pairwise_logsumexp and its backward pass on the CPU: points centred and packed, blocks shared out
// to threads. The arithmetic is in pairwise_kernels.h.
//
// Backward, a block adds to the gradients of its rows and of its columns. Step t works on the
// parts (I, I + t) for all I at once, each some blocks high and wide: no two of them share rows or
// columns, and every sum is added up in the order of t, whatever the number of threads. Where the
// columns are the rows, the steps up to half of the parts meet every pair once.
#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

using torch::stable::contiguous;

using MaybeTensor = std::optional<Tensor>;
using Result = std::tuple<Tensor, Tensor, Tensor>;

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;
// Below this many products, some 10 us, waking a thread costs as much.
constexpr int64_t kSerialProducts = 1 << 18;
constexpr int64_t kMostBlocks = 4;
// Whole panels of every instruction set, hence also the least block of columns.
constexpr int64_t kPadding = 32;

struct Arguments {
  const Tensor& x;
  const MaybeTensor &y, &column_bias, &labels, &column_labels, &targets, &predictions;
  const Tensor& scale;
  int64_t kind, rule;
  double window, push;
  bool exclude_self;
};

// Memory whose vectors lie in one cache line each.
template <typename T>
struct CacheLines {
  using value_type = T;
  CacheLines() = default;
  template <typename U>
  CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
  }
  void deallocate(T* data, size_t) { ::operator delete(data, kAlignment); }
  bool operator==(const CacheLines&) const { return true; }
  bool operator!=(const CacheLines&) const { return false; }

 private:
  static constexpr std::align_val_t kAlignment{64};
};
template <typename T>
using Buffer = std::vector<T, CacheLines<T>>;

template <typename A>
struct LaneIntegerOf {
  using type = int32_t;
};
template <>
struct LaneIntegerOf<double> {
  using type = int64_t;
};

// Labels as small numbers: the place of each among all of them.
template <typename I>
void number_labels(const Tensor& rows, const Tensor& columns, int64_t padded, Buffer<I>& row,
                   Buffer<I>& column) {
  const Tensor tensors[] = {contiguous(rows), contiguous(columns)};
  std::vector<int64_t> known;
  for (const Tensor& labels : tensors) {
    const int64_t* from = static_cast<const int64_t*>(labels.const_data_ptr());
    known.insert(known.end(), from, from + labels.size(0));
  }
  std::sort(known.begin(), known.end());
  known.erase(std::unique(known.begin(), known.end()), known.end());
  Buffer<I>* const numbers[] = {&row, &column};
  for (int side = 0; side < 2; ++side) {
    const int64_t* from = static_cast<const int64_t*>(tensors[side].const_data_ptr());
    numbers[side]->assign(padded, I{0});
    for (int64_t i = 0; i < tensors[side].size(0); ++i) {
      const auto place = std::lower_bound(known.begin(), known.end(), from[i]);
      (*numbers[side])[i] = static_cast<I>(place - known.begin());
    }
  }
}

// Everything that a call reads, as the kernels want it.
template <typename A>
class Problem {
 public:
  explicit Problem(const Arguments& call)
      : type_(sizeof(A) == 4 ? kFloat : kDouble),
        kernel_(kernels().pairwise[type_]),
        scale_(*static_cast<const double*>(call.scale.const_data_ptr())) {
    if (!std::isfinite(scale_)) {
      check(false, "scale must be finite, got " + std::to_string(scale_));
    }
    const bool own = !call.y.has_value();
    const Tensor x = wide(call.x), y = own ? x : wide(*call.y);
    pairs_.kind = static_cast<PairKind>(call.kind);
    pairs_.rule = static_cast<PairRule>(call.rule);
    pairs_.own = own;
    pairs_.exclude_self = call.exclude_self;
    pairs_.rows = x.size(0);
    pairs_.columns = y.size(0);
    pairs_.features = x.size(1);
    pairs_.padded = divide_up(std::max(pairs_.rows, pairs_.columns), kPadding) * kPadding;
    pairs_.unit = scale_ * kLog2e;
    serial_ =
        pairs_.rows * pairs_.columns * std::max<int64_t>(pairs_.features, 1) < kSerialProducts;
    choose_blocks();
    place_points(x, y);
    place_bias(call.column_bias);
    place_rule(call);
  }

  const Pairwise& pairs() const { return pairs_; }
  const PairwiseKernels& kernel() const { return kernel_; }
  double scale() const { return scale_; }
  // About the centre, row-major.
  const A* x() const { return x_data_; }
  const A* y() const { return pairs_.own ? x_data_ : y_data_; }

  Buffer<A> zeros(int64_t size) const { return Buffer<A>(size, A{0}); }

  template <typename Body>
  void for_rows(int64_t rows, const Body& body) const {
    serial_ ? body(0, rows) : torch::stable::parallel_for(0, rows, 64, body);
  }

  // body(block, scratch, both) for all pairs of blocks, no two at a time that share rows or
  // columns.
  template <typename Body>
  void for_blocks(const Body& body) const {
    const int64_t row_blocks = divide_up(pairs_.rows, row_block_);
    const int64_t column_blocks = divide_up(pairs_.columns, column_block_);
    const int64_t row_part = part_of(row_blocks), column_part = part_of(column_blocks);
    const int64_t row_parts = divide_up(row_blocks, row_part);
    const int64_t column_parts = divide_up(column_blocks, column_part);
    const int64_t cycle = std::max(row_parts, column_parts);
    const int64_t steps = pairs_.own ? row_parts / 2 + 1 : cycle;
    for (int64_t step = 0; step < steps && row_parts > 0 && column_parts > 0; ++step) {
      // The last step of an even number of parts meets them from both ends.
      const int64_t tasks = pairs_.own && 2 * step == row_parts ? step : row_parts;
      const bool diagonal = pairs_.own && step == 0;
      run(tasks, [&](int64_t begin, int64_t end) {
        Buffer<A> scratch(row_block_ * pairs_.stride);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = (task + step) % cycle * column_part;
          const int64_t last = std::min(first + column_part, column_blocks);
          const int64_t last_row = std::min((task + 1) * row_part, row_blocks);
          for (int64_t row = task * row_part; row < last_row; ++row) {
            for (int64_t column = diagonal ? row : first; column < last; ++column) {
              body(block(row, column), scratch.data(), !(diagonal && row == column));
            }
          }
        }
      });
    }
  }

  // body(block, scratch) for all blocks of a row in order, rows at once.
  template <typename Body>
  void for_rows_of_blocks(const Body& body) const {
    const int64_t column_blocks = divide_up(pairs_.columns, column_block_);
    run(divide_up(pairs_.rows, row_block_), [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(row_block_ * pairs_.stride);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t column = 0; column < column_blocks; ++column) {
          body(block(row, column), scratch.data());
        }
      }
    });
  }

  Buffer<A> packed_features(const A* points, int64_t count) const {
    const int64_t panels = divide_up(pairs_.features, kernel_.panel_width);
    Buffer<A> packed(panels * kernel_.panel_width * count);
    run(panels, [&](int64_t begin, int64_t end) {
      kernel_.pack_features(points, count, pairs_.features, begin, end, packed.data());
    });
    return packed;
  }

 private:
  using I = typename LaneIntegerOf<A>::type;

  Tensor wide(const Tensor& tensor) const {
    return contiguous(torch::stable::to(tensor, accumulate_type(type_)));
  }
  static const A* data(const Tensor& tensor) {
    return static_cast<const A*>(tensor.const_data_ptr());
  }

  PairBlock block(int64_t row, int64_t column) const {
    return {row * row_block_, std::min((row + 1) * row_block_, pairs_.rows), column * column_block_,
            std::min((column + 1) * column_block_, pairs_.columns)};
  }

  template <typename Body>
  void run(int64_t tasks, const Body& body) const {
    serial_ || tasks < 2 ? body(0, tasks) : torch::stable::parallel_for(0, tasks, 1, body);
  }

  // How many blocks a task takes on each side: more of them reuse what is in cache.
  static int64_t part_of(int64_t blocks) {
    return std::clamp<int64_t>(divide_up(blocks, 16), 1, kMostBlocks);
  }

  // By the sizes alone: some 16 blocks to share out if there are so many rows, else smaller ones.
  void choose_blocks() {
    const int64_t part = divide_up(pairs_.rows, 16);
    const auto block = [](int64_t size, int64_t unit) {
      return std::clamp(divide_up(size, unit) * unit, unit, kPairBlock);
    };
    row_block_ = block(part, pairs_.own ? kPadding : 8);
    column_block_ = pairs_.own ? row_block_ : block(pairs_.columns, kPadding);
    // A step down a block by a power of two would fall on the same few sets of the cache.
    pairs_.stride = column_block_ + 16;
  }

  void place_points(const Tensor& x, const Tensor& y) {
    x_data_ = data(x);
    y_data_ = data(y);
    if (pairs_.kind != kInnerProduct) {
      const Buffer<A> centre = mean(y_data_);
      relative_to(centre, x_data_, pairs_.rows, x_centred_, x_norm_);
      x_data_ = x_centred_.data();
      if (!pairs_.own) {
        relative_to(centre, y_data_, pairs_.columns, y_centred_, y_norm_);
        y_data_ = y_centred_.data();
      }
      x_factor_ = x_centred_;
      for (A& value : x_factor_) {
        value *= A{-2};
      }
    }
    keep_x_ = x;
    keep_y_ = y;
    const A* columns = this->y();
    const int64_t panels = divide_up(pairs_.columns, kernel_.panel_width);
    panels_.resize(panels * kernel_.panel_width * pairs_.features);
    run(panels, [&](int64_t begin, int64_t end) {
      kernel_.pack_points(columns, pairs_.columns, pairs_.features, begin, end, panels_.data());
    });
    pairs_.x = pairs_.kind == kInnerProduct ? x_data_ : x_factor_.data();
    pairs_.y = panels_.data();
    pairs_.x_norm = x_norm_.data();
    pairs_.y_norm = pairs_.own ? x_norm_.data() : y_norm_.data();
  }

  Buffer<A> mean(const A* points) const {
    std::vector<double> sum(pairs_.features, 0.0);
    for (int64_t j = 0; j < pairs_.columns; ++j) {
      for (int64_t d = 0; d < pairs_.features; ++d) {
        sum[d] += points[j * pairs_.features + d];
      }
    }
    Buffer<A> mean(pairs_.features);
    for (int64_t d = 0; d < pairs_.features; ++d) {
      mean[d] = static_cast<A>(sum[d] / static_cast<double>(std::max<int64_t>(pairs_.columns, 1)));
    }
    return mean;
  }

  void relative_to(const Buffer<A>& centre, const A* points, int64_t count, Buffer<A>& centred,
                   Buffer<A>& norm) const {
    const int64_t features = pairs_.features;
    centred.resize(count * features);
    norm.assign(pairs_.padded, A{0});
    for_rows(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double square = 0.0;
        for (int64_t d = 0; d < features; ++d) {
          const A value = points[i * features + d] - centre[d];
          centred[i * features + d] = value;
          square += static_cast<double>(value) * value;
        }
        norm[i] = static_cast<A>(square);
      }
    });
  }

  void place_bias(const MaybeTensor& column_bias) {
    bias_ = zeros(pairs_.padded);
    if (column_bias.has_value()) {
      const Tensor bias = wide(*column_bias);
      std::transform(data(bias), data(bias) + pairs_.columns, bias_.begin(),
                     [](A value) { return static_cast<A>(value * kLog2e); });
    }
    pairs_.bias = bias_.data();
  }

  void place_rule(const Arguments& call) {
    pairs_.window = call.window;
    pairs_.push = call.push * kLog2e;
    if (call.labels.has_value()) {
      number_labels(*call.labels, call.column_labels.value_or(*call.labels), pairs_.padded,
                    row_label_, column_label_);
      pairs_.row_label = row_label_.data();
      pairs_.column_label = column_label_.data();
    }
    if (call.targets.has_value()) {
      pairs_.values = call.targets->size(1);
      pairs_.target = place_values(*call.targets, target_);
    }
    if (call.predictions.has_value()) {
      pairs_.prediction = place_values(*call.predictions, prediction_);
    }
  }

  // Targets [points, values] as [values][padded].
  const A* place_values(const Tensor& values, Buffer<A>& to) const {
    const Tensor from = wide(values);
    const int64_t count = from.size(0), size = from.size(1);
    to = zeros(size * pairs_.padded);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t l = 0; l < size; ++l) {
        to[l * pairs_.padded + i] = data(from)[i * size + l];
      }
    }
    return to.data();
  }

  StorageType type_;
  const PairwiseKernels& kernel_;
  double scale_;
  Pairwise pairs_{};
  bool serial_;
  int64_t row_block_, column_block_;
  MaybeTensor keep_x_, keep_y_;
  const A *x_data_, *y_data_;
  Buffer<A> x_centred_, y_centred_, x_factor_, x_norm_, y_norm_, panels_, bias_;
  Buffer<I> row_label_, column_label_;
  Buffer<A> target_, prediction_;
};

// The sums of one side, in memory.
template <typename A>
struct Sums {
  Buffer<A> top, sum, total;
  Buffer<typename LaneIntegerOf<A>::type> count;

  explicit Sums(int64_t size)
      : top(size, -INFINITY), sum(size, 0), total(size, 0), count(size, 0) {}
  PairSums view() { return {top.data(), sum.data(), total.data(), count.data()}; }
};

double weight_logarithm(const Arguments& call) {
  return call.rule == kFalselyNearLinear ? std::log(call.push) : 0.0;
}

template <typename A>
Result forward_of(const Arguments& call) {
  const Problem<A> problem(call);
  const Pairwise& pairs = problem.pairs();
  Sums<A> by_row(pairs.padded), by_column(pairs.own ? pairs.padded : 0);
  if (pairs.own) {
    problem.for_blocks([&](const PairBlock& at, A* scratch, bool both) {
      problem.kernel().forward(pairs, at, both, by_row.view(), by_column.view(), scratch);
    });
  } else {
    problem.for_rows_of_blocks([&](const PairBlock& at, A* scratch) {
      problem.kernel().forward(pairs, at, false, by_row.view(), by_column.view(), scratch);
    });
  }
  const ScalarType type = sizeof(A) == 4 ? ScalarType::Float : ScalarType::Double;
  Tensor logsumexp = torch::stable::new_empty(call.x, {pairs.rows}, type);
  Tensor total = torch::stable::new_empty(call.x, {pairs.rows}, type);
  Tensor count = torch::stable::new_empty(call.x, {pairs.rows}, ScalarType::Long);
  const double weight = weight_logarithm(call);
  for (int64_t i = 0; i < pairs.rows; ++i) {
    double top = by_row.top[i], sum = by_row.sum[i], all = by_row.total[i];
    int64_t found = by_row.count[i];
    if (pairs.own) {
      const double other = by_column.top[i], larger = std::max(top, other);
      if (larger > -INFINITY) {
        sum = sum * std::exp2(top - larger) + by_column.sum[i] * std::exp2(other - larger);
      } else {
        sum += by_column.sum[i];
      }
      top = larger;
      all += by_column.total[i];
      found += by_column.count[i];
    }
    const bool none = top == -INFINITY && !std::isnan(sum);
    const double value = none ? -INFINITY : kLn2 * top + std::log(sum) + weight;
    static_cast<A*>(logsumexp.mutable_data_ptr())[i] = static_cast<A>(value);
    static_cast<A*>(total.mutable_data_ptr())[i] = static_cast<A>(kLn2 * all);
    static_cast<int64_t*>(count.mutable_data_ptr())[i] = found;
  }
  return {logsumexp, total, count};
}

struct Wanted {
  bool x, y, bias;
};

// gradient = factor (sum x - product), or factor product for the inner product.
template <typename A>
Tensor finish_gradient(const Problem<A>& problem, const Tensor& like, const A* points,
                       const Buffer<A>& product, const Buffer<A>& other_product,
                       const Buffer<A>& sum, const Buffer<A>& other_sum, int64_t padded_features) {
  const int64_t count = like.size(0), features = like.size(1);
  const PairKind kind = problem.pairs().kind;
  const A factor = static_cast<A>(problem.scale() * (kind == kSquaredDistance ? 2.0 : 1.0));
  const bool both = !other_product.empty();
  Tensor found = torch::stable::new_empty(like, {count, features},
                                          sizeof(A) == 4 ? ScalarType::Float : ScalarType::Double);
  A* to = static_cast<A*>(found.mutable_data_ptr());
  problem.for_rows(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A weight = both ? sum[i] + other_sum[i] : sum[i];
      for (int64_t d = 0; d < features; ++d) {
        const int64_t at = i * padded_features + d;
        const A value = both ? product[at] + other_product[at] : product[at];
        to[i * features + d] =
            factor * (kind == kInnerProduct ? value : weight * points[i * features + d] - value);
      }
    }
  });
  return torch::stable::to(found, like.scalar_type());
}

template <typename A>
Result backward_of(const Tensor& logsumexp, const MaybeTensor& grad_logsumexp,
                   const MaybeTensor& grad_total, const Arguments& call, Wanted wanted) {
  const Problem<A> problem(call);
  const Pairwise& pairs = problem.pairs();
  const auto by_row = [&](const MaybeTensor& values) {
    Buffer<A> padded = problem.zeros(pairs.padded);
    if (values.has_value()) {
      const Tensor from = contiguous(*values);
      const A* data = static_cast<const A*>(from.const_data_ptr());
      std::copy(data, data + pairs.rows, padded.begin());
    }
    return padded;
  };
  Buffer<A> lse = by_row(logsumexp), grad_lse = by_row(grad_logsumexp);
  const Buffer<A> totals = by_row(grad_total);
  const double weight = weight_logarithm(call);
  for (int64_t i = 0; i < pairs.rows; ++i) {
    if (lse[i] == -INFINITY) {  // no pair has a weight: whatever came, nothing goes on
      lse[i] = INFINITY;
      grad_lse[i] = 0;
    } else {
      lse[i] = static_cast<A>((lse[i] - weight) * kLog2e);
    }
  }
  const int64_t width = divide_up(pairs.features, kPadding) * kPadding;
  const bool x_product = wanted.x, y_product = pairs.own ? wanted.x : wanted.y;
  PairGradient gradient{};
  gradient.logsumexp = lse.data();
  gradient.grad_logsumexp = grad_lse.data();
  gradient.grad_total = totals.data();
  gradient.padded_features = width;
  Buffer<A> x_features, y_features, row_product, column_product;
  if (x_product || (pairs.own && y_product)) {
    y_features = problem.packed_features(problem.y(), pairs.columns);
    gradient.y = y_features.data();
    row_product = problem.zeros(pairs.rows * width);
    gradient.row_product = row_product.data();
  }
  if (y_product) {
    if (!pairs.own) {
      x_features = problem.packed_features(problem.x(), pairs.rows);
    }
    gradient.x = pairs.own ? y_features.data() : x_features.data();
    column_product = problem.zeros(pairs.columns * width);
    gradient.column_product = column_product.data();
  }
  Buffer<A> row_sum = problem.zeros(pairs.padded), column_sum = row_sum, row_bias = row_sum,
            column_bias = row_sum;
  gradient.row_sum = row_sum.data();
  gradient.column_sum = column_sum.data();
  gradient.row_bias = row_bias.data();
  gradient.column_bias = column_bias.data();
  problem.for_blocks([&](const PairBlock& at, A* scratch, bool both) {
    problem.kernel().backward(pairs, gradient, at, both, scratch);
  });
  const auto none = [&] { return torch::stable::new_empty(call.x, {0}, call.x.scalar_type()); };
  Tensor grad_bias = none();
  if (wanted.bias) {
    grad_bias = torch::stable::new_empty(logsumexp, {pairs.columns}, logsumexp.scalar_type());
    A* to = static_cast<A*>(grad_bias.mutable_data_ptr());
    for (int64_t j = 0; j < pairs.columns; ++j) {
      to[j] = column_bias[j] + row_bias[j];
    }
  }
  const Buffer<A> unused;
  return {wanted.x
              ? finish_gradient(problem, call.x, problem.x(), row_product,
                                pairs.own ? column_product : unused, row_sum, column_sum, width)
              : none(),
          wanted.y ? finish_gradient(problem, *call.y, problem.y(), column_product, unused,
                                     column_sum, unused, width)
                   : none(),
          grad_bias};
}

Result pairwise_logsumexp(const Tensor& x, const MaybeTensor& y, const MaybeTensor& column_bias,
                          const MaybeTensor& labels, const MaybeTensor& column_labels,
                          const MaybeTensor& targets, const MaybeTensor& predictions,
                          const Tensor& scale, int64_t kind, int64_t rule, double window,
                          double push, bool exclude_self) {
  const Arguments call{x,     y,    column_bias, labels, column_labels, targets,     predictions,
                       scale, kind, rule,        window, push,          exclude_self};
  return storage_type(x) == kDouble ? forward_of<double>(call) : forward_of<float>(call);
}

Result pairwise_logsumexp_backward(const Tensor& logsumexp, const MaybeTensor& grad_logsumexp,
                                   const MaybeTensor& grad_total, const Tensor& x,
                                   const MaybeTensor& y, const MaybeTensor& column_bias,
                                   const MaybeTensor& labels, const MaybeTensor& column_labels,
                                   const MaybeTensor& targets, const MaybeTensor& predictions,
                                   const Tensor& scale, int64_t kind, int64_t rule, double window,
                                   double push, bool exclude_self, bool wants_x, bool wants_y,
                                   bool wants_bias) {
  const Arguments call{x,     y,    column_bias, labels, column_labels, targets,     predictions,
                       scale, kind, rule,        window, push,          exclude_self};
  const Wanted wanted{wants_x, wants_y, wants_bias};
  return storage_type(x) == kDouble
             ? backward_of<double>(logsumexp, grad_logsumexp, grad_total, call, wanted)
             : backward_of<float>(logsumexp, grad_logsumexp, grad_total, call, wanted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("pairwise_logsumexp", TORCH_BOX(&pairwise_logsumexp));
  library.impl("pairwise_logsumexp_backward", TORCH_BOX(&pairwise_logsumexp_backward));
}

}  // namespace regularizers
