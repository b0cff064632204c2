// The table that names the tensors of one optimizer step, and the scalars of the step: the same for
// CPU and CUDA, and for ops/decay.py, which writes the table.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "philox.h"

namespace regularizers {

// Columns of the table, one row a tensor: addresses (0: absent), then sizes. Chunk c of the pass
// belongs to tensor chunks[c]; those of one tensor follow each other from its first.
enum DecayColumn : int64_t {
  kParam = 0,
  kGrad,
  kExpAvg,
  kExpAvgSq,
  kMaxExpAvgSq,
  kMaster,
  kReference,
  kMask,
  kNumel,
  kFirstChunk,
  kColumns
};

enum Penalty : int64_t { kNoDecay = 0, kL2 = 1, kL1 = 2, kHuber = 3 };

struct AdamScalars {
  double lr, weight_decay, beta1, beta2;
  int64_t penalty;
  bool prox, bias_correction;
};

struct AdamCorrection {
  double step_size, inverse_root;
};

static REGULARIZERS_HOST_DEVICE AdamCorrection adam_correction(const AdamScalars& scalars,
                                                               float step) {
  if (!scalars.bias_correction) {
    return {scalars.lr, 1.0};
  }
  const double t = static_cast<double>(step);
  return {scalars.lr / (1.0 - pow(scalars.beta1, t)), 1.0 / sqrt(1.0 - pow(scalars.beta2, t))};
}

// D(x) = clip(slope x, -bound, bound).
struct DecayRule {
  double slope, bound;
};

static REGULARIZERS_HOST_DEVICE DecayRule decay_rule(const AdamScalars& scalars, double delta) {
  const double tau = scalars.lr * scalars.weight_decay;
  const double shrink = scalars.prox ? tau / (1.0 + tau) : tau;
  switch (scalars.penalty) {
    case kL2:
      return {shrink, static_cast<double>(INFINITY)};
    case kHuber:
      return {shrink, tau * delta};
    case kL1:
      // The sign of x as a slope that reaches the bound at once, for all but subnormal x.
      return {scalars.prox ? 1.0 : static_cast<double>(FLT_MAX), tau};
    default:
      return {0.0, 0.0};
  }
}

}  // namespace regularizers
