// dropout_samples and its adjoint on CUDA: x is read once for all its samples, masks are made in
// registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../philox.h"
#include "../sample_layout.h"

namespace regularizers {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Threads of a block, each with the elements of one Philox call.
constexpr int kThreads = 256;
// A small x is spread over more blocks by its samples, until there are about as many as a large GPU
// runs at once.
constexpr int64_t kFillingBlocks = 1024;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The elements of one Philox call.
template <typename T>
struct alignas(sizeof(T) * kWordsPerCall) Quad {
  T value[kWordsPerCall];
};

// Where the elements of one call lie when memory is contiguous and aligned on both sides.
struct PackedPlace {
  int64_t first;

  __device__ PackedPlace(const StridedBox&, int64_t first_element, int64_t)
      : first(first_element) {}

  template <typename T>
  __device__ Quad<T> load(const T* from) const {
    return *reinterpret_cast<const Quad<T>*>(from + first);
  }

  // __stcs: the results are many times the size of x and should not push it out of the cache. Also,
  // the compiler splits a plain store of selected values into four.
  template <typename T>
  __device__ void store(T* to, const Quad<T>& quad) const {
    using Piece = std::conditional_t<sizeof(Quad<T>) == sizeof(uint2), uint2, uint4>;
    constexpr int kPieces = sizeof(Quad<T>) / sizeof(Piece);
    Piece pieces[kPieces];
    memcpy(pieces, &quad, sizeof(quad));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      __stcs(reinterpret_cast<Piece*>(to + first) + i, pieces[i]);
    }
  }
};

// Where they lie otherwise, found once for all samples. The last call may have fewer than four.
struct StridedPlace {
  int count;
  int64_t from[kWordsPerCall], to[kWordsPerCall];

  __device__ StridedPlace(const StridedBox& box, int64_t first, int64_t elements)
      : count(static_cast<int>(min(elements - first, int64_t{kWordsPerCall}))) {
    const int last = box.dimensions - 1;
    int64_t inner = locate(box, first, 0);
#pragma unroll
    for (int j = 1; j < kWordsPerCall; ++j) {
      if (++inner < box.size[last]) {
        from[j] = from[j - 1] + box.from_stride[last];
        to[j] = to[j - 1] + box.to_stride[last];
      } else {
        inner = locate(box, first + j, j);
      }
    }
  }

  // Sets the offsets of one element and returns its index in the innermost dimension. Past the last
  // element the outermost index runs on, which `count` keeps from being used.
  __device__ int64_t locate(const StridedBox& box, int64_t element, int j) {
    const int64_t inner = box.dimensions == 1 ? element : element % box.size[box.dimensions - 1];
    from[j] = to[j] = 0;
    for (int d = box.dimensions - 1; d > 0; --d) {
      const int64_t index = element % box.size[d];
      element /= box.size[d];
      from[j] += index * box.from_stride[d];
      to[j] += index * box.to_stride[d];
    }
    from[j] += element * box.from_stride[0];
    to[j] += element * box.to_stride[0];
    return inner;
  }

  template <typename T>
  __device__ Quad<T> load(const T* base) const {
    Quad<T> quad{};
#pragma unroll
    for (int j = 0; j < kWordsPerCall; ++j) {
      if (j < count) {
        quad.value[j] = base[from[j]];
      }
    }
    return quad;
  }

  template <typename T>
  __device__ void store(T* base, const Quad<T>& quad) const {
#pragma unroll
    for (int j = 0; j < kWordsPerCall; ++j) {
      if (j < count) {
        base[to[j]] = quad.value[j];
      }
    }
  }
};

// Which elements of one call are kept.
struct Keep {
  uint32_t words[kWordsPerCall];
  DropRule rule;

  __device__ Keep(const DropRule& drop_rule, uint64_t seed, int64_t sample, int64_t call)
      : rule(drop_rule) {
    philox_call({seed, static_cast<uint32_t>(sample), 0}, static_cast<uint64_t>(call), words);
  }

  __device__ bool operator[](int j) const { return !rule.drops || words[j] > rule.last_dropped; }
};

// y_se = r x_e where m_se, else 0; r = 1 / (1 - p). Dropped elements are selected out, never
// multiplied: a NaN under a dropped element stays there.
template <typename T, typename Place>
__global__ void __launch_bounds__(kThreads)
    samples_kernel(const __grid_constant__ StridedBox box, const T* x, T* y, const double* p,
                   const int64_t* seed, int64_t elements, int64_t num_samples,
                   int64_t samples_per_block) {
  using A = Accumulate<T>;
  const int64_t call = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (call * kWordsPerCall >= elements) {
    return;
  }
  const Place place(box, call * kWordsPerCall, elements);
  const DropRule rule = drop_rule(*p);
  const uint64_t seed_bits = static_cast<uint64_t>(*seed);
  const A scale = static_cast<A>(keep_scale(*p));
  Quad<T> kept = place.load(x);
#pragma unroll
  for (int j = 0; j < kWordsPerCall; ++j) {
    kept.value[j] = static_cast<T>(static_cast<A>(kept.value[j]) * scale);
  }
  const int64_t begin = blockIdx.y * samples_per_block;
  const int64_t end = min(begin + samples_per_block, num_samples);
  for (int64_t sample = begin; sample < end; ++sample) {
    const Keep keep(rule, seed_bits, sample, call);
    Quad<T> result;
#pragma unroll
    for (int j = 0; j < kWordsPerCall; ++j) {
      result.value[j] = keep[j] ? kept.value[j] : static_cast<T>(A(0));
    }
    place.store(y + sample * elements, result);
  }
}

// dx_e = r sum_s (dy_se where m_se, else 0), added up in the order of samples.
template <typename T, typename Place>
__global__ void __launch_bounds__(kThreads)
    adjoint_kernel(const __grid_constant__ StridedBox box, const T* y, T* x, const double* p,
                   const int64_t* seed, int64_t elements, int64_t num_samples,
                   int64_t sample_stride) {
  using A = Accumulate<T>;
  const int64_t call = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (call * kWordsPerCall >= elements) {
    return;
  }
  const Place place(box, call * kWordsPerCall, elements);
  const DropRule rule = drop_rule(*p);
  const uint64_t seed_bits = static_cast<uint64_t>(*seed);
  const A scale = static_cast<A>(keep_scale(*p));
  A sum[kWordsPerCall] = {};
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    const Keep keep(rule, seed_bits, sample, call);
    const Quad<T> part = place.load(y + sample * sample_stride);
#pragma unroll
    for (int j = 0; j < kWordsPerCall; ++j) {
      sum[j] += keep[j] ? static_cast<A>(part.value[j]) : A(0);
    }
  }
  Quad<T> result;
#pragma unroll
  for (int j = 0; j < kWordsPerCall; ++j) {
    result.value[j] = static_cast<T>(sum[j] * scale);
  }
  place.store(x, result);
}

template <typename T>
struct Storage {
  using Type = T;
};

// Calls work(Storage<T>{}) for the type of a tensor's elements.
template <typename Work>
void with_storage_type(const Tensor& tensor, Work&& work) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return work(Storage<float>{});
    case ScalarType::Double:
      return work(Storage<double>{});
    case ScalarType::BFloat16:
      return work(Storage<__nv_bfloat16>{});
    case ScalarType::Half:
      return work(Storage<__half>{});
    default:
      throw std::invalid_argument("x must be float32, float64, bfloat16 or float16");
  }
}

// Whether every call of every sample lies in one aligned piece on both sides.
bool is_packed(const StridedBox& box, const void* from, const void* to, size_t element_size,
               int64_t elements, int64_t sample_stride) {
  const auto aligned = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % (element_size * kWordsPerCall) == 0;
  };
  return is_contiguous(box) && aligned(from) && aligned(to) && elements % kWordsPerCall == 0 &&
         sample_stride % kWordsPerCall == 0;
}

unsigned blocks_for(int64_t elements) {
  constexpr int64_t kBlockElements = int64_t{kThreads} * kWordsPerCall;
  return static_cast<unsigned>((elements + kBlockElements - 1) / kBlockElements);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

Tensor dropout_samples(const Tensor& x, const Tensor& p, const Tensor& seed, int64_t num_samples) {
  const DeviceGuard guard(x.get_device_index());
  Tensor out = empty_samples(x, num_samples);
  const int64_t elements = x.numel();
  if (elements == 0) {
    return out;
  }
  const StridedBox box = merged_box(x, 0, x, 0, out, 1);
  const unsigned blocks = blocks_for(elements);
  const int64_t groups = std::min(num_samples, (kFillingBlocks + blocks - 1) / blocks);
  const int64_t samples_per_block = (num_samples + groups - 1) / groups;
  with_storage_type(x, [&](auto storage) {
    using T = typename decltype(storage)::Type;
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const auto kernel = is_packed(box, from, to, sizeof(T), elements, elements)
                            ? samples_kernel<T, PackedPlace>
                            : samples_kernel<T, StridedPlace>;
    kernel<<<dim3(blocks, static_cast<unsigned>(groups)), kThreads, 0, current_stream(x)>>>(
        box, from, to, static_cast<const double*>(p.const_data_ptr()),
        static_cast<const int64_t*>(seed.const_data_ptr()), elements, num_samples,
        samples_per_block);
  });
  check_launch();
  return out;
}

Tensor dropout_samples_adjoint(const Tensor& y, const Tensor& p, const Tensor& seed) {
  const DeviceGuard guard(y.get_device_index());
  Tensor out = torch::stable::empty_like(torch::stable::select(y, 0, 0));
  const int64_t elements = out.numel();
  if (elements == 0) {
    return out;
  }
  const StridedBox box = merged_box(y, 1, y, 1, out, 0);
  with_storage_type(y, [&](auto storage) {
    using T = typename decltype(storage)::Type;
    const T* from = static_cast<const T*>(y.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const auto kernel = is_packed(box, from, to, sizeof(T), elements, y.stride(0))
                            ? adjoint_kernel<T, PackedPlace>
                            : adjoint_kernel<T, StridedPlace>;
    kernel<<<blocks_for(elements), kThreads, 0, current_stream(y)>>>(
        box, from, to, static_cast<const double*>(p.const_data_ptr()),
        static_cast<const int64_t*>(seed.const_data_ptr()), elements, y.size(0), y.stride(0));
  });
  check_launch();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CUDA, library) {
  library.impl("dropout_samples_cuda", TORCH_BOX(&dropout_samples));
  library.impl("dropout_samples_adjoint_cuda", TORCH_BOX(&dropout_samples_adjoint));
}

}  // namespace regularizers
