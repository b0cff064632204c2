// prefix_linear on the CPU: y_i = W[:, :k_i] x_i[:k_i] and its two gradients as dense products.
//
// Rows are sorted by k, longest first, and the features are cut into panels at quantiles of k. The
// rows that reach into a panel are then the leading ones, so each panel is one product of full
// matrices, by the BLAS that PyTorch brings. The price over the work that is kept: rows that end
// inside a panel count to its end, about 1 / (2 panels) of the work for k spread evenly.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

// Rows in the order of their lengths, and the panels of features.
struct Buckets {
  std::vector<int64_t> order, kept;  // [rows], longest first
  std::vector<int64_t> edges;        // 0 = e_0 < e_1 < ... = largest k
  std::vector<int64_t> rows;         // rows[j] rows reach beyond e_j
  std::vector<int64_t> padded;       // [rows]: the edge at which the last panel of a row ends
  bool uniform;                      // all lengths are equal

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
    for (int64_t i = 0; i < count; ++i) {
      kept[i] = values[one ? 0 : order[i]];
    }
    uniform = count == 0 || kept.front() == kept.back();
    cut(outputs);
  }

  int64_t panels() const { return static_cast<int64_t>(edges.size()) - 1; }
  int64_t largest() const { return edges.back(); }

 private:
  void cut(int64_t outputs) {
    constexpr int64_t kMostPanels = 16, kStep = 64, kPanelProducts = 1 << 21;
    const int64_t count = static_cast<int64_t>(kept.size());
    edges = {0};
    if (count == 0) {
      return;
    }
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
    for (size_t j = 0, i = kept.size(); j + 1 < edges.size(); ++j) {
      while (kept[i - 1] <= edges[j]) {
        --i;
      }
      rows.push_back(static_cast<int64_t>(i));
      std::fill_n(padded.begin(), i, edges[j + 1]);
    }
  }
};

// out = left right, or bias + left right, or, where `add`, out + left right.
void multiply(const Tensor& out, const Tensor& left, const Tensor& right,
              const std::optional<Tensor>& bias = std::nullopt, bool add = false) {
  if (add || bias.has_value()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), (add ? out : *bias).get(),
                                                           left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  }
}

Tensor head(Tensor matrix, int64_t rows) { return torch::stable::narrow(matrix, 0, 0, rows); }
Tensor columns(Tensor matrix, int64_t begin, int64_t end) {
  return torch::stable::narrow(matrix, 1, begin, end - begin);
}
Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// One call: the buckets, and copies of rows between the order of the caller and that of lengths.
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
    Tensor out = torch::stable::new_empty(like, {count, width}, accumulate_type(type));
    advise_huge_pages(out.mutable_data_ptr(),
                      static_cast<size_t>(count * width * accumulate_bytes(type)));
    return out;
  }

  Tensor wide(const Tensor& tensor) const {
    return narrow ? torch::stable::to(tensor, accumulate_type(type)) : tensor;
  }

  // The rows of x by length; behind a prefix zeros to the end of its last panel, then nothing.
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
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const Call call(x, weight, k);
  const Buckets& buckets = call.buckets;
  const Tensor out = torch::stable::new_empty(x, {call.rows(), call.outputs});
  if (out.numel() == 0) {
    return out;
  }
  const Tensor features = call.sorted_prefixes(x);
  const Tensor w = call.wide(columns(weight, 0, buckets.largest()));
  const std::optional<Tensor> b = bias.has_value() ? std::optional(call.wide(*bias)) : std::nullopt;
  const Tensor y = call.direct() ? out : call.empty(x, call.rows(), call.outputs);
  for (int64_t j = 0; j < buckets.panels(); ++j) {
    const int64_t rows = buckets.rows[j], begin = buckets.edges[j], end = buckets.edges[j + 1];
    multiply(head(y, rows), columns(head(features, rows), begin, end),
             transposed(columns(w, begin, end)), b, /*add=*/j > 0);
  }
  if (!call.direct()) {
    call.put_back(y, out, std::vector<int64_t>(buckets.order.size(), call.outputs));
  }
  return out;
}

std::tuple<Tensor, Tensor> prefix_linear_backward(const Tensor& grad_, const Tensor& x_,
                                                  const Tensor& weight_, const Tensor& k,
                                                  bool wants_x, bool wants_weight) {
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_),
               weight = torch::stable::contiguous(weight_);
  const Call call(x, weight, k);
  const Buckets& buckets = call.buckets;
  const auto zeros = [&](bool wanted, int64_t rows) {
    return wanted ? torch::stable::new_zeros(x, {rows, call.features})
                  : torch::stable::new_empty(x, {0});
  };
  if (grad.numel() == 0) {
    return {zeros(wants_x, call.rows()), zeros(wants_weight, call.outputs)};
  }
  const Tensor g = call.sorted_rows(grad);
  const int64_t largest = buckets.largest();
  Tensor grad_x, grad_weight;
  if (wants_x) {
    const Tensor w = call.wide(columns(weight, 0, largest));
    grad_x = torch::stable::new_empty(x, {call.rows(), call.features});
    const Tensor sorted = call.direct() ? grad_x : call.empty(x, call.rows(), largest);
    for (int64_t j = 0; j < buckets.panels(); ++j) {
      const int64_t rows = buckets.rows[j], begin = buckets.edges[j], end = buckets.edges[j + 1];
      multiply(columns(head(sorted, rows), begin, end), head(g, rows), columns(w, begin, end));
    }
    if (!call.direct()) {
      call.put_back(sorted, grad_x, buckets.kept);
    } else if (largest < call.features) {
      Tensor rest = columns(grad_x, largest, call.features);
      torch::stable::zero_(rest);
    }
  } else {
    grad_x = zeros(false, 0);
  }
  if (wants_weight) {
    const Tensor features = call.sorted_prefixes(x);
    Tensor wide = call.empty(x, call.outputs, call.features);
    for (int64_t j = 0; j < buckets.panels(); ++j) {
      const int64_t rows = buckets.rows[j], begin = buckets.edges[j], end = buckets.edges[j + 1];
      multiply(columns(wide, begin, end), transposed(head(g, rows)),
               columns(head(features, rows), begin, end));
    }
    if (largest < call.features) {
      Tensor rest = columns(wide, largest, call.features);
      torch::stable::zero_(rest);
    }
    grad_weight = call.narrow ? torch::stable::to(wide, x.scalar_type()) : wide;
  } else {
    grad_weight = zeros(false, 0);
  }
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("prefix_linear", TORCH_BOX(&prefix_linear));
  library.impl("prefix_linear_backward", TORCH_BOX(&prefix_linear_backward));
}

}  // namespace regularizers
