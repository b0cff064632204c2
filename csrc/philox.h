// Philox 4x32-10, the counter-based generator behind every mask of the library.
// One source for CPU and CUDA; tl.philox (Triton) and ops/philox.py (PyTorch) give the same words.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define REGULARIZERS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define REGULARIZERS_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace regularizers {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier2 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyBump0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyBump1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Element e of a stream takes word e % 4 of call e / 4.
constexpr int kWordsPerCall = 4;

// Which bits an operator reads: the seed is the key, (call, stream, step) the counter.
struct PhiloxStream {
  uint64_t seed;
  uint32_t stream;
  uint32_t step;
};

// One round on one counter; `static` keeps a copy per object file (see docs/design.md, "Several
// instruction sets").
static REGULARIZERS_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2,
                                                  uint32_t& c3, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
  const uint64_t product2 = static_cast<uint64_t>(kPhiloxMultiplier2) * c2;
  c0 = static_cast<uint32_t>(product2 >> 32) ^ c1 ^ key0;
  c1 = static_cast<uint32_t>(product2);
  c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c3 = static_cast<uint32_t>(product0);
}

// The four words of one call.
static REGULARIZERS_HOST_DEVICE void philox_call(const PhiloxStream& source, uint64_t call,
                                                 uint32_t words[kWordsPerCall]) {
  uint32_t c0 = static_cast<uint32_t>(call), c1 = static_cast<uint32_t>(call >> 32);
  uint32_t c2 = source.stream, c3 = source.step;
  uint32_t key0 = static_cast<uint32_t>(source.seed);
  uint32_t key1 = static_cast<uint32_t>(source.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, key0, key1);
    key0 += kPhiloxKeyBump0;
    key1 += kPhiloxKeyBump1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The Bernoulli rule "drop iff word < round(p * 2^32)", kept in the form "keep iff word >
// last_dropped" so that p = 1, whose threshold 2^32 needs 33 bits, is no special case. p = 0 is:
// nothing is dropped, `drops` is false.
struct DropRule {
  uint32_t last_dropped;
  bool drops;
};

static REGULARIZERS_HOST_DEVICE DropRule drop_rule(double p) {
  const uint64_t threshold = static_cast<uint64_t>(p * 4294967296.0 + 0.5);
  return {static_cast<uint32_t>(threshold - 1), threshold > 0};
}

// 1 / (1 - p), the factor of a kept element; at p = 1 nothing is kept and the factor is never used.
static REGULARIZERS_HOST_DEVICE double keep_scale(double p) {
  return p < 1.0 ? 1.0 / (1.0 - p) : 0.0;
}

}  // namespace regularizers
