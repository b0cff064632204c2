// prefix_linear on the CPU: y_i = W[:, :k_i] x_i[:k_i] and its two gradients as dense products.
//
// Rows are sorted by k, longest first, and the features are cut into panels at quantiles of k. The
// rows that reach into a panel are then the leading ones, so each panel is one product of full
// matrices, by the BLAS that PyTorch brings. The price over the work that is kept: rows that end
// inside a panel count to its end, about 1 / (2 panels) of the work for k spread evenly.
//
// Each thread takes a strip, every threads-th of the sorted rows, and multiplies its panels alone:
// one meeting of the threads a product, where threads inside of every panel would meet at each.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

// A contiguous input without autograd's marks. Worker threads are not below autograd, and would
// have it follow what they do with a tensor that requires grad.
class Plain {
 public:
  explicit Plain(const Tensor& tensor) : owner_(torch::stable::contiguous(tensor)) {
    const std::vector<int64_t> sizes(owner_.sizes().begin(), owner_.sizes().end()),
        strides(owner_.strides().begin(), owner_.strides().end());
    view_ = torch::stable::from_blob(owner_.mutable_data_ptr(), sizes, strides, owner_.device(),
                                     owner_.scalar_type());
  }

  const Tensor& operator*() const { return view_; }

 private:
  Tensor owner_, view_;
};

// Rows dealt to strips in the order of their lengths, and the panels of features.
struct Buckets {
  struct Strip {
    int64_t begin;
    std::vector<int64_t> rows;  // rows[j] rows of the strip reach beyond e_j: its leading ones
  };
  std::vector<int64_t> order, kept;  // [rows]: strip after strip, longest first in each
  std::vector<int64_t> padded;       // [rows]: where the last panel of a row ends
  std::vector<int64_t> edges;        // 0 = e_0 < e_1 < ... = largest k
  std::vector<Strip> strips;
  bool uniform;  // all lengths are equal, and `order` changes nothing

  Buckets(const Tensor& k, int64_t count, int64_t features, int64_t outputs)
      : order(count), kept(count), padded(count) {
    const Tensor lengths = torch::stable::contiguous(k);
    const int64_t* values = static_cast<const int64_t*>(lengths.const_data_ptr());
    const bool one = k.dim() == 0;
    for (int64_t i = 0; i < (one ? std::min<int64_t>(count, 1) : count); ++i) {
      if (values[i] < 1 || values[i] > features) {
        throw std::invalid_argument("k must lie in [1, " + std::to_string(features) + "], got " +
                                    std::to_string(values[i]));
      }
    }
    std::iota(order.begin(), order.end(), int64_t{0});
    if (!one) {
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return values[a] > values[b]; });
    }
    const auto length = [&](int64_t i) { return values[one ? 0 : order[i]]; };
    for (int64_t i = 0; i < count; ++i) {
      kept[i] = length(i);
    }
    uniform = count == 0 || kept.front() == kept.back();
    edges = {0};
    if (count > 0) {
      cut(outputs);
      deal(outputs);
    }
    for (int64_t i = 0; i < count; ++i) {
      kept[i] = length(i);
      padded[i] = *std::lower_bound(edges.begin(), edges.end(), kept[i]);
    }
    for (Strip& strip : strips) {
      for (int64_t j = 0; j < panels(); ++j) {
        const auto begin = kept.begin() + strip.begin, end = begin + strip.rows[0];
        strip.rows.push_back(
            std::partition_point(begin, end, [&](int64_t k) { return k > edges[j]; }) - begin);
      }
      strip.rows.erase(strip.rows.begin());
    }
  }

  int64_t panels() const { return static_cast<int64_t>(edges.size()) - 1; }
  int64_t largest() const { return edges.back(); }

 private:
  // Panels; `kept` is sorted.
  void cut(int64_t outputs) {
    constexpr int64_t kMostPanels = 16, kStep = 64, kPanelProducts = 1 << 21;
    const int64_t count = static_cast<int64_t>(kept.size());
    // A product of fewer multiplications costs more in the call than its panel saves.
    const int64_t wanted = std::clamp<int64_t>(count * kept.front() * outputs / kPanelProducts,
                                               int64_t{1}, std::min(kMostPanels, count));
    for (int64_t p = wanted - 1; p >= 0; --p) {
      const int64_t quantile = kept[count * p / wanted];
      const int64_t edge = std::min(divide_up(quantile, kStep) * kStep, kept.front());
      if (edge > edges.back()) {
        edges.push_back(edge);
      }
    }
  }

  // Strips: of sorted rows like cards, so that all have the same work.
  void deal(int64_t outputs) {
    constexpr int64_t kLeastRows = 32, kStripProducts = 1 << 21;
    const int64_t count = static_cast<int64_t>(order.size());
    const int64_t threads = torch::stable::get_num_threads();
    const bool pays =
        count / threads >= kLeastRows && count * largest() * outputs / threads >= kStripProducts;
    const int64_t number = pays ? threads : 1;
    const std::vector<int64_t> sorted = order;
    int64_t next = 0;
    for (int64_t s = 0; s < number; ++s) {
      const int64_t begin = next;
      if (uniform) {
        next = count * (s + 1) / number;
      } else {
        for (int64_t i = s; i < count; i += number) {
          order[next++] = sorted[i];
        }
      }
      strips.push_back({begin, {next - begin}});
    }
  }
};

// A product of matrices: out = left right, bias + left right, or out + left right.
struct Product {
  Tensor out, left, right;
  std::optional<Tensor> added;  // the bias, or `out` itself

  void run() const {
    if (added.has_value()) {
      STABLE_TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(out.get(), added->get(), left.get(), right.get(), 1.0, 1.0));
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
    }
  }
};

// Lists of products. One list has BLAS's threads to itself; several run side by side, each on one
// thread.
void run(const std::vector<std::vector<Product>>& lists) {
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (const Product& product : lists[static_cast<size_t>(i)]) {
        product.run();
      }
    }
  };
  if (lists.size() == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, static_cast<int64_t>(lists.size()), 1, work);
  }
}

Tensor part(Tensor matrix, int64_t dimension, int64_t begin, int64_t end) {
  return torch::stable::narrow(matrix, dimension, begin, end - begin);
}
Tensor columns(const Tensor& matrix, int64_t begin, int64_t end) {
  return part(matrix, 1, begin, end);
}
Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// One call: the buckets, and copies of rows between the order of the caller and that of the strips.
struct Call {
  StorageType type;
  bool narrow;  // the storage type is narrower than the accumulation type
  int64_t features, outputs;
  Buckets buckets;

  Call(const Tensor& x, const Tensor& weight, const Tensor& k)
      : type(storage_type(x)),
        narrow(accumulate_type(type) != x.scalar_type()),
        features(x.size(1)),
        outputs(weight.size(0)),
        buckets(k, x.size(0), features, outputs) {}

  int64_t rows() const { return static_cast<int64_t>(buckets.order.size()); }
  // Rows of the caller serve as they are.
  bool direct() const { return buckets.uniform && !narrow; }

  Tensor empty(const Tensor& like, int64_t count, int64_t width) const {
    const Tensor out = torch::stable::new_empty(like, {count, width}, accumulate_type(type));
    advise_huge_pages(out.mutable_data_ptr(),
                      static_cast<size_t>(count * width * accumulate_bytes(type)));
    return out;
  }

  Tensor wide(const Tensor& tensor) const {
    return narrow ? torch::stable::to(tensor, accumulate_type(type)) : tensor;
  }

  // The rows of x by strip; behind a prefix zeros to the end of its last panel, then nothing.
  Tensor sorted_prefixes(const Tensor& x) const {
    if (direct()) {
      return columns(x, 0, buckets.largest());
    }
    const Tensor out = empty(x, rows(), buckets.largest());
    copy(kernels().prefix[type].gather, x, out, buckets.kept, buckets.padded);
    return out;
  }

  Tensor sorted_rows(const Tensor& full) const {
    if (direct()) {
      return full;
    }
    const Tensor out = empty(full, rows(), full.size(1));
    const std::vector<int64_t> width(buckets.order.size(), full.size(1));
    copy(kernels().prefix[type].gather, full, out, width, width);
    return out;
  }

  // Back to the caller's order and type: `kept` entries of each row, then zeros.
  void put_back(const Tensor& sorted, const Tensor& out, const std::vector<int64_t>& kept) const {
    const std::vector<int64_t> width(buckets.order.size(), out.size(1));
    copy(kernels().prefix[type].scatter, sorted, out, kept, width);
  }

  // Calls body(strip, begin, end, first row, end of the rows) for every panel of a strip.
  template <typename Body>
  void for_panels(const Buckets::Strip& strip, const Body& body) const {
    for (int64_t j = 0; j < buckets.panels() && strip.rows[j] > 0; ++j) {
      body(buckets.edges[j], buckets.edges[j + 1], strip.begin, strip.begin + strip.rows[j]);
    }
  }

 private:
  void copy(void (*kernel)(const PrefixRows&, int64_t, int64_t), const Tensor& from,
            const Tensor& to, const std::vector<int64_t>& kept,
            const std::vector<int64_t>& width) const {
    constexpr int64_t kTaskElements = 1 << 15;
    const PrefixRows call{from.const_data_ptr(), to.mutable_data_ptr(), buckets.order.data(),
                          kept.data(),           width.data(),          from.stride(0),
                          to.stride(0)};
    const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, to.size(1)));
    torch::stable::parallel_for(0, rows(), grain,
                                [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  }
};

Tensor prefix_linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias,
                     const Tensor& k) {
  const Plain plain_x(x_), plain_weight(weight_);
  const Tensor &x = *plain_x, &weight = *plain_weight;
  const Call call(x, weight, k);
  const Tensor out = torch::stable::new_empty(x, {call.rows(), call.outputs});
  if (out.numel() == 0) {
    return out;
  }
  const Tensor features = call.sorted_prefixes(x);
  const Tensor w = transposed(call.wide(columns(weight, 0, call.buckets.largest())));
  const std::optional<Plain> plain_bias =
      bias.has_value() ? std::optional<Plain>(*bias) : std::nullopt;
  const std::optional<Tensor> b =
      plain_bias.has_value() ? std::optional(call.wide(**plain_bias)) : std::nullopt;
  const Tensor y = call.direct() ? out : call.empty(x, call.rows(), call.outputs);
  std::vector<std::vector<Product>> lists;
  for (const Buckets::Strip& strip : call.buckets.strips) {
    lists.emplace_back();
    call.for_panels(strip, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      const Tensor to = part(y, 0, first, last);
      lists.back().push_back({to, columns(part(features, 0, first, last), begin, end),
                              part(w, 0, begin, end), begin > 0 ? std::optional(to) : b});
    });
  }
  run(lists);
  if (!call.direct()) {
    call.put_back(y, out, std::vector<int64_t>(call.buckets.order.size(), call.outputs));
  }
  return out;
}

Tensor input_gradient(const Call& call, const Tensor& g, const Tensor& x, const Tensor& weight) {
  const int64_t largest = call.buckets.largest();
  const Tensor w = call.wide(columns(weight, 0, largest));
  const Tensor grad_x = torch::stable::new_empty(x, {call.rows(), call.features});
  const Tensor sorted = call.direct() ? grad_x : call.empty(x, call.rows(), largest);
  std::vector<std::vector<Product>> lists;
  for (const Buckets::Strip& strip : call.buckets.strips) {
    lists.emplace_back();
    call.for_panels(strip, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      lists.back().push_back({columns(part(sorted, 0, first, last), begin, end),
                              part(g, 0, first, last), columns(w, begin, end), std::nullopt});
    });
  }
  run(lists);
  if (!call.direct()) {
    call.put_back(sorted, grad_x, call.buckets.kept);
  } else if (largest < call.features) {
    Tensor rest = columns(grad_x, largest, call.features);
    torch::stable::zero_(rest);
  }
  return grad_x;
}

// Each list takes a range of outputs, for all strips of rows.
Tensor weight_gradient(const Call& call, const Tensor& g, const Tensor& x) {
  constexpr int64_t kLeastOutputs = 32;
  const int64_t largest = call.buckets.largest();
  const Tensor features = call.sorted_prefixes(x);
  const Tensor wide = call.empty(x, call.outputs, call.features);
  const int64_t strips = static_cast<int64_t>(call.buckets.strips.size());
  const int64_t ranges = call.outputs / strips >= kLeastOutputs ? strips : 1;
  std::vector<std::vector<Product>> lists;
  for (int64_t r = 0; r < ranges; ++r) {
    const int64_t from = call.outputs * r / ranges, to = call.outputs * (r + 1) / ranges;
    lists.emplace_back();
    for (const Buckets::Strip& strip : call.buckets.strips) {
      call.for_panels(strip, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
        const Tensor out = columns(part(wide, 0, from, to), begin, end);
        const Tensor left = transposed(columns(part(g, 0, first, last), from, to));
        // The first strip has the longest row, hence all panels.
        lists.back().push_back({out, left, columns(part(features, 0, first, last), begin, end),
                                strip.begin > 0 ? std::optional(out) : std::nullopt});
      });
    }
  }
  run(lists);
  if (largest < call.features) {
    Tensor rest = columns(wide, largest, call.features);
    torch::stable::zero_(rest);
  }
  return call.narrow ? torch::stable::to(wide, x.scalar_type()) : wide;
}

std::tuple<Tensor, Tensor> prefix_linear_backward(const Tensor& grad_, const Tensor& x_,
                                                  const Tensor& weight_, const Tensor& k,
                                                  bool wants_x, bool wants_weight) {
  const Plain plain_grad(grad_), plain_x(x_), plain_weight(weight_);
  const Tensor &grad = *plain_grad, &x = *plain_x, &weight = *plain_weight;
  const Call call(x, weight, k);
  const bool none = grad.numel() == 0;
  const auto zeros = [&](bool wanted, int64_t rows) {
    return wanted ? torch::stable::new_zeros(x, {rows, call.features})
                  : torch::stable::new_empty(x, {0});
  };
  const Tensor g = none ? grad : call.sorted_rows(grad);
  return {wants_x && !none ? input_gradient(call, g, x, weight) : zeros(wants_x, call.rows()),
          wants_weight && !none ? weight_gradient(call, g, x) : zeros(wants_weight, call.outputs)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("prefix_linear", TORCH_BOX(&prefix_linear));
  library.impl("prefix_linear_backward", TORCH_BOX(&prefix_linear_backward));
}

}  // namespace regularizers
