// Layouts that elementwise operators keep: row-major and channels_last. Everything else is copied
// once.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common.h"

namespace regularizers {

// As torch.Tensor.is_contiguous(memory_format=channels_last or channels_last_3d).
inline bool is_channels_last(const Tensor& x) {
  const int64_t dimensions = x.dim();
  if (dimensions != 4 && dimensions != 5) {
    return false;
  }
  int64_t expected = 1;
  for (int64_t place = 0; place < dimensions; ++place) {
    // Channels move fastest, then the last dimension, and the batch slowest.
    const int64_t d = place == 0 ? 1 : (place == dimensions - 1 ? 0 : dimensions - place);
    if (x.size(d) != 1) {
      if (x.stride(d) != expected) {
        return false;
      }
      expected *= x.size(d);
    }
  }
  return true;
}

// A new tensor as ops/_layout.py's `empty_dense` gives it.
inline Tensor empty_dense(const Tensor& x) {
  if (!x.is_contiguous() && is_channels_last(x)) {
    return torch::stable::empty_like(x);
  }
  return torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()),
                                  x.scalar_type());
}

// `x` itself where its elements lie in memory as those of `like`, else a copy that does.
inline Tensor in_layout_of(const Tensor& like, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1 && x.stride(d) != like.stride(d)) {
      Tensor copy = torch::stable::empty_like(like);
      torch::stable::copy_(copy, x);
      return copy;
    }
  }
  return x;
}

}  // namespace regularizers
