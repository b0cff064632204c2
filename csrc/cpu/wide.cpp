// All vectorised kernels, compiled once for each instruction set with REGULARIZERS_ISA naming it.
#include "code_search_kernels.h"
#include "decay_kernels.h"
#include "drop_block_kernels.h"
#include "dropout_kernels.h"
#include "gradient_gate_kernels.h"
#include "kernels.h"
#include "masked_linear_cross_entropy_kernels.h"
#include "mini_float_kernels.h"
#include "mix_kernels.h"
#include "nested_kernels.h"
#include "pairwise_kernels.h"
#include "prefix_scan_kernels.h"
#include "row_gate_kernels.h"
#include "sinkhorn_kernels.h"
#include "sinkhorn_points_kernels.h"
#include "sketch_kernels.h"
#include "sparse_ot_kernels.h"
#include "subsampled_attention_kernels.h"

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

template <typename T>
static constexpr PrefixKernels prefix_kernels() {
  return {gather_prefixes<T>, scatter_prefixes<T>};
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
      {prefix_kernels<float>(), prefix_kernels<double>(), prefix_kernels<bfloat16>(),
       prefix_kernels<float16>()},
      {mix_kernels<float>(), mix_kernels<double>(), mix_kernels<bfloat16>(),
       mix_kernels<float16>()},
      drop_block_mask,
      {{drop_block_apply<float>},
       {drop_block_apply<double>},
       {drop_block_apply<bfloat16>},
       {drop_block_apply<float16>}},
      {{row_gate<float>}, {row_gate<double>}, {row_gate<bfloat16>}, {row_gate<float16>}},
      {code_search_kernels<float>(), code_search_kernels<double>(), code_search_kernels<bfloat16>(),
       code_search_kernels<float16>()},
      {attention_kernels<float>(), attention_kernels<double>(), attention_kernels<bfloat16>(),
       attention_kernels<float16>()},
      {prefix_scan_kernels<float>(), prefix_scan_kernels<double>(), prefix_scan_kernels<bfloat16>(),
       prefix_scan_kernels<float16>()},
      {decay_kernels<float>(), decay_kernels<double>(), decay_kernels<bfloat16>(),
       decay_kernels<float16>()},
      {pairwise_kernels<float>(), pairwise_kernels<double>()},
      {mini_float_kernels<float>(), mini_float_kernels<double>(), mini_float_kernels<bfloat16>(),
       mini_float_kernels<float16>()},
      {{gradient_gate<float>},
       {gradient_gate<double>},
       {gradient_gate<bfloat16>},
       {gradient_gate<float16>}},
  };
  return table;
}

}  // namespace regularizers::REGULARIZERS_ISA
