// mix, paste_boxes and their derivatives on the CPU: rows as blocks of memory, threads,
// registration.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../sample_layout.h"
#include "common.h"

namespace regularizers {
namespace {

// Elements of a stretch: what two kernels read of it one after the other stays in the first-level
// cache in between.
constexpr int64_t kStretch = 4096;
constexpr int64_t kTaskElements = 32768;
constexpr int64_t kMostSides = 3;

int64_t row_elements(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 1; d < x.dim(); ++d) {
    count *= x.size(d);
  }
  return count;
}

// Whether memory holds the dimensions in the order 0, 2, 3, ..., 1.
bool is_channels_last(const Tensor& x) {
  if (x.dim() < 3) {
    return false;
  }
  int64_t expected = 1;
  for (int64_t step = 0; step < x.dim(); ++step) {
    // Innermost first: 1, then the last, ..., 2, then 0.
    const int64_t dimension = step == 0 ? 1 : (step == x.dim() - 1 ? 0 : x.dim() - step);
    if (x.size(dimension) != 1 && x.stride(dimension) != expected) {
      return false;
    }
    expected *= x.size(dimension);
  }
  return true;
}

void check_layout(const Tensor& x) {
  if (!x.is_contiguous() && !is_channels_last(x)) {
    throw std::invalid_argument("x must be contiguous or channels_last");
  }
}

// So many new rows, each laid out as those of x.
Tensor rows_like(const Tensor& x, int64_t rows) {
  std::vector<int64_t> sizes{rows}, strides{std::max<int64_t>(row_elements(x), 1)};
  for (int64_t d = 1; d < x.dim(); ++d) {
    sizes.push_back(x.size(d));
    strides.push_back(x.stride(d));
  }
  const Tensor made = empty_strided(x, sizes, strides);
  advise_huge_pages(made.mutable_data_ptr(), made.numel() * made.element_size());
  return made;
}

// For every row of x the row of the result whose partner it is, or -1.
std::vector<int64_t> checked_inverse(const Tensor& perm, int64_t rows) {
  const Tensor dense = torch::stable::contiguous(perm);
  const int64_t* partner = static_cast<const int64_t*>(dense.const_data_ptr());
  std::vector<int64_t> inverse(static_cast<size_t>(rows), -1);
  for (int64_t i = 0; i < dense.numel(); ++i) {
    if (partner[i] < 0 || partner[i] >= rows) {
      throw std::invalid_argument("perm must hold rows in [0, " + std::to_string(rows) + "), got " +
                                  std::to_string(partner[i]));
    }
    int64_t& user = inverse[static_cast<size_t>(partner[i])];
    if (user >= 0) {
      throw std::invalid_argument("perm must not name a row twice");
    }
    user = i;
  }
  return inverse;
}

// The weights as float64; float16 and bfloat16 rows have float32 weights, as the reference.
std::vector<double> checked_weights(const Tensor& lam) {
  const Tensor dense = torch::stable::contiguous(lam);
  const bool is_double = dense.scalar_type() == ScalarType::Double;
  std::vector<double> weights(static_cast<size_t>(dense.numel()));
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] = is_double ? static_cast<const double*>(dense.const_data_ptr())[i]
                           : static_cast<const float*>(dense.const_data_ptr())[i];
    if (!(weights[i] >= 0.0 && weights[i] <= 1.0)) {
      throw std::invalid_argument("lam must lie in [0, 1], got " + std::to_string(weights[i]));
    }
  }
  return weights;
}

// Calls body(task) for all tasks; on all threads where there are more than `grain`.
template <typename Body>
void for_tasks(int64_t tasks, int64_t grain, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      body(task);
    }
  };
  if (tasks <= grain) {
    run(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, grain, run);
  }
}

// Calls body(row, first element, elements, number of the stretch in its row) for all stretches of
// all rows.
template <typename Body>
void for_stretches(int64_t rows, int64_t elements, const Body& body) {
  const int64_t stretches = divide_up(elements, kStretch);
  if (rows * stretches == 0) {
    return;
  }
  for_tasks(rows * stretches, divide_up(kTaskElements, std::min(elements, kStretch)),
            [&](int64_t task) {
              const int64_t stretch = task % stretches, first = stretch * kStretch;
              body(task / stretches, first, std::min(kStretch, elements - first), stretch);
            });
}

const char* bytes_of(const Tensor& tensor) {
  return static_cast<const char*>(tensor.const_data_ptr());
}
char* writable_bytes_of(const Tensor& tensor) {
  return static_cast<char*>(tensor.mutable_data_ptr());
}

Tensor mix(const Tensor& x, const Tensor& perm, const Tensor& lam) {
  check_layout(x);
  const std::vector<double> weights = checked_weights(lam);
  checked_inverse(perm, x.size(0));
  const Tensor partners = torch::stable::contiguous(perm);
  const int64_t* partner = static_cast<const int64_t*>(partners.const_data_ptr());
  const int64_t elements = row_elements(x), size = x.element_size();
  const Tensor out = rows_like(x, perm.size(0));
  const char* from = bytes_of(x);
  char* to = writable_bytes_of(out);
  const auto blend = kernels().mix[storage_type(x)].blend;
  for_stretches(out.size(0), elements, [&](int64_t i, int64_t first, int64_t count, int64_t) {
    const double weight = weights[static_cast<size_t>(i)];
    blend(from + (i * elements + first) * size, weight,
          from + (partner[i] * elements + first) * size, 1.0 - weight,
          to + (i * elements + first) * size, count);
  });
  return out;
}

// dx_j = lam_j g_j + (1 - lam_i) g_i with j = perm_i, and dlam_i = <x_i - x_perm(i), g_i>: a
// stretch of g_j serves both.
std::tuple<Tensor, Tensor> mix_backward(const Tensor& grad, const Tensor& x, const Tensor& perm,
                                        const Tensor& lam, bool want_x, bool want_lam) {
  check_layout(x);
  check_layout(grad);
  const std::vector<double> weights = checked_weights(lam);
  const int64_t rows = x.size(0), mixed = perm.size(0);
  const std::vector<int64_t> inverse = checked_inverse(perm, rows);
  const Tensor partners = torch::stable::contiguous(perm);
  const int64_t* partner = static_cast<const int64_t*>(partners.const_data_ptr());
  const int64_t elements = row_elements(x), size = x.element_size();
  const Tensor grad_x = want_x ? rows_like(x, rows) : torch::stable::new_empty(x, {0});
  const Tensor grad_lam = torch::stable::new_empty(lam, {want_lam ? mixed : 0});
  const char* g = bytes_of(grad);
  const char* from = bytes_of(x);
  char* to = writable_bytes_of(grad_x);
  const int64_t stretches = divide_up(elements, kStretch);
  std::vector<double> products(static_cast<size_t>(want_lam ? mixed * stretches : 0));
  const MixKernels& kernel = kernels().mix[storage_type(x)];
  const auto at = [&](const char* base, int64_t row, int64_t first) {
    return base + (row * elements + first) * size;
  };
  for_stretches(want_x ? rows : mixed, elements,
                [&](int64_t j, int64_t first, int64_t count, int64_t stretch) {
                  if (want_lam && j < mixed) {
                    products[static_cast<size_t>(j * stretches + stretch)] =
                        kernel.difference_product(at(from, j, first), at(from, partner[j], first),
                                                  at(g, j, first), count);
                  }
                  if (!want_x) {
                    return;
                  }
                  char* target = to + (j * elements + first) * size;
                  const int64_t i = inverse[static_cast<size_t>(j)];
                  if (j >= mixed && i < 0) {
                    std::memset(target, 0, static_cast<size_t>(count * size));
                    return;
                  }
                  // A row with one use only is blended from two halves of it.
                  const int64_t own = j < mixed ? j : i, other = i < 0 ? j : i;
                  double own_weight = j < mixed ? weights[static_cast<size_t>(j)] : 0.0;
                  double other_weight = i < 0 ? 0.0 : 1.0 - weights[static_cast<size_t>(i)];
                  if (own == other && (i < 0 || j >= mixed)) {
                    own_weight = other_weight = (own_weight + other_weight) / 2;
                  }
                  kernel.blend(at(g, own, first), own_weight, at(g, other, first), other_weight,
                               target, count);
                });
  for (int64_t i = 0; want_lam && i < mixed; ++i) {
    double total = 0.0;
    for (int64_t s = 0; s < stretches; ++s) {
      total += products[static_cast<size_t>(i * stretches + s)];
    }
    if (grad_lam.scalar_type() == ScalarType::Double) {
      static_cast<double*>(grad_lam.mutable_data_ptr())[i] = total;
    } else {
      static_cast<float*>(grad_lam.mutable_data_ptr())[i] = static_cast<float>(total);
    }
  }
  return {grad_x, grad_lam};
}

// A row as its box sees it: blocks (channels, usually) of planes of lines. In channels_last the
// channels stand innermost, and a line holds them all. Lengths are in bytes.
struct BoxedRows {
  int64_t blocks = 1, planes = 1, lines = 1, line = 1, unit = 1;
  int64_t block() const { return planes * lines * line; }

  BoxedRows(const Tensor& x, int64_t sides) {
    int64_t side[kMostSides] = {1, 1, 1};
    for (int64_t d = 0; d < sides; ++d) {
      side[kMostSides - sides + d] = x.size(x.dim() - sides + d);
    }
    for (int64_t d = 1; d < x.dim() - sides; ++d) {
      blocks *= x.size(d);
    }
    unit = x.element_size();
    if (!x.is_contiguous()) {
      if (sides > x.dim() - 2) {
        throw std::invalid_argument("x must be contiguous where the box has sides in all of it");
      }
      unit *= x.size(1);
      blocks /= x.size(1);
    }
    planes = side[0];
    lines = side[1];
    line = side[2] * unit;
  }
};

struct Span {
  int64_t begin, end;
};

class Boxes {
 public:
  Boxes(const Tensor& box, const Tensor& x)
      : dense_(torch::stable::contiguous(box)),
        data_(static_cast<const int64_t*>(dense_.const_data_ptr())),
        sides_(dense_.size(1)) {
    for (int64_t i = 0; i < dense_.size(0); ++i) {
      for (int64_t d = 0; d < sides_; ++d) {
        const int64_t* span = data_ + (i * sides_ + d) * 2;
        if (span[0] < 0 || span[0] > span[1] || span[1] > x.size(x.dim() - sides_ + d)) {
          throw std::invalid_argument("box must have 0 <= begin <= end <= size on every side");
        }
      }
    }
  }

  // Calls body(first byte, bytes) for the stretches of a block that lie in box i, in ascending
  // order.
  template <typename Body>
  void stretches(const BoxedRows& shape, int64_t i, const Body& body) const {
    const Span plane = span(i, 0), line = span(i, 1), place = span(i, 2);
    const int64_t length = (place.end - place.begin) * shape.unit;
    if (length == 0) {
      return;
    }
    for (int64_t p = plane.begin; p < plane.end; ++p) {
      for (int64_t l = line.begin; l < line.end; ++l) {
        body((p * shape.lines + l) * shape.line + place.begin * shape.unit, length);
      }
    }
  }

 private:
  // Side of three; the first ones are missing in boxes of fewer.
  Span span(int64_t i, int64_t side) const {
    const int64_t d = side - (kMostSides - sides_);
    if (d < 0) {
      return {0, 1};
    }
    const int64_t* found = data_ + (i * sides_ + d) * 2;
    return {found[0], found[1]};
  }

  Tensor dense_;
  const int64_t* data_;
  int64_t sides_;
};

// Calls body(row, first byte of a block in its row) for all blocks of all rows.
template <typename Body>
void for_blocks(int64_t rows, const BoxedRows& shape, const Body& body) {
  if (rows * shape.blocks * shape.block() == 0) {
    return;
  }
  constexpr int64_t kTaskBytes = 4 * kTaskElements;
  for_tasks(rows * shape.blocks, divide_up(kTaskBytes, shape.block()),
            [&](int64_t task) { body(task / shape.blocks, task % shape.blocks * shape.block()); });
}

Tensor paste_boxes(const Tensor& x, const Tensor& perm, const Tensor& box) {
  check_layout(x);
  checked_inverse(perm, x.size(0));
  const Boxes boxes(box, x);
  const BoxedRows shape(x, box.size(1));
  const Tensor partners = torch::stable::contiguous(perm);
  const int64_t* partner = static_cast<const int64_t*>(partners.const_data_ptr());
  const Tensor out = rows_like(x, perm.size(0));
  const char* from = bytes_of(x);
  char* to = writable_bytes_of(out);
  const int64_t row = shape.blocks * shape.block();
  for_blocks(out.size(0), shape, [&](int64_t i, int64_t block) {
    const char* own = from + i * row + block;
    const char* other = from + partner[i] * row + block;
    char* target = to + i * row + block;
    int64_t done = 0;
    boxes.stretches(shape, i, [&](int64_t first, int64_t length) {
      std::memcpy(target + done, own + done, static_cast<size_t>(first - done));
      std::memcpy(target + first, other + first, static_cast<size_t>(length));
      done = first + length;
    });
    std::memcpy(target + done, own + done, static_cast<size_t>(shape.block() - done));
  });
  return out;
}

// A row gets back what it kept, and from the row whose partner it is what lies in that one's box.
Tensor paste_boxes_adjoint(const Tensor& y, const Tensor& perm, const Tensor& box, int64_t rows) {
  check_layout(y);
  const std::vector<int64_t> inverse = checked_inverse(perm, rows);
  const Boxes boxes(box, y);
  const BoxedRows shape(y, box.size(1));
  const int64_t size = y.element_size(), mixed = y.size(0);
  const Tensor out = rows_like(y, rows);
  const char* from = bytes_of(y);
  char* to = writable_bytes_of(out);
  const int64_t row = shape.blocks * shape.block();
  const auto add = kernels().mix[storage_type(y)].add;
  for_blocks(rows, shape, [&](int64_t j, int64_t block) {
    char* target = to + j * row + block;
    int64_t done = 0;
    if (j < mixed) {
      const char* own = from + j * row + block;
      boxes.stretches(shape, j, [&](int64_t first, int64_t length) {
        std::memcpy(target + done, own + done, static_cast<size_t>(first - done));
        std::memset(target + first, 0, static_cast<size_t>(length));
        done = first + length;
      });
      std::memcpy(target + done, own + done, static_cast<size_t>(shape.block() - done));
    } else {
      std::memset(target, 0, static_cast<size_t>(shape.block()));
    }
    const int64_t i = inverse[static_cast<size_t>(j)];
    if (i >= 0) {
      boxes.stretches(shape, i, [&](int64_t first, int64_t length) {
        add(from + i * row + block + first, target + first, length / size);
      });
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("mix", TORCH_BOX(&mix));
  library.impl("mix_backward", TORCH_BOX(&mix_backward));
  library.impl("paste_boxes", TORCH_BOX(&paste_boxes));
  library.impl("paste_boxes_adjoint", TORCH_BOX(&paste_boxes_adjoint));
}

}  // namespace regularizers
