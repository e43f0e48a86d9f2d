#include "forward.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../dtype.h"
#include "../parts.h"
#include "memory.h"
#include "parallel.h"

namespace arl::cpu {
namespace {

std::vector<const Isa*> find_isas() {
  std::vector<const Isa*> isas;
#if defined(ARL_FAST_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) isas.push_back(&isa_avx512);
  if (avx2) isas.push_back(&isa_avx2);
#endif
  isas.push_back(&isa_baseline);
  return isas;
}

const std::vector<const Isa*>& isas() {
  static const std::vector<const Isa*> found = find_isas();
  return found;
}

const Isa* named(const std::string& name) {
  for (const Isa* candidate : isas()) {
    if (name == candidate->name) return candidate;
  }
  std::string known;
  for (const Isa* candidate : isas()) known += std::string(known.empty() ? "" : ", ") + candidate->name;
  TORCH_CHECK_VALUE(false, "ARL_FAST_ISA: got ", name, ", expected one of ", known, " on this CPU");
}

const Isa*& chosen() {
  static const Isa* isa = [] {
    const char* name = std::getenv("ARL_FAST_ISA");
    return name != nullptr && *name != '\0' ? named(name) : isas().front();
  }();
  return isa;
}

constexpr int64_t kFarBytes = 1 << 20;  // logits and gradients from which on no core's own cache keeps them
constexpr int64_t kStreamBytes = 64 << 20;  // gradients of all branches from which on no cache keeps them
constexpr int64_t kGrain = 32768;           // fewest logits worth another thread, whose start costs 3 to 5 us
constexpr int64_t kCountRows = 1 << 15;
constexpr int64_t kSharedBytes = 256 << 10;  // gradients of all branches up to which they share memory

struct RowCount {
  double count = 0, divisor = 0;  // what is valid, rows or pairs, and the sum of the rows' weights
};

// The class indices as they are given, and where they go as the row kernels read them.
struct Indices {
  const void* given = nullptr;
  bool is_int64 = false;
  int64_t ignore_index = 0;
  int32_t* read = nullptr;
  int32_t few[64 + kMostLanes];
  std::unique_ptr<int32_t[]> many;

  void make_room(int64_t rows) {
    const int64_t count = rows + kMostLanes;
    if (count > int64_t(std::size(few))) many.reset(new int32_t[count]);
    read = many != nullptr ? many.get() : few;
    std::fill_n(read + rows, kMostLanes, -1);
  }
};

// Valid rows of each branch and what "mean" divides by, before any gradient is written; reads and checks the
// class indices.
template <class T, class Index>
void count_chunk(const Loss& loss, const Indices& indices, int64_t begin, int64_t end, RowCount* counts) {
  const Index* target = static_cast<const Index*>(indices.given);
  const T* weight = static_cast<const T*>(loss.weight);
  int32_t* read = indices.read;
  if (target != nullptr) {
    const int64_t ignore_index = indices.ignore_index, classes = loss.classes;
    bool bad = false;
    int64_t valid = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = target[i];
      const bool used = y != ignore_index;
      bad |= used && uint64_t(y) >= uint64_t(classes);
      valid += used;
      read[i] = used ? int32_t(y) : -1;
    }
    if (bad) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t y = target[i];
        TORCH_CHECK_INDEX(y == ignore_index || (y >= 0 && y < classes), "target: got class ", y,
                          ", expected 0 <= target < ", classes, " or ignore_index=", ignore_index);
      }
    }
    if (loss.mask == nullptr && weight == nullptr) {
      for (int b = 0; b < loss.branches; ++b) counts[b] = {double(valid), double(valid)};
      return;
    }
  }
  for (int b = 0; b < loss.branches; ++b) {
    RowCount own;
    for (int64_t i = begin; i < end; ++i) {
      if (!loss.valid(b, i)) continue;
      own.count += 1;
      own.divisor += weight != nullptr && target != nullptr ? double(weight[read[i]]) : 1;
    }
    counts[b] = own;
  }
}

template <class T>
void count_rows(Loss& loss, Indices& indices, RowCount* counts) {
  if (indices.given != nullptr) {
    indices.make_room(loss.rows);
    loss.target = indices.read;
  }
  const auto count = indices.is_int64 ? &count_chunk<T, int64_t> : &count_chunk<T, int32_t>;
  if (loss.rows <= kCountRows) return count(loss, indices, 0, loss.rows, counts);
  const int64_t chunks = (loss.rows + kCountRows - 1) / kCountRows;
  std::vector<RowCount> parts(chunks * loss.branches);
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kCountRows;
      count(loss, indices, first, std::min(loss.rows, first + kCountRows), &parts[i * loss.branches]);
    }
  });
  for (int64_t i = 0; i < chunks; ++i) {
    for (int b = 0; b < loss.branches; ++b) {
      counts[b].count += parts[i * loss.branches + b].count;
      counts[b].divisor += parts[i * loss.branches + b].divisor;
    }
  }
}

// Of the first label outside of [0, 1], with as many digits as tell it apart from others.
template <class T>
[[noreturn]] void refuse_label(const T* label) {
  while (!(*label < 0 || *label > 1)) ++label;
  const double value = *label;
  char digits[32];
  for (int count = 15; count <= 17; ++count) {
    std::snprintf(digits, sizeof(digits), "%.*g", count, value);
    if (std::strtod(digits, nullptr) == value) break;
  }
  // the same words as in arl_fast/_core/checks.py
  TORCH_CHECK_VALUE(false, "target: got ", digits, ", expected labels in [0, 1], or NaN for unknown ones");
}

// Pairs of each branch whose label is known and whose modality is present; checks the labels.
template <class T>
void count_pairs(Loss& loss, RowCount* counts) {
  const auto known = sizeof(T) == 8 ? chosen()->known_double : chosen()->known_float;
  const int64_t pairs = loss.rows * loss.classes, chunks = (pairs + kCountRows - 1) / kCountRows;
  std::vector<int64_t> parts(chunks);
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = known(loss.soft_target, i * kCountRows, std::min(pairs, (i + 1) * kCountRows));
    }
  });
  int64_t total = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    if (parts[i] < 0) refuse_label(static_cast<const T*>(loss.soft_target) + i * kCountRows);
    total += parts[i];
  }
  loss.all_known = total == pairs;
  for (int b = 0; b < loss.branches; ++b) {
    int64_t own = total;
    if (b > 0 && loss.mask != nullptr) {
      own = 0;
      for (int64_t i = 0; i < loss.rows; ++i) {
        if (!loss.present(b, i)) continue;
        const int64_t first = i * loss.classes;
        own += loss.all_known ? loss.classes : known(loss.soft_target, first, first + loss.classes);
      }
    }
    counts[b] = {double(own), double(own)};
  }
}

void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = (bytes + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, size));
    TORCH_CHECK(memory != nullptr, "out of memory: ", size, " bytes");
  }
  return memory.get();
}

// Runs the row kernel over all chunks of all branches. The chunks depend on the shape alone and are added in
// order, so that the result does not depend on the number of threads.
void run_rows(const Loss& loss, RowsFn rows, size_t element, ChunkSums* totals) {
  const bool columns = loss.positions > 0;
  const int64_t chunk = std::clamp<int64_t>(16384 / loss.classes, columns ? kMostLanes : 1, kChunkRows);
  const int64_t span = columns ? loss.positions : loss.rows;  // no chunk reaches past one
  const int64_t per_span = (span + chunk - 1) / chunk;
  const int64_t chunks = per_span * (loss.rows / span);
  const int64_t items = chunks * loss.branches;
  c10::SmallVector<ChunkSums, 4> parts(items);
  const size_t scratch = size_t(scratch_elements(loss.classes, columns)) * element;
  const auto run = [&](int64_t begin, int64_t end) {
    void* memory = thread_scratch(scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i % chunks, first = at / per_span * span + at % per_span * chunk;
      const int64_t end = std::min(at / per_span * span + span, first + chunk);
      rows(loss, int(i / chunks), first, end, memory, &parts[i]);
    }
  };
  parallel(items, std::max<int64_t>(1, kGrain / (chunk * loss.classes)), run);
  for (int64_t i = 0; i < items; ++i) {
    ChunkSums& total = totals[i / chunks];
    for (int s = 0; s < kSums; ++s) total.of[s] += parts[i].of[s];
  }
}

// The same for labels, whose chunks are of pairs. The branches of a chunk follow each other, since they read
// the same labels.
void run_pairs(const Loss& loss, RowsFn labels, ChunkSums* totals) {
  const int64_t pairs = loss.rows * loss.classes;
  const int64_t items = (pairs + kChunkPairs - 1) / kChunkPairs * loss.branches;
  std::vector<ChunkSums> parts(items);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / loss.branches * kChunkPairs;
      labels(loss, int(i % loss.branches), first, std::min(pairs, first + kChunkPairs), nullptr, &parts[i]);
    }
  };
  parallel(items, kGrain / kChunkPairs, run);
  for (int64_t i = 0; i < items; ++i) {
    ChunkSums& total = totals[i % loss.branches];
    for (int s = 0; s < kSums; ++s) total.of[s] += parts[i].of[s];
  }
}

template <class T>
void run(Loss& loss, Indices& indices, const Options& options, const Numbers& numbers, const T* divisor,
         T* packed, T* out) {
  const int branches = loss.branches;
  const auto gamma = [&](int modality) { return T(numbers.gamma(modality)); };
  const bool labels = options.task == kMultilabel;
  c10::SmallVector<RowCount, 4> counts(branches);
  labels ? count_pairs<T>(loss, counts.data()) : count_rows<T>(loss, indices, counts.data());
  for (int b = 0; b < branches; ++b) {
    loss.grad_scale[b] = b == 0 ? 1.0 : double(gamma(b - 1));
    const double rows = divisor != nullptr ? double(divisor[b]) : counts[b].divisor;
    if (options.reduction == kMean) loss.grad_scale[b] /= rows;
  }
  c10::SmallVector<ChunkSums, 4> totals(branches);
  if (labels) {
    run_pairs(loss, chosen()->labels[loss.dtype], totals.data());
  } else if (loss.rows > 0) {
    run_rows(loss, chosen()->rows[loss.dtype], sizeof(T), totals.data());
  }

  T* sums = packed + packed_offset<kPackedSums>(branches - 1);
  for (int b = 0; b < branches; ++b) {
    totals[b].of[kDivisor] = counts[b].divisor;
    totals[b].of[kCount] = counts[b].count;
    for (int s = 0; s < kSums; ++s) sums[s * branches + b] = T(totals[b].of[s]);
  }
  const T temperature = T(numbers.temperature);
  const T total = finish<T>(sums, branches - 1, gamma, temperature, numbers.warming, options, packed);
  if (options.reduction != kNoReduction) {
    *out = total;
    return;
  }
  const T* row_loss = static_cast<const T*>(loss.row_loss);
  const int64_t losses = labels ? loss.rows * loss.classes : loss.rows;
  for (int64_t i = 0; i < losses; ++i) {
    T unimodal = 0;
    for (int b = 1; b < branches; ++b) unimodal += gamma(b - 1) * row_loss[b * losses + i];
    out[i] = row_loss[i] + unimodal;
  }
}

// What multiplies the loss of a yes and of a no of each label, [2, classes + kMostLanes] (loss.h).
template <class T>
at::Tensor label_weights(const at::Tensor& weight, const at::Tensor& pos_weight, int64_t classes) {
  const int64_t length = classes + kMostLanes;
  at::Tensor table = at::empty({2, length}, c10::CppTypeToScalarType<T>::value);
  T *yes = table.mutable_data_ptr<T>(), *no = yes + length;
  for (int64_t c = 0; c < length; ++c) {
    no[c] = weight.defined() ? weight.const_data_ptr<T>()[c % classes] : T(1);
    yes[c] = pos_weight.defined() ? no[c] * pos_weight.const_data_ptr<T>()[c % classes] : no[c];
  }
  return table;
}

// Uninitialised gradients [rows, classes] of the wanted branches.
struct Gradients {
  int64_t rows, classes, step;
  at::ScalarType type;
  at::Tensor all;  // where they share an allocation
  int taken = 0;

  Gradients(const Loss& loss, at::ScalarType type, uint64_t wanted, bool shared)
      : rows(loss.rows), classes(loss.classes), type(type) {
    constexpr int64_t line = 64;  // bytes at whose multiples each starts
    const int64_t element = int64_t(c10::elementSize(type)), count = __builtin_popcountll(wanted);
    step = (rows * classes * element + line - 1) / line * line / element;
    if (shared && count > 1 && count * step * element <= kSharedBytes)
      all = empty_gradient(count, step, type);
  }
  at::Tensor next() {
    return all.defined() ? part_of(all, step * taken++, {rows, classes})
                         : empty_gradient(rows, classes, type);
  }
};

// Element i of a tensor on the CPU.
double element(const at::Tensor& tensor, int64_t i) {
  const int64_t at = tensor.dim() == 0 ? 0 : i * tensor.stride(0);
  switch (tensor.scalar_type()) {
    case at::kDouble: return tensor.const_data_ptr<double>()[at];
    case at::kFloat: return tensor.const_data_ptr<float>()[at];
    case at::kLong: return double(tensor.const_data_ptr<int64_t>()[at]);
    default: return tensor.reshape({-1})[i].item<double>();
  }
}

}  // namespace

Numbers read(const Schedule& schedule) {
  Numbers numbers;
  if (schedule.gamma == nullptr) {
    numbers.gammas = schedule.gammas;
  } else {
    for (int64_t m = 0; m < schedule.gamma->numel(); ++m) {
      numbers.gammas.push_back(element(*schedule.gamma, m));
    }
  }
  numbers.temperature =
      schedule.temperature == nullptr ? schedule.temperature_number : element(*schedule.temperature, 0);
  const double step = schedule.step == nullptr ? 0 : element(*schedule.step, 0);
  numbers.warming = step < double(schedule.warmup);
  return numbers;
}

Outputs forward(const Inputs& inputs, const Options& options) {
  const int branches = int(inputs.logits.size());
  TORCH_CHECK_VALUE(branches >= 2 && branches <= kMaxBranches, "logits: got ", branches,
                    " branches, expected 2 to ", kMaxBranches);
  const size_t gammas = inputs.numbers.gammas.size();
  TORCH_CHECK_VALUE(gammas == 1 || gammas == size_t(branches - 1), "gamma: got ", gammas,
                    " values, expected one, or one for each of the ", branches - 1, " modalities");
  const Targets& given = inputs.targets;
  const at::Tensor& fused = *inputs.logits[0];
  const at::ScalarType type = fused.scalar_type();
  const at::ScalarType compute = type == at::kDouble ? at::kDouble : at::kFloat;

  Loss loss = {};
  Indices indices;
  loss.branches = branches;
  loss.positions = fused.dim() == 3 ? fused.size(2) : 0;
  loss.rows = fused.size(0) * (loss.positions > 0 ? loss.positions : 1);
  loss.classes = fused.size(1);
  loss.dtype = dtype_of(type);
  Outputs outputs;
  outputs.grads.resize(branches);
  c10::SmallVector<at::Tensor, 4> copies;
  Gradients gradients(loss, type == at::kHalf ? at::kFloat : type, inputs.wanted, inputs.shared);
  for (int b = 0; b < branches; ++b) {
    const at::Tensor* x = inputs.logits[b];
    TORCH_CHECK_VALUE((x->dim() == 2 || loss.positions > 0) && x->sizes() == fused.sizes() &&
                          x->scalar_type() == type && x->is_cpu(),
                      "logits: expected tensors of one shape [N, C] or [B, C, P] and one dtype on the CPU");
    const bool as_is = loss.positions > 0 ? x->stride(2) == 1 && x->stride(1) == loss.positions
                                          : x->stride(1) == 1 || loss.classes == 1;
    if (!as_is) {
      copies.push_back(x->contiguous());
      x = &copies.back();
    }
    loss.logits[b] = x->const_data_ptr();
    loss.row_stride[b] = x->stride(0);
    if (inputs.wanted >> b & 1) {
      TORCH_CHECK(!inputs.in_place || (type != at::kHalf && x->is_contiguous()),
                  "logits: gradients of these do not fit in their place");
      outputs.grads[b] = inputs.in_place ? *x : gradients.next();
      if (loss.positions > 0) outputs.grads[b] = outputs.grads[b].view(fused.sizes());
      loss.grad[b] = outputs.grads[b].mutable_data_ptr();
    }
  }
  release_unused_memory();
  int64_t written = 0;
  for (const at::Tensor& grad : outputs.grads) written += grad.defined() ? int64_t(grad.nbytes()) : 0;
  loss.far = branches * int64_t(fused.nbytes()) + written >= kFarBytes;
  loss.streams = written >= kStreamBytes;

  const bool labels = options.task == kMultilabel;
  const at::Tensor& target = *given.target;
  at::Tensor own_target, weight, pos_weight, label_weight, divisor, row_loss;
  TORCH_CHECK_TYPE(!labels || target.is_floating_point(), "target: expected labels of floating point");
  TORCH_CHECK_VALUE(labels || given.pos_weight == nullptr, "pos_weight: expected None without labels");
  if (target.is_floating_point()) {
    TORCH_CHECK_VALUE(loss.positions == 0 && target.sizes() == fused.sizes(), "target: expected ",
                      labels ? "labels" : "probabilities", " of the shape of logits [N, C]");
    own_target = target.to(compute).contiguous();
    loss.soft_target = own_target.const_data_ptr();
  } else {
    TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == loss.rows, "target: expected [N] class indices");
    TORCH_CHECK_TYPE(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt,
                     "target: expected int64 or int32 class indices");
    if (!target.is_contiguous()) own_target = target.contiguous();
    indices.given = own_target.defined() ? own_target.const_data_ptr() : target.const_data_ptr();
    indices.is_int64 = target.scalar_type() == at::kLong;
    indices.ignore_index = options.ignore_index;
  }
  loss.weight_total = double(loss.classes);
  if (given.weight != nullptr) {
    weight = given.weight->to(compute).contiguous();
    TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == loss.classes, "weight: expected [C]");
    loss.weight = weight.const_data_ptr();
    if (options.label_smoothing != 0) loss.weight_total = weight.sum(at::kDouble).item<double>();
  }
  if (given.pos_weight != nullptr) {
    pos_weight = given.pos_weight->to(compute).contiguous();
    TORCH_CHECK_VALUE(pos_weight.dim() == 1 && pos_weight.size(0) == loss.classes,
                      "pos_weight: expected [C]");
  }
  if (labels && (weight.defined() || pos_weight.defined())) {
    const auto make = compute == at::kDouble ? &label_weights<double> : &label_weights<float>;
    label_weight = make(weight, pos_weight, loss.classes);
    loss.yes_weight = label_weight.const_data_ptr();
    loss.no_weight = label_weight[1].const_data_ptr();
  }
  if (given.mask != nullptr) {
    const at::Tensor& mask = *given.mask;
    TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool && mask.dim() == 2 && mask.size(0) == fused.size(0) &&
                          mask.size(1) == branches - 1,
                      "mask: expected bool [N, M]");
    loss.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    loss.mask_row_stride = mask.stride(0);
    loss.mask_stride = mask.stride(1);
  }
  if (given.divisor != nullptr) divisor = given.divisor->to(compute).contiguous();
  loss.label_smoothing = options.label_smoothing;
  loss.logit_l1 = options.dependence == kLogitL1;

  const int64_t length = packed_length(branches - 1);
  if (options.reduction == kNoReduction) {
    outputs.packed = empty({length}, compute);
    outputs.loss = labels ? empty({loss.rows, loss.classes}, compute) : empty({loss.rows}, compute);
    row_loss = empty({branches, outputs.loss.numel()}, compute);
    loss.row_loss = row_loss.mutable_data_ptr();
  } else if (inputs.shared) {  // the loss behind the statistics
    outputs.packed = empty({length + 1}, compute);
    outputs.loss = part_of(outputs.packed, length, {});
    outputs.packed.unsafeGetTensorImpl()->set_sizes_contiguous({length});
  } else {
    outputs.packed = empty({length}, compute);
    outputs.loss = empty({}, compute);
  }
  const void* divisors = divisor.defined() ? divisor.const_data_ptr() : nullptr;
  void* packed = outputs.packed.mutable_data_ptr();
  void* out = outputs.loss.mutable_data_ptr();
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    run<T>(loss, indices, options, inputs.numbers, static_cast<const T*>(divisors), static_cast<T*>(packed),
           static_cast<T*>(out));
  };
  compute == at::kDouble ? run_as(double()) : run_as(float());
  return outputs;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : isas()) names.emplace_back(isa->name);
  return names;
}

std::string isa() { return chosen()->name; }

void set_isa(const std::string& name) { chosen() = named(name); }

}  // namespace arl::cpu
