// What the baseline files share: reading tensors through LibTorch's stable ABI, storage types,
// threads, errors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"

namespace regularizers {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of the instruction set that this process uses, chosen at the first call.
inline const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (chosen_isa()) {
#if defined(REGULARIZERS_WIDE_X86)
      case Isa::avx512:
        return avx512::kernels();
      case Isa::avx2:
        return avx2::kernels();
#endif
      default:
        return baseline::kernels();
    }
  }();
  return chosen;
}

// std::invalid_argument reaches Python as ValueError, also through the dispatcher and from compiled
// code.
inline void check(bool condition, const std::string& message) {
  if (!condition) {
    throw std::invalid_argument(message);
  }
}

inline StorageType storage_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kHalf;
    default:
      throw std::invalid_argument("x must be float32, float64, bfloat16 or float16");
  }
}

inline ScalarType accumulate_type(StorageType type) {
  return type == kDouble ? ScalarType::Double : ScalarType::Float;
}
inline int64_t accumulate_bytes(StorageType type) { return type == kDouble ? 8 : 4; }

// Scheduled quantities are 0-dimensional float64 tensors; their value is checked here, before
// anything is written.
inline double scheduled_value(const std::string& name, const Tensor& tensor, bool one_allowed) {
  const double value = *static_cast<const double*>(tensor.const_data_ptr());
  check(value >= 0.0 && (value < 1.0 || (one_allowed && value == 1.0)),
        name + " must lie in [0, 1" + (one_allowed ? "]" : ")") + ", got " + std::to_string(value));
  return value;
}

inline uint64_t seed_value(const Tensor& seed) {
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

// Asks for huge pages under a large output that is about to be written for the first time. A fresh
// 32 MB tensor costs 8192 page faults otherwise, which take several times as long as the kernels
// that write it. Only whole huge pages inside the tensor are named, so no memory is added; the
// kernel may decline, and nothing depends on it.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{1} << 21;
  const uintptr_t first =
      (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace regularizers
