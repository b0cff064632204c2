// mini_float_bias, mini_float_pack and mini_float_unpack on the CPU: formats, threads,
// registration. The arithmetic is in mini_float_kernels.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

using torch::stable::contiguous;

constexpr int64_t kTaskElements = 1 << 15;  // whole blocks, so that tasks share no byte
constexpr int64_t kLargestBias = 500;

static_assert(kTaskElements % kMiniFloatBlock == 0);

// In the order of _shared/checks.py.
constexpr ScalarType kTypes[kStorageTypes] = {ScalarType::Float, ScalarType::Double,
                                              ScalarType::BFloat16, ScalarType::Half};

MiniFloatFormat format_of(const Tensor& bias, int64_t exp_bits, int64_t man_bits, bool is_signed,
                          bool has_inf_nan, bool dense) {
  MiniFloatFormat format{};
  format.exp_bits = exp_bits;
  format.man_bits = man_bits;
  format.bits = exp_bits + man_bits + (is_signed ? 1 : 0);
  format.stored_bits = dense ? format.bits : 8;
  format.is_signed = is_signed;
  format.has_inf_nan = has_inf_nan;
  const int64_t fields = int64_t{1} << exp_bits;
  format.largest = has_inf_nan ? (fields - 1) << man_bits : (fields << man_bits) - 1;
  format.bias = *static_cast<const int32_t*>(bias.const_data_ptr());
  if (format.bias < -kLargestBias || format.bias > kLargestBias) {
    check(false, "bias must lie in [-500, 500], got " + std::to_string(format.bias));
  }
  return format;
}

// Calls body(first element, count) for runs of whole tasks.
template <typename Body>
void for_runs(int64_t elements, const Body& body) {
  const int64_t tasks = divide_up(elements, kTaskElements);
  if (tasks <= 1) {
    body(int64_t{0}, elements);
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kTaskElements;
    body(first, std::min(end * kTaskElements, elements) - first);
  });
}

Tensor mini_float_bias(const Tensor& x, int64_t exp_bits, bool has_inf_nan) {
  const Tensor from = contiguous(x);
  const char* data = static_cast<const char*>(from.const_data_ptr());
  const int64_t elements = x.numel(), bytes = static_cast<int64_t>(x.element_size());
  const auto kernel = kernels().mini_float[storage_type(x)].largest;
  std::vector<double> largest(static_cast<size_t>(divide_up(elements, kTaskElements) + 1), 0.0);
  for_runs(elements, [&](int64_t first, int64_t count) {
    largest[static_cast<size_t>(first / kTaskElements)] = kernel(data + first * bytes, count);
  });
  const double most = *std::max_element(largest.begin(), largest.end());
  int64_t bias = (int64_t{1} << (exp_bits - 1)) - 1;
  if (most > 0.0) {
    bias = (int64_t{1} << exp_bits) - 1 - (has_inf_nan ? 1 : 0) - std::ilogb(most);
  }
  Tensor found = torch::stable::new_empty(x, {}, ScalarType::Int);
  *static_cast<int32_t*>(found.mutable_data_ptr()) =
      static_cast<int32_t>(std::clamp(bias, -kLargestBias, kLargestBias));
  return found;
}

Tensor mini_float_pack(const Tensor& x, const Tensor& bias, int64_t exp_bits, int64_t man_bits,
                       bool is_signed, bool has_inf_nan, bool dense) {
  const MiniFloatFormat format = format_of(bias, exp_bits, man_bits, is_signed, has_inf_nan, dense);
  const Tensor from = contiguous(x);
  const int64_t elements = x.numel(), bytes = static_cast<int64_t>(x.element_size());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (dense) {
    shape = {divide_up(elements * format.bits, 8)};
  }
  Tensor packed = torch::stable::new_empty(x, shape, ScalarType::Byte);
  const char* data = static_cast<const char*>(from.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  advise_huge_pages(to, static_cast<size_t>(packed.numel()));
  const auto kernel = kernels().mini_float[storage_type(x)].encode;
  std::atomic<bool> finite{true};
  for_runs(elements, [&](int64_t first, int64_t count) {
    if (!kernel(format, data + first * bytes, count, to + first * format.stored_bits / 8)) {
      finite = false;
    }
  });
  check(finite, "x must be finite, got NaN or infinity");
  return packed;
}

Tensor mini_float_unpack(const Tensor& packed, const Tensor& bias, int64_t elements,
                         int64_t exp_bits, int64_t man_bits, bool is_signed, bool has_inf_nan,
                         bool dense, int64_t type) {
  check(type >= 0 && type < kStorageTypes, "type must name a storage type");
  const MiniFloatFormat format = format_of(bias, exp_bits, man_bits, is_signed, has_inf_nan, dense);
  const Tensor from = contiguous(packed);
  check(from.numel() == divide_up(elements * format.stored_bits, 8),
        "packed must hold count codes");
  Tensor found = torch::stable::new_empty(packed, {elements}, kTypes[type]);
  const int64_t bytes = static_cast<int64_t>(found.element_size());
  const uint8_t* data = static_cast<const uint8_t*>(from.const_data_ptr());
  char* to = static_cast<char*>(found.mutable_data_ptr());
  advise_huge_pages(to, static_cast<size_t>(elements * bytes));
  const auto kernel = kernels().mini_float[type].decode;
  std::atomic<bool> in_range{true};
  for_runs(elements, [&](int64_t first, int64_t count) {
    if (!kernel(format, data + first * format.stored_bits / 8, count, to + first * bytes)) {
      in_range = false;
    }
  });
  if (!in_range) {
    check(false, "packed must hold codes below " + std::to_string(int64_t{1} << format.bits));
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("mini_float_bias", TORCH_BOX(&mini_float_bias));
  library.impl("mini_float_pack", TORCH_BOX(&mini_float_pack));
  library.impl("mini_float_unpack", TORCH_BOX(&mini_float_unpack));
}

}  // namespace regularizers
