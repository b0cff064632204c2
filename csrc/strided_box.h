// A logical, row-major box of elements and how it lies in memory on two sides: what kernels walk
// over when a tensor keeps its layout.
#pragma once

#include <cstdint>

namespace regularizers {

constexpr int kMaxDimensions = 16;
struct StridedBox {
  int dimensions;
  int64_t size[kMaxDimensions];
  int64_t from_stride[kMaxDimensions];
  int64_t to_stride[kMaxDimensions];
};

static inline bool is_contiguous(const StridedBox& box) {
  return box.dimensions == 1 && box.from_stride[0] == 1 && box.to_stride[0] == 1;
}

}  // namespace regularizers
