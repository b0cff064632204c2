// All vectorised kernels, compiled once for each instruction set with REGULARIZERS_ISA naming it.
#include "decay_kernels.h"
#include "dropout_kernels.h"
#include "kernels.h"
#include "masked_linear_cross_entropy_kernels.h"
#include "sinkhorn_kernels.h"
#include "sinkhorn_points_kernels.h"
#include "sketch_kernels.h"
#include "sparse_ot_kernels.h"

namespace regularizers::REGULARIZERS_ISA {

static void philox_words(PhiloxStream source, uint64_t call, int64_t calls, uint32_t* words) {
  int64_t done = 0;
  for (; done + kBlockCalls <= calls; done += kBlockCalls) {
    philox_block(source, call + static_cast<uint64_t>(done), words + done * kWordsPerCall);
  }
  for (; done < calls; ++done) {
    philox_call(source, call + static_cast<uint64_t>(done), words + done * kWordsPerCall);
  }
}

template <typename T>
static constexpr DropoutKernels dropout_kernels() {
  return {dropout_sample<T>, dropout_adjoint<T>};
}

const Kernels& kernels() {
  static constexpr Kernels table = {
      philox_words,
      {dropout_kernels<float>(), dropout_kernels<double>(), dropout_kernels<bfloat16>(),
       dropout_kernels<float16>()},
      {masked_linear_cross_entropy_kernels<float>(), masked_linear_cross_entropy_kernels<double>(),
       masked_linear_cross_entropy_kernels<bfloat16>(),
       masked_linear_cross_entropy_kernels<float16>()},
      {sinkhorn_kernels<float>(), sinkhorn_kernels<double>(), sinkhorn_kernels<bfloat16>(),
       sinkhorn_kernels<float16>()},
      {sinkhorn_points_kernels<float>(), sinkhorn_points_kernels<double>()},
      {sketch_kernels<float>(), sketch_kernels<double>()},
      {sparse_ot_kernels<float>(), sparse_ot_kernels<double>(), sparse_ot_kernels<bfloat16>(),
       sparse_ot_kernels<float16>()},
      {decay_kernels<float>(), decay_kernels<double>(), decay_kernels<bfloat16>(),
       decay_kernels<float16>()},
  };
  return table;
}

}  // namespace regularizers::REGULARIZERS_ISA
