// DropBlock: which pixels of a plane lie under no block, and y = keep scale x. Dropped elements are
// selected out, never multiplied by zero.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

// a[j] becomes the OR of a[j + d step], 0 <= d < block, for 0 <= j < count, in about log2(block)
// passes: every pass doubles the window. Entries behind `count` must be zero, a window and a vector
// of them, and stay so.
static void spread(uint8_t* a, int64_t count, int64_t step, int64_t block) {
  for (int64_t window = 1; window < block;) {
    const int64_t more = 2 * window <= block ? window : block - window;
    const uint8_t* ahead = a + more * step;
    for (int64_t j = 0; j < count; j += kLanes<uint8_t>) {
      store(a + j, load(a + j) | load(ahead + j));
    }
    window += more;
  }
}

// Bytes 0xFF where a block is centred, for elements [begin, end) of one stream. Writes whole Philox
// blocks from a multiple of four on and returns where element `begin` stands.
static uint8_t* centres(PhiloxStream source, DropRule rule, int64_t begin, int64_t end,
                        uint8_t* bytes) {
  const int64_t first_call = begin / kWordsPerCall;
  alignas(64) uint32_t words[kBlockElements];
  for (int64_t first = first_call * kWordsPerCall, at = 0; first < end;
       first += kBlockElements, at += kBlockElements) {
    philox_block(source, static_cast<uint64_t>(first) / kWordsPerCall, words);
#pragma omp simd
    for (int j = 0; j < kBlockElements; ++j) {
      bytes[at + j] = words[j] <= rule.last_dropped ? 0xFF : 0;
    }
  }
  return bytes + begin % kWordsPerCall;
}

static int64_t count_ones(const uint8_t* bytes, int64_t size) {
  int64_t count = 0;
  for (int64_t j = 0; j < size; j += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + j, j + 8 <= size ? 8 : static_cast<size_t>(size - j));
    count += __builtin_popcountll(word);
  }
  return count;
}

static void drop_block_mask(const DropBlockMask& mask, int64_t stream, int64_t begin, int64_t end,
                            uint8_t* scratch) {
  const int64_t pixels = mask.height * mask.width, reach = mask.block_size / 2;
  uint8_t* keep = mask.keep + stream * mask.batch * pixels;
  int64_t* kept = mask.kept + stream * mask.batch;
  if (!mask.rule.drops) {
    std::memset(keep + begin * pixels, 0xFF, static_cast<size_t>((end - begin) * pixels));
    for (int64_t sample = begin; sample < end; ++sample) {
      kept[sample] = pixels;
    }
    return;
  }
  // A plane with a margin of `reach` zeros on every side, so that no window leaves its row.
  const int64_t padded_width = mask.width + 2 * reach;
  const int64_t padded = (mask.height + 2 * reach) * padded_width;
  uint8_t* plane = scratch;
  const uint8_t* centre = centres({mask.seed, static_cast<uint32_t>(stream), 0}, mask.rule,
                                  begin * pixels, end * pixels, scratch + mask.plane_bytes);
  const int64_t inset = mask.whole_blocks ? reach : 0;
  for (int64_t sample = begin; sample < end; ++sample, centre += pixels) {
    uint8_t* to = keep + sample * pixels;
    if (std::memchr(centre, 0xFF, static_cast<size_t>(pixels)) == nullptr) {
      std::memset(to, 0xFF, static_cast<size_t>(pixels));
      kept[sample] = pixels;
      continue;
    }
    std::memset(plane, 0, static_cast<size_t>(padded + kLanes<uint8_t>));
    for (int64_t y = inset; y < mask.height - inset; ++y) {
      std::memcpy(plane + (y + reach) * padded_width + reach + inset,
                  centre + y * mask.width + inset, static_cast<size_t>(mask.width - 2 * inset));
    }
    spread(plane, padded, 1, mask.block_size);
    spread(plane, padded, padded_width, mask.block_size);
    for (int64_t j = 0; j < padded; j += kLanes<uint8_t>) {
      store(plane + j, ~load(plane + j));
    }
    for (int64_t y = 0; y < mask.height; ++y) {
      std::memcpy(to + y * mask.width, plane + y * padded_width, static_cast<size_t>(mask.width));
    }
    kept[sample] = count_ones(to, pixels) / 8;
  }
}

template <typename T>
static void drop_block_apply(const void* from_, void* to_, const uint8_t* keep, int64_t elements,
                             double scale_) {
  using A = Accumulate<T>;
  const T* from = static_cast<const T*>(from_);
  T* to = static_cast<T*>(to_);
  const A scale = static_cast<A>(scale_);
  constexpr int kWidth = kLanes<A>;
  int64_t j = 0;
  for (; j + kWidth <= elements; j += kWidth) {
    store_whole(to + j, keep_lanes<A>(keep + j, load_wide(from + j) * scale));
  }
  for (; j < elements; ++j) {
    to[j] = narrow<T>(keep[j] != 0 ? widen(from[j]) * scale : A(0));
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
