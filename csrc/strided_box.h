// A logical, row-major box of elements and how it lies in memory on two sides: what kernels walk
// over when a tensor keeps its layout.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace regularizers {

constexpr int kMaxDimensions = 16;
struct StridedBox {
  int dimensions;
  int64_t size[kMaxDimensions];
  int64_t from_stride[kMaxDimensions];
  int64_t to_stride[kMaxDimensions];
};

// The logical dimensions of one sample, neighbours merged wherever both sides step through them in
// one stride: a box that is contiguous on both sides has one dimension with strides 1. A template,
// so that the vectorised sources see no torch header.
template <typename Tensor>
StridedBox merged_box(const Tensor& like, int64_t first_dimension, const Tensor& from,
                      int64_t from_first, const Tensor& to, int64_t to_first) {
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

static inline bool is_contiguous(const StridedBox& box) {
  return box.dimensions == 1 && box.from_stride[0] == 1 && box.to_stride[0] == 1;
}

}  // namespace regularizers
