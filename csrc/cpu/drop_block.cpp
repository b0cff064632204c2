// drop_block on the CPU: the mask of every plane with its count, then one pass over x.
#include <algorithm>
#include <vector>

#include "common.h"
#include "layout.h"

namespace regularizers {
namespace {

constexpr int64_t kTaskElements = 1 << 14;

struct Image {
  int64_t batch, channels, height, width;
  bool shared;  // one mask for all channels

  int64_t pixels() const { return height * width; }
  int64_t streams() const { return shared ? 1 : channels; }
};

// How many planes make a task.
int64_t planes_of_a_task(const Image& image) {
  return std::max<int64_t>(1, kTaskElements / image.pixels());
}

// The share of p that a pixel carries as the centre of a block.
double centre_ratio(const Image& image, int64_t block_size, bool exact) {
  const int64_t places =
      exact ? (image.height - block_size + 1) * (image.width - block_size + 1) : image.pixels();
  return static_cast<double>(image.pixels()) /
         static_cast<double>(block_size * block_size * places);
}

void make_masks(const Image& image, const DropBlockMask& mask) {
  const int64_t group = std::min(planes_of_a_task(image), image.batch);
  const int64_t groups = divide_up(image.batch, group);
  const size_t scratch_bytes =
      static_cast<size_t>(mask.plane_bytes + group * image.pixels()) + 2 * sizeof(uint32_t) * 128;
  torch::stable::parallel_for(0, image.streams() * groups, 2, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(scratch_bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % groups * group;
      kernels().drop_block_mask(mask, task / groups, first, std::min(first + group, image.batch),
                                scratch.data());
    }
  });
}

// What kept elements of each sample are multiplied by: all elements over kept ones, of the batch or
// of the sample. Where nothing is kept the factor is never used.
std::vector<double> sample_factors(const Image& image, const std::vector<int64_t>& kept,
                                   bool per_sample) {
  std::vector<int64_t> counts(static_cast<size_t>(image.batch));
  int64_t all = 0;
  for (size_t plane = 0; plane < kept.size(); ++plane) {
    counts[plane % counts.size()] += kept[plane];
    all += kept[plane];
  }
  const double elements = static_cast<double>(image.streams() * image.pixels());
  std::vector<double> factors(counts.size());
  for (size_t sample = 0; sample < counts.size(); ++sample) {
    const double among = per_sample ? elements : elements * static_cast<double>(image.batch);
    const int64_t count = per_sample ? counts[sample] : all;
    factors[sample] = among / static_cast<double>(std::max<int64_t>(count, 1));
  }
  return factors;
}

// One pass over x. `keep` is [streams][batch][pixels].
struct Pass {
  const Image& image;
  StorageType type;
  int64_t bytes;
  const char* from;
  char* to;
  const uint8_t* keep;
  const std::vector<double>& factors;

  void planes() const {
    const int64_t pixels = image.pixels();
    const auto apply = kernels().drop_block[type].apply;
    torch::stable::parallel_for(
        0, image.batch * image.channels, planes_of_a_task(image), [&](int64_t begin, int64_t end) {
          for (int64_t plane = begin; plane < end; ++plane) {
            const int64_t sample = plane / image.channels, channel = plane % image.channels;
            const int64_t mask = image.shared ? sample : channel * image.batch + sample;
            const int64_t at = plane * pixels * bytes;
            apply(from + at, to + at, keep + mask * pixels, pixels,
                  factors[static_cast<size_t>(sample)]);
          }
        });
  }

  // channels_last: a pixel is a row of channels.
  void pixels_of_channels() const {
    constexpr int64_t kTilePixels = 64;  // a cache line of every channel's mask
    const int64_t pixels = image.pixels(), channels = image.channels;
    const int64_t tiles = divide_up(pixels, kTilePixels);
    const auto apply = kernels().drop_block[type].apply;
    const auto gate = kernels().row_gate[type].gate;
    const int64_t grain = std::max<int64_t>(1, kTaskElements / (kTilePixels * channels));
    torch::stable::parallel_for(0, image.batch * tiles, grain, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> tile(image.shared ? 0 : static_cast<size_t>(kTilePixels * channels));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / tiles, first = task % tiles * kTilePixels;
        const int64_t count = std::min(kTilePixels, pixels - first);
        const int64_t at = (sample * pixels + first) * channels * bytes;
        const double factor = factors[static_cast<size_t>(sample)];
        const uint8_t* mask = keep + sample * pixels + first;
        if (image.shared) {
          for (int64_t j = 0; j < count; ++j) {
            const int64_t row = at + j * channels * bytes;
            gate(from + row, nullptr, to + row, channels, mask[j] != 0 ? factor : 0.0);
          }
          continue;
        }
        for (int64_t channel = 0; channel < channels; ++channel) {
          const uint8_t* line = mask + channel * image.batch * pixels;
          for (int64_t j = 0; j < count; ++j) {
            tile[static_cast<size_t>(j * channels + channel)] = line[j];
          }
        }
        apply(from + at, to + at, tile.data(), count * channels, factor);
      }
    });
  }
};

Tensor drop_block(const Tensor& x, const Tensor& p, const Tensor& seed, int64_t block_size,
                  bool exact, bool per_sample, bool shared_channels) {
  const double probability_of_drop = scheduled_value("p", p, /*one_allowed=*/false);
  const StorageType type = storage_type(x);
  const Tensor out = empty_dense(x);
  if (x.numel() == 0) {
    return out;
  }
  const Tensor from = in_layout_of(out, x);
  const Image image{x.size(0), x.size(1), x.size(2), x.size(3), shared_channels};
  const int64_t planes = image.streams() * image.batch;
  const Tensor keep = torch::stable::new_empty(x, {planes * image.pixels()}, ScalarType::Byte);
  std::vector<int64_t> kept(static_cast<size_t>(planes));
  const int64_t reach = block_size / 2;
  constexpr int64_t kVectorSlack = 128;
  const DropBlockMask mask{image.batch,
                           image.height,
                           image.width,
                           block_size,
                           exact,
                           seed_value(seed),
                           drop_rule(probability_of_drop * centre_ratio(image, block_size, exact)),
                           static_cast<uint8_t*>(keep.mutable_data_ptr()),
                           kept.data(),
                           (image.height + 4 * reach) * (image.width + 2 * reach) + kVectorSlack};
  make_masks(image, mask);
  const std::vector<double> factors = sample_factors(image, kept, per_sample);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  advise_huge_pages(to, static_cast<size_t>(x.numel() * bytes));
  const Pass pass{image, type,      bytes,  static_cast<const char*>(from.const_data_ptr()),
                  to,    mask.keep, factors};
  if (out.is_contiguous()) {
    pass.planes();
  } else {
    pass.pixels_of_channels();
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("drop_block", TORCH_BOX(&drop_block));
}

}  // namespace regularizers
