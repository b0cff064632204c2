// nearest_code and sample_code on the CPU: packing, threads, registration. The arithmetic is in
// code_search_kernels.h.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

using torch::stable::contiguous;

// Below this many products, some 10 us, waking a thread costs as much.
constexpr int64_t kSerialProducts = 1 << 18;

// A codebook relative to its mean, packed for the product tile: one copy of it in the accumulation
// type.
class Codebook {
 public:
  explicit Codebook(const Tensor& codebook)
      : codes_(contiguous(codebook)),
        type_(storage_type(codebook)),
        count_(codebook.size(0)),
        features_(codebook.size(1)) {
    const int64_t panels = divide_up(count_, kernel().panel_width);
    const int64_t padded = panels * kernel().panel_width;
    panels_ = empty(padded * features_);
    offset_ = empty(padded);
    centre_ = empty(features_);
    find_centre();
    const CodeSearch search = describe();
    run(panels, count_ * features_, [&](int64_t begin, int64_t end) {
      kernel().pack(search, codes_.const_data_ptr(), begin, end);
    });
  }

  const CodeSearchKernels& kernel() const { return kernels().code_search[type_]; }
  const void* data() const { return codes_.const_data_ptr(); }
  int64_t count() const { return count_; }

  CodeSearch describe() const {
    CodeSearch search{};
    search.features = features_;
    search.codes = count_;
    search.centre = centre_.const_data_ptr();
    search.panels = panels_.mutable_data_ptr();
    search.offset = offset_.mutable_data_ptr();
    return search;
  }

  // Searches tokens [0, tokens) in blocks whose rows stay in the second-level cache.
  template <typename Kernel>
  void search(const CodeSearch& search, int64_t tokens, const Kernel& kernel) const {
    constexpr int64_t kBlockBytes = 1 << 18;
    const int64_t row_bytes = std::max<int64_t>(1, features_ * accumulate_bytes(type_));
    const int64_t rows = std::clamp<int64_t>(kBlockBytes / row_bytes, 16, kCodeRows);
    run(tokens, tokens * count_ * features_, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(static_cast<size_t>(divide_up(rows * row_bytes, 8)));
      for (int64_t first = begin; first < end; first += rows) {
        kernel(search, first, std::min(first + rows, end), scratch.data());
      }
    });
  }

 private:
  Tensor empty(int64_t size) const {
    return torch::stable::new_empty(codes_, {size}, accumulate_type(type_));
  }

  template <typename Body>
  static void run(int64_t size, int64_t products, const Body& body) {
    if (products < kSerialProducts) {
      body(0, size);
    } else {
      torch::stable::parallel_for(0, size, 1, body);
    }
  }

  void find_centre() {
    std::vector<double> sums(static_cast<size_t>(features_), 0.0);
    kernel().add_codes(data(), features_, 0, count_, sums.data());
    for (int64_t d = 0; d < features_; ++d) {
      const double mean = sums[d] / static_cast<double>(count_);
      check(std::isfinite(mean), "codebook must be finite");
      if (type_ == kDouble) {
        static_cast<double*>(centre_.mutable_data_ptr())[d] = mean;
      } else {
        static_cast<float*>(centre_.mutable_data_ptr())[d] = static_cast<float>(mean);
      }
    }
  }

  Tensor codes_, panels_, offset_, centre_;
  StorageType type_;
  int64_t count_, features_;
};

Tensor nearest_code(const Tensor& z, const Tensor& codebook) {
  const Codebook packed(codebook);
  const Tensor tokens = contiguous(z);
  Tensor found = torch::stable::new_empty(z, {z.size(0)}, ScalarType::Long);
  CodeSearch search = packed.describe();
  search.tokens = tokens.const_data_ptr();
  search.found = static_cast<int64_t*>(found.mutable_data_ptr());
  packed.search(search, z.size(0), packed.kernel().nearest);
  return found;
}

std::vector<int64_t> drawn_places(int64_t count, const std::optional<Tensor>& selected) {
  std::vector<int64_t> places(static_cast<size_t>(count));
  std::iota(places.begin(), places.end(), 0);
  if (selected.has_value()) {
    const Tensor mask = contiguous(*selected);
    const bool* on = static_cast<const bool*>(mask.const_data_ptr());
    places.erase(
        std::remove_if(places.begin(), places.end(), [on](int64_t place) { return !on[place]; }),
        places.end());
  }
  return places;
}

Tensor sample_code(const Tensor& index, const Tensor& codebook,
                   const std::optional<Tensor>& selected, const Tensor& temperature,
                   const Tensor& seed) {
  const double tau = *static_cast<const double*>(temperature.const_data_ptr());
  check(tau > 0.0 && std::isfinite(tau),
        "temperature must be above 0 and finite, got " + std::to_string(tau));
  const Tensor codes = contiguous(index);
  const int64_t* code = static_cast<const int64_t*>(codes.const_data_ptr());
  const int64_t tokens = index.size(0), count = codebook.size(0);
  for (int64_t i = 0; i < tokens; ++i) {
    if (code[i] < 0 || code[i] >= count) {
      check(false, "index must lie in [0, " + std::to_string(count) + "), got " +
                       std::to_string(code[i]) + " at place " + std::to_string(i));
    }
  }
  Tensor found = torch::stable::new_empty(codes, {tokens}, ScalarType::Long);
  std::copy(code, code + tokens, static_cast<int64_t*>(found.mutable_data_ptr()));
  const std::vector<int64_t> places = drawn_places(tokens, selected);
  const Codebook packed(codebook);
  CodeSearch search = packed.describe();
  search.tokens = packed.data();
  search.index = code;
  search.places = places.data();
  search.seed = seed_value(seed);
  search.slope = 2.0 / std::max(tau, 1.0);
  search.weight = std::min(tau, 1.0);
  search.found = static_cast<int64_t*>(found.mutable_data_ptr());
  packed.search(search, static_cast<int64_t>(places.size()), packed.kernel().draw);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("nearest_code", TORCH_BOX(&nearest_code));
  library.impl("sample_code", TORCH_BOX(&sample_code));
}

}  // namespace regularizers
