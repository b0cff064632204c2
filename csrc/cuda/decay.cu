// The optimizer step over a table of tensors on CUDA: one launch for all tensors, a block a chunk,
// and a small one that adds up the sums of the chunks. Nothing is read back by the host and no
// scalar is baked in, so a captured graph replays with new learning rates.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../decay_table.h"

namespace regularizers {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What all blocks read: addresses on the device, null where an argument is absent.
struct Step {
  const int64_t* table;
  const int64_t* chunks;
  const float* steps;
  const double* deltas;
  double* partials;
  const double *lr, *weight_decay, *beta1, *beta2;
  const float *grad_scale, *found_inf;
  const int64_t* seed;
  double eps;
  int64_t penalty, chunk_size;
  bool prox, decay_first, maximize, bias_correction;
};

// The scalars of one chunk, worked out by one thread.
template <typename A>
struct Scalars {
  A grad_factor, beta1, rest1, beta2, rest2, eps, step_size, inverse_root, slope, bound;
};

template <typename A>
__device__ Scalars<A> chunk_scalars(const Step& step, int64_t tensor) {
  const AdamScalars adam{*step.lr,     *step.weight_decay, *step.beta1,         *step.beta2,
                         step.penalty, step.prox,          step.bias_correction};
  const AdamCorrection correction = adam_correction(adam, step.steps[tensor]);
  const DecayRule rule = decay_rule(adam, step.deltas == nullptr ? 0.0 : step.deltas[tensor]);
  double grad_factor = step.maximize ? -1.0 : 1.0;
  if (step.grad_scale != nullptr) {
    grad_factor /= static_cast<double>(*step.grad_scale);
  }
  return {static_cast<A>(grad_factor),          static_cast<A>(adam.beta1),
          static_cast<A>(1.0 - adam.beta1),     static_cast<A>(adam.beta2),
          static_cast<A>(1.0 - adam.beta2),     static_cast<A>(step.eps),
          static_cast<A>(correction.step_size), static_cast<A>(correction.inverse_root),
          static_cast<A>(rule.slope),           static_cast<A>(rule.bound)};
}

// Four consecutive elements, in one access where they are aligned and all there.
template <typename T>
struct alignas(sizeof(T) * kWordsPerCall) Quad {
  T value[kWordsPerCall];
};

template <typename T>
__device__ Quad<T> load_quad(const T* from, int count, bool aligned) {
  if (aligned && count >= kWordsPerCall) {
    return *reinterpret_cast<const Quad<T>*>(from);
  }
  Quad<T> quad{};
#pragma unroll
  for (int j = 0; j < kWordsPerCall; ++j) {
    if (j < count) {
      quad.value[j] = from[j];
    }
  }
  return quad;
}

template <typename T>
__device__ void store_quad(T* to, const Quad<T>& quad, int count, bool aligned) {
  if (aligned && count >= kWordsPerCall) {
    *reinterpret_cast<Quad<T>*>(to) = quad;
    return;
  }
#pragma unroll
  for (int j = 0; j < kWordsPerCall; ++j) {
    if (j < count) {
      to[j] = quad.value[j];
    }
  }
}

template <typename T>
__device__ bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Quad<T>) == 0;
}

// NaN stays NaN, which fmin and fmax do not grant.
template <typename A>
__device__ A clip(A x, A bound) {
  x = x < -bound ? -bound : x;
  return x > bound ? bound : x;
}

__device__ __nv_bfloat16 round_stochastically(float value, uint32_t word) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7F800000u) == 0x7F800000u) {
    return __float2bfloat16(value);
  }
  return __ushort_as_bfloat16(static_cast<unsigned short>((bits + (word & 0xFFFFu)) >> 16));
}

// Sums of a block in the order of threads and warps, the same in every run; valid in thread 0.
template <typename A>
__device__ double block_sum(A value) {
  __shared__ double warp_sums[kWarps];
  double sum = static_cast<double>(value);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  }
  if (threadIdx.x % kWarp == 0) {
    warp_sums[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += warp_sums[w];
    }
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) adam_kernel(const __grid_constant__ Step step) {
  using A = Accumulate<T>;
  if (step.found_inf != nullptr && *step.found_inf != 0.0f) {
    return;
  }
  const int64_t chunk = blockIdx.x;
  const int64_t tensor = step.chunks[chunk];
  const int64_t* row = step.table + tensor * kColumns;
  __shared__ Scalars<A> shared;
  if (threadIdx.x == 0) {
    shared = chunk_scalars<A>(step, tensor);
  }
  __syncthreads();
  const Scalars<A> s = shared;

  const int64_t first = (chunk - row[kFirstChunk]) * step.chunk_size;
  const int64_t end = min(first + step.chunk_size, row[kNumel]);
  T* param = reinterpret_cast<T*>(row[kParam]);
  const T* grad = reinterpret_cast<const T*>(row[kGrad]);
  A* exp_avg = reinterpret_cast<A*>(row[kExpAvg]);
  A* exp_avg_sq = reinterpret_cast<A*>(row[kExpAvgSq]);
  A* max_exp_avg_sq = reinterpret_cast<A*>(row[kMaxExpAvgSq]);
  A* master = reinterpret_cast<A*>(row[kMaster]);
  const T* reference = reinterpret_cast<const T*>(row[kReference]);
  const uint8_t* mask = reinterpret_cast<const uint8_t*>(row[kMask]);
  const bool aligned = is_aligned(param) && is_aligned(grad) && is_aligned(exp_avg) &&
                       is_aligned(exp_avg_sq) && is_aligned(max_exp_avg_sq) && is_aligned(master) &&
                       is_aligned(reference) && is_aligned(mask);

  A total = A(0);
  for (int64_t e = first + int64_t{threadIdx.x} * kWordsPerCall; e < end;
       e += int64_t{kThreads} * kWordsPerCall) {
    const int count = static_cast<int>(min(end - e, int64_t{kWordsPerCall}));
    const Quad<T> g4 = load_quad(grad + e, count, aligned);
    Quad<T> p4 = load_quad(param + e, count, aligned);
    Quad<A> m4 = load_quad(exp_avg + e, count, aligned);
    Quad<A> v4 = load_quad(exp_avg_sq + e, count, aligned);
    Quad<A> max4{}, master4{};
    Quad<T> reference4{};
    Quad<uint8_t> mask4{};
    if (max_exp_avg_sq != nullptr) {
      max4 = load_quad(max_exp_avg_sq + e, count, aligned);
    }
    if (master != nullptr) {
      master4 = load_quad(master + e, count, aligned);
    }
    if (reference != nullptr) {
      reference4 = load_quad(reference + e, count, aligned);
    }
    if (mask != nullptr) {
      mask4 = load_quad(mask + e, count, aligned);
    }
    uint32_t words[kWordsPerCall] = {};
    if (step.seed != nullptr) {
      philox_call({static_cast<uint64_t>(*step.seed), static_cast<uint32_t>(tensor), 0},
                  static_cast<uint64_t>(e) / kWordsPerCall, words);
    }
#pragma unroll
    for (int j = 0; j < kWordsPerCall; ++j) {
      const A g = static_cast<A>(g4.value[j]) * s.grad_factor;
      const A m = m4.value[j] * s.beta1 + g * s.rest1;
      const A v = v4.value[j] * s.beta2 + g * g * s.rest2;
      m4.value[j] = m;
      v4.value[j] = v;
      A largest = v;
      if (max_exp_avg_sq != nullptr) {
        largest = max4.value[j] > v ? max4.value[j] : v;
        max4.value[j] = largest;
      }
      const A update = s.step_size * m / (sqrt(largest) * s.inverse_root + s.eps);
      const A x = master == nullptr ? static_cast<A>(p4.value[j]) : master4.value[j];
      const A base = step.decay_first ? x : x - update;
      const A offset = reference == nullptr ? base : base - static_cast<A>(reference4.value[j]);
      A decay = clip(s.slope * offset, s.bound);
      if (mask != nullptr && mask4.value[j] == 0) {
        decay = A(0);
      }
      const A next = step.decay_first ? (base - decay) - update : base - decay;
      master4.value[j] = next;
      p4.value[j] = static_cast<T>(next);
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        if (step.seed != nullptr) {
          p4.value[j] = round_stochastically(next, words[j]);
        }
      }
      if (j < count) {
        total += next < A(0) ? -next : next;
      }
    }
    store_quad(param + e, p4, count, aligned);
    store_quad(exp_avg + e, m4, count, aligned);
    store_quad(exp_avg_sq + e, v4, count, aligned);
    if (max_exp_avg_sq != nullptr) {
      store_quad(max_exp_avg_sq + e, max4, count, aligned);
    }
    if (master != nullptr) {
      store_quad(master + e, master4, count, aligned);
    }
  }
  const double sum = block_sum(total);
  if (threadIdx.x == 0) {
    step.partials[chunk] = sum;
  }
}

// One warp a tensor adds up its chunks, in a fixed order.
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const int64_t* table, const double* partials, double* sums, const float* found_inf,
                int64_t num_tensors, int64_t chunk_size) {
  const int64_t tensor = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (tensor >= num_tensors || (found_inf != nullptr && *found_inf != 0.0f)) {
    return;
  }
  const int64_t* row = table + tensor * kColumns;
  const int64_t first = row[kFirstChunk];
  const int64_t count = (row[kNumel] + chunk_size - 1) / chunk_size;
  double sum = 0.0;
  for (int64_t c = threadIdx.x % kWarp; c < count; c += kWarp) {
    sum += partials[first + c];
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  }
  if (threadIdx.x % kWarp == 0) {
    sums[tensor] = sum;
  }
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
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

void decoupled_adam_table(const Tensor& table, const Tensor& chunks, const Tensor& steps,
                          const std::optional<Tensor>& deltas, const Tensor& partials,
                          const std::optional<Tensor>& sums, const Tensor& lr,
                          const Tensor& weight_decay, const Tensor& beta1, const Tensor& beta2,
                          const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf, const std::optional<Tensor>& seed,
                          double eps, int64_t penalty, bool prox, bool decay_first, bool maximize,
                          bool bias_correction, int64_t type, int64_t chunk_size) {
  const DeviceGuard guard(table.get_device_index());
  const cudaStream_t stream = current_stream(table);
  const Step step{data<int64_t>(table),
                  data<int64_t>(chunks),
                  data<float>(steps),
                  data_or_null<double>(deltas),
                  static_cast<double*>(partials.mutable_data_ptr()),
                  data<double>(lr),
                  data<double>(weight_decay),
                  data<double>(beta1),
                  data<double>(beta2),
                  data_or_null<float>(grad_scale),
                  data_or_null<float>(found_inf),
                  data_or_null<int64_t>(seed),
                  eps,
                  penalty,
                  chunk_size,
                  prox,
                  decay_first,
                  maximize,
                  bias_correction};
  const unsigned blocks = static_cast<unsigned>(chunks.size(0));
  if (blocks > 0) {
    using Kernel = void (*)(Step);
    constexpr Kernel kKernels[] = {adam_kernel<float>, adam_kernel<double>,
                                   adam_kernel<__nv_bfloat16>, adam_kernel<__half>};
    kKernels[type]<<<blocks, kThreads, 0, stream>>>(step);
    check_launch();
  }
  if (sums.has_value() && table.size(0) > 0) {
    const int64_t tensors = table.size(0);
    sums_kernel<<<static_cast<unsigned>((tensors + kWarps - 1) / kWarps), kThreads, 0, stream>>>(
        step.table, step.partials, static_cast<double*>(sums->mutable_data_ptr()), step.found_inf,
        tensors, chunk_size);
    check_launch();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CUDA, library) {
  library.impl("decoupled_adam_table", TORCH_BOX(&decoupled_adam_table));
}

}  // namespace regularizers
