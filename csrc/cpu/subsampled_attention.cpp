// Gathered attention on the CPU: tensors, checks of the lists, tasks, registration. The arithmetic
// is in subsampled_attention_kernels.h.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace regularizers {
namespace {

using Shape = std::vector<int64_t>;

// A tensor [B, H, tokens, features] whose features lie side by side; other strides are kept.
Tensor with_unit_stride(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor token_major(const Tensor& like, const Shape& shape, ScalarType type, bool zeros) {
  const Shape memory{shape[0], shape[2], shape[1], shape[3]};
  Tensor out = zeros ? torch::stable::new_zeros(like, memory, type)
                     : torch::stable::new_empty(like, memory, type);
  return torch::stable::transpose(out, 1, 2);
}

// Marks the places that the lists of each sample name, and refuses what the kernels could not bear.
std::vector<char> named(const std::string& name, const Tensor& lists, int64_t size) {
  const int64_t samples = lists.size(0), entries = lists.size(1) * lists.size(2);
  const int64_t* index = static_cast<const int64_t*>(lists.const_data_ptr());
  std::vector<char> seen(static_cast<size_t>(samples * size));
  for (int64_t b = 0; b < samples; ++b) {
    char* marks = seen.data() + b * size;
    for (int64_t j = 0; j < entries; ++j) {
      const int64_t place = index[b * entries + j];
      if (place < -1 || place >= size) {
        check(false, name + " must lie in [-1, " + std::to_string(size) + "), got " +
                         std::to_string(place));
      }
      if (place >= 0 && marks[place]) {
        check(false, name + " must name a place of a sample at most once, got " +
                         std::to_string(place) + " twice");
      }
      if (place >= 0) {
        marks[place] = 1;
      }
    }
  }
  return seen;
}

// The arguments that both passes share: strides as they come, lists contiguous and checked.
struct Call {
  Tensor q, k, v, key_index;
  std::optional<Tensor> bias, query_index, own;
  StorageType type;
  bool causal;
  double scale;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& bias_,
       const Tensor& key_index_, const std::optional<Tensor>& query_index_,
       const std::optional<Tensor>& own_, bool causal_, std::optional<double> scale_)
      : q(with_unit_stride(q_)),
        k(with_unit_stride(k_)),
        v(with_unit_stride(v_)),
        key_index(torch::stable::contiguous(key_index_)),
        bias(bias_),
        type(storage_type(q_)),
        causal(causal_),
        scale(scale_.value_or(1.0 / std::sqrt(std::max<double>(1.0, q_.size(3))))) {
    const std::vector<char> listed = named("key_index", key_index, tokens());
    if (query_index_.has_value()) {
      query_index = torch::stable::contiguous(*query_index_);
      const std::vector<char> rows = named("query_index", *query_index, queries());
      check(std::all_of(rows.begin(), rows.end(), [](char mark) { return mark != 0; }),
            "query_index must name every query of a sample once");
    }
    if (own_.has_value()) {
      own = torch::stable::contiguous(*own_);
      check_own(listed);
    }
  }

  int64_t samples() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t queries() const { return q.size(2); }
  int64_t tokens() const { return k.size(2); }
  int64_t lists() const { return key_index.size(1); }
  int64_t list_queries() const {
    return query_index.has_value() ? query_index->size(2) : queries();
  }
  const AttentionKernels& kernel() const { return kernels().attention[type]; }

  // The problem of one list, head and sample; outputs are left to the caller.
  Attention problem(int64_t item) const {
    const int64_t list = item % lists(), head = item / lists() % heads(),
                  sample = item / lists() / heads();
    Attention found{};
    found.features = q.size(3);
    found.value_features = v.size(3);
    found.keys = key_index.size(2);
    const auto row = [&](const Tensor& lists) {
      const int64_t b = lists.size(0) == 1 ? 0 : sample;
      return static_cast<const int64_t*>(lists.const_data_ptr()) +
             (b * lists.size(1) + list) * lists.size(2);
    };
    found.key_index = row(key_index);
    found.query_index = query_index.has_value() ? row(*query_index) : nullptr;
    if (own.has_value()) {
      const int64_t b = own->size(0) == 1 ? 0 : sample;
      found.own = static_cast<const bool*>(own->const_data_ptr()) + b * own->size(1);
    }
    found.q = rows(q, sample, head);
    found.k = rows(k, sample, head);
    found.v = rows(v, sample, head);
    if (bias.has_value()) {
      found.bias = rows(*bias, bias->size(0) == 1 ? 0 : sample, bias->size(1) == 1 ? 0 : head);
      found.bias_column = bias->stride(3);
    }
    found.causal = causal;
    found.scale = scale;
    return found;
  }

  static AttentionRows rows(const Tensor& tensor, int64_t sample, int64_t head) {
    const int64_t offset = sample * tensor.stride(0) + head * tensor.stride(1);
    return {static_cast<const char*>(tensor.const_data_ptr()) +
                offset * static_cast<int64_t>(tensor.element_size()),
            tensor.stride(2)};
  }
  AttentionOutput output(const Tensor& tensor, int64_t item) const {
    const int64_t head = item / lists() % heads(), sample = item / lists() / heads();
    const int64_t offset = sample * tensor.stride(0) + head * tensor.stride(1);
    return {static_cast<char*>(tensor.mutable_data_ptr()) +
                offset * static_cast<int64_t>(tensor.element_size()),
            tensor.stride(2)};
  }
  void* log_sum_exp(const Tensor& lse, int64_t item) const {
    return static_cast<char*>(lse.mutable_data_ptr()) +
           item / lists() * queries() * accumulate_bytes(type);
  }

 private:
  void check_own(const std::vector<char>& listed) const {
    const bool* sees = static_cast<const bool*>(own->const_data_ptr());
    const int64_t size = tokens(), samples = std::max(own->size(0), key_index.size(0));
    for (int64_t b = 0; b < samples; ++b) {
      const bool* row = sees + (own->size(0) == 1 ? 0 : b) * size;
      const char* marks = listed.data() + (key_index.size(0) == 1 ? 0 : b) * size;
      for (int64_t j = 0; j < size; ++j) {
        check_none(row[j] && marks[j]);
      }
    }
  }
  static void check_none(bool both) {
    if (both) {
      check(false, "own must be False for the keys of key_index");
    }
  }
};

// How the queries of every list are cut into tasks: by sizes alone, so that sums are added up in
// one order whatever the number of threads. Lists are many; where there are few, each is cut, at
// the price of gathering its keys once a part and of adding up parts of the gradients.
struct Cut {
  int64_t items, parts, part_queries;

  explicit Cut(const Call& call) {
    constexpr int64_t kWantedTasks = 16, kLeastBlocks = 4;
    items = call.samples() * call.heads() * call.lists();
    const int64_t blocks = divide_up(call.list_queries(), call.kernel().block_rows);
    const int64_t wanted = divide_up(kWantedTasks, std::max<int64_t>(1, items));
    const int64_t part_blocks = std::max(divide_up(blocks, wanted), kLeastBlocks);
    parts = std::max<int64_t>(1, divide_up(blocks, part_blocks));
    part_queries = part_blocks * call.kernel().block_rows;
  }

  template <typename Body>
  void run(const Call& call, int64_t count, const Body& body) const {
    constexpr int64_t kSerialProducts = 1 << 18;  // some 10 us: waking a thread costs as much
    const int64_t products =
        items * call.list_queries() * call.key_index.size(2) * (call.q.size(3) + call.v.size(3));
    torch::stable::parallel_for(0, count, products < kSerialProducts ? count : 1, body);
  }
};

// Memory of one thread, aligned to vectors.
class Memory {
 public:
  Memory(int64_t elements, int64_t bytes)
      : bytes_(static_cast<size_t>(elements * bytes) + kAlignment) {}
  void* get() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(bytes_.get());
    return reinterpret_cast<void*>(divide_up(static_cast<int64_t>(address), kAlignment) *
                                   kAlignment);
  }

 private:
  static constexpr int64_t kAlignment = 64;
  struct Bytes {  // not a vector, which would write zeros first
    explicit Bytes(size_t size) : data(::operator new(size)) {}
    ~Bytes() { ::operator delete(data); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    void* get() const { return data; }
    void* data;
  } bytes_;
};

std::tuple<Tensor, Tensor> gathered_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const std::optional<Tensor>& bias,
                                              const Tensor& key_index,
                                              const std::optional<Tensor>& query_index,
                                              const std::optional<Tensor>& own, bool causal,
                                              std::optional<double> scale) {
  const Call call(q, k, v, bias, key_index, query_index, own, causal, scale);
  const Tensor out = token_major(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type(),
                                 /*zeros=*/false);
  const Tensor lse =
      torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, accumulate_type(call.type));
  const Cut cut(call);
  if (q.size(2) == 0 || cut.items == 0) {
    return {out, lse};
  }
  const int64_t scratch_size = call.kernel().scratch(call.problem(0), false);
  cut.run(call, cut.items * cut.parts, [&](int64_t begin, int64_t end) {
    Memory scratch(scratch_size, accumulate_bytes(call.type));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / cut.parts, first = task % cut.parts * cut.part_queries;
      Attention problem = call.problem(item);
      problem.out = call.output(out, item);
      problem.lse = call.log_sum_exp(lse, item);
      call.kernel().forward(problem, scratch.get(), first,
                            std::min(first + cut.part_queries, call.list_queries()));
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gathered_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& bias, const Tensor& key_index,
    const std::optional<Tensor>& query_index, const std::optional<Tensor>& own, const Tensor& out,
    const Tensor& lse, bool causal, std::optional<double> scale, bool wants_bias) {
  const Call call(q, k, v, bias, key_index, query_index, own, causal, scale);
  const Tensor cotangent = with_unit_stride(grad), result = with_unit_stride(out);
  const Tensor log_sum_exp = torch::stable::contiguous(lse);
  const auto like = [](const Tensor& tensor) {
    return Shape{tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
  };
  const Tensor grad_q = token_major(q, like(q), q.scalar_type(), /*zeros=*/false);
  const Tensor grad_k = token_major(q, like(k), q.scalar_type(), /*zeros=*/true);
  const Tensor grad_v = token_major(q, like(v), q.scalar_type(), /*zeros=*/true);
  const Tensor grad_bias = torch::stable::new_zeros(
      q, wants_bias ? Shape{q.size(0), q.size(1), q.size(2), k.size(2)} : Shape{0},
      q.scalar_type());
  const Cut cut(call);
  if (q.size(2) == 0 || cut.items == 0) {
    return {grad_q, grad_k, grad_v, grad_bias};
  }
  const auto problem_of = [&](int64_t item) {
    Attention problem = call.problem(item);
    problem.out = call.output(result, item);
    problem.lse = call.log_sum_exp(log_sum_exp, item);
    const int64_t head = item / call.lists() % call.heads(),
                  sample = item / call.lists() / call.heads();
    problem.grad = Call::rows(cotangent, sample, head);
    problem.grad_q = call.output(grad_q, item);
    problem.grad_k = call.output(grad_k, item);
    problem.grad_v = call.output(grad_v, item);
    problem.grad_bias = wants_bias ? call.output(grad_bias, item) : AttentionOutput{nullptr, 0};
    return problem;
  };
  const AttentionKernels& kernel = call.kernel();
  const int64_t bytes = accumulate_bytes(call.type);
  const int64_t scratch_size = kernel.scratch(call.problem(0), true);
  const int64_t sums_size = kernel.sums(call.problem(0));
  // One part: a thread keeps the sums of the list at hand. Several: all are kept and added up.
  const bool whole = cut.parts == 1;
  Memory all_sums(whole ? 0 : cut.items * cut.parts * sums_size, bytes);
  cut.run(call, cut.items * cut.parts, [&](int64_t begin, int64_t end) {
    Memory scratch(scratch_size, bytes), own_sums(whole ? sums_size : 0, bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / cut.parts, first = task % cut.parts * cut.part_queries;
      void* sums =
          whole ? own_sums.get() : static_cast<char*>(all_sums.get()) + task * sums_size * bytes;
      std::fill_n(static_cast<char*>(sums), sums_size * bytes, 0);
      const Attention problem = problem_of(item);
      kernel.backward(problem, scratch.get(), first,
                      std::min(first + cut.part_queries, call.list_queries()), sums);
      if (whole) {
        kernel.key_gradients(problem, sums, 1);
      }
    }
  });
  if (!whole) {
    cut.run(call, cut.items, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        kernel.key_gradients(
            problem_of(item),
            static_cast<char*>(all_sums.get()) + item * cut.parts * sums_size * bytes, cut.parts);
      }
    });
  }
  return {grad_q, grad_k, grad_v, grad_bias};
}

// Words of elements 0, 1, ... of streams 0, 1, ..., as int64.
Tensor philox_sample_words(const Tensor& seed, int64_t samples, int64_t elements, int64_t step) {
  constexpr int64_t kPiece = 256;  // calls
  const Tensor out = torch::stable::new_empty(seed, {samples, elements}, ScalarType::Long);
  int64_t* words = static_cast<int64_t*>(out.mutable_data_ptr());
  const uint64_t seed_bits = seed_value(seed);
  const int64_t calls = divide_up(elements, kWordsPerCall), pieces = divide_up(calls, kPiece);
  torch::stable::parallel_for(0, samples * pieces, 16, [&](int64_t begin, int64_t end) {
    uint32_t piece[kPiece * kWordsPerCall];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / pieces, first = task % pieces * kPiece;
      kernels().philox_words(
          {seed_bits, static_cast<uint32_t>(sample), static_cast<uint32_t>(step)},
          static_cast<uint64_t>(first), std::min(kPiece, calls - first), piece);
      const int64_t begin_element = first * kWordsPerCall;
      const int64_t count = std::min(kPiece * kWordsPerCall, elements - begin_element);
      std::copy_n(piece, count, words + sample * elements + begin_element);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(regularizers, CPU, library) {
  library.impl("gathered_attention", TORCH_BOX(&gathered_attention));
  library.impl("gathered_attention_backward", TORCH_BOX(&gathered_attention_backward));
  library.impl("philox_sample_words", TORCH_BOX(&philox_sample_words));
}

}  // namespace regularizers
