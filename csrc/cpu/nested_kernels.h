// Rows on their way into and out of the products of a prefix linear map.
#pragma once

#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace regularizers::REGULARIZERS_ISA {

// to[i] = prefix of from[order[i]], widened, then zeros.
template <typename T>
static void gather_prefixes(const PrefixRows& rows, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* from = static_cast<const T*>(rows.from) + rows.order[i] * rows.from_stride;
    A* to = static_cast<A*>(rows.to) + i * rows.to_stride;
    const int64_t kept = rows.kept[i], width = rows.width[i];
    for (int64_t d = 0; d < kept; ++d) {
      to[d] = widen(from[d]);
    }
    std::memset(to + kept, 0, sizeof(A) * static_cast<size_t>(width - kept));
  }
}

// to[order[i]] = prefix of from[i], rounded, then zeros.
template <typename T>
static void scatter_prefixes(const PrefixRows& rows, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  for (int64_t i = begin; i < end; ++i) {
    const A* from = static_cast<const A*>(rows.from) + i * rows.from_stride;
    T* to = static_cast<T*>(rows.to) + rows.order[i] * rows.to_stride;
    const int64_t kept = rows.kept[i], width = rows.width[i];
    for (int64_t d = 0; d < kept; ++d) {
      to[d] = narrow<T>(from[d]);
    }
    std::memset(to + kept, 0, sizeof(T) * static_cast<size_t>(width - kept));
  }
}

}  // namespace regularizers::REGULARIZERS_ISA
