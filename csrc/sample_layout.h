// How tensors of dropout samples lie in memory, for CPU and CUDA: the layout of new ones, and any
// layout as a StridedBox. Apart from that struct, whose header the vectorised sources include: they
// see neither torch nor the standard library's containers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "strided_box.h"

namespace regularizers {

// A new tensor with the type and on the device of `like`. torch/csrc/stable/ops.h of 2.10 has no
// empty_strided.
inline torch::stable::Tensor empty_strided(const torch::stable::Tensor& like,
                                           const std::vector<int64_t>& sizes,
                                           const std::vector<int64_t>& strides) {
  int32_t dtype, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

// A new [num_samples, *] on the device of x, every sample laid out as empty_like(x).
inline torch::stable::Tensor empty_samples(const torch::stable::Tensor& x, int64_t num_samples) {
  // Only its strides are wanted; those of a contiguous x are known without it.
  const torch::stable::Tensor like = x.is_contiguous() ? x : torch::stable::empty_like(x);
  std::vector<int64_t> sizes{num_samples}, strides{std::max<int64_t>(x.numel(), 1)};
  for (int64_t d = 0; d < x.dim(); ++d) {
    sizes.push_back(x.size(d));
    strides.push_back(like.stride(d));
  }
  return empty_strided(x, sizes, strides);
}

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
