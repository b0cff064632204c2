// How a tensor's layout becomes a StridedBox. Apart from the struct, whose header the vectorised
// sources include: they see neither torch nor the standard library's exceptions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "strided_box.h"

namespace regularizers {

// The logical dimensions of one sample, neighbours merged wherever both sides step through them in
// one stride: a box that is contiguous on both sides has one dimension with strides 1.
inline StridedBox merged_box(const torch::stable::Tensor& like, int64_t first_dimension,
                             const torch::stable::Tensor& from, int64_t from_first,
                             const torch::stable::Tensor& to, int64_t to_first) {
  StridedBox box{};
  const int64_t dimensions = like.dim() - first_dimension;
  for (int64_t d = 0; d < dimensions; ++d) {
    const int64_t size = like.size(first_dimension + d);
    if (size == 1) {
      continue;
    }
    const int64_t from_stride = from.stride(from_first + d), to_stride = to.stride(to_first + d);
    const int last = box.dimensions - 1;
    if (last >= 0 && box.from_stride[last] == from_stride * size &&
        box.to_stride[last] == to_stride * size) {
      box.size[last] *= size;
      box.from_stride[last] = from_stride;
      box.to_stride[last] = to_stride;
      continue;
    }
    if (box.dimensions == kMaxDimensions) {
      throw std::invalid_argument("x must have at most 16 dimensions that do not merge");
    }
    box.size[box.dimensions] = size;
    box.from_stride[box.dimensions] = from_stride;
    box.to_stride[box.dimensions] = to_stride;
    ++box.dimensions;
  }
  if (box.dimensions == 0) {
    box = {1, {1}, {1}, {1}};
  }
  return box;
}

}  // namespace regularizers
