// The CPU kernels of rows and of labels alone, under AddressSanitizer and UndefinedBehaviorSanitizer
// (tests/test_native_sanitized.py).
//
// Every buffer is a heap block of exactly its size, so that a read or write one element outside is seen. Each
// result is checked against plain double arithmetic, so that the kernel also has to be right here.
#define ARL_ISA sanitized
#define ARL_ISA_NAME "sanitized"
#include "../../csrc/cpu/isa.inc"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

using arl::cpu::Loss;

namespace {

uint32_t state = 1;
double noise() {  // uniform in [-4, 4)
  state = state * 1664525u + 1013904223u;
  return double(state >> 8) / double(1 << 24) * 8 - 4;
}

struct Case {
  int64_t rows, classes, stride;
  arl::Dtype dtype;
  bool soft, weighted, masked, streams;
  double smoothing;
};

template <class S>
double read(const S& value) {
  return double(arl::sanitized::to_float(value));
}

template <class S>
S write(double value);
template <>
double write<double>(double value) {
  return value;
}
template <>
float write<float>(double value) {
  return float(value);
}
template <>
arl::sanitized::Bf16 write<arl::sanitized::Bf16>(double value) {
  return arl::sanitized::from_float<arl::sanitized::Bf16>(float(value));
}
template <>
arl::sanitized::F16 write<arl::sanitized::F16>(double value) {  // a few values that float16 holds exactly
  return {uint16_t(value != value ? 0x7e00 : value < 0 ? 0xbc00 : value < 1 ? 0x3800 : 0x4200)};
}

template <class T, class S, class G>
int check(const Case& c) {
  const int64_t elements = (c.rows - 1) * c.stride + c.classes;
  std::unique_ptr<S[]> x(new S[elements]);
  for (int64_t i = 0; i < elements; ++i) x[i] = write<S>(noise());
  std::unique_ptr<G[]> grad(new G[c.rows * c.classes]);
  std::vector<int32_t> y(c.rows + arl::cpu::kMostLanes, -1);
  std::unique_ptr<uint8_t[]> mask(new uint8_t[c.rows]);
  std::unique_ptr<T[]> weight(new T[c.classes]), soft(new T[c.rows * c.classes]);
  double weight_total = 0;
  for (int64_t k = 0; k < c.classes; ++k) {
    weight[k] = T(0.5 + (noise() + 4) / 8);
    weight_total += double(weight[k]);
  }
  for (int64_t i = 0; i < c.rows * c.classes; ++i) soft[i] = T((noise() + 4) / double(8 * c.classes));
  for (int64_t i = 0; i < c.rows; ++i) {
    y[i] = int32_t(state >> 8) % int32_t(c.classes);
    noise();
    if (i % 7 == 3) y[i] = -1;
    mask[i] = i % 5 != 2;
  }

  Loss loss = {};
  loss.branches = 2;
  loss.rows = c.rows;
  loss.classes = c.classes;
  loss.dtype = c.dtype;
  loss.logits[1] = x.get();
  loss.row_stride[1] = c.stride;
  loss.grad[1] = grad.get();
  loss.grad_scale[1] = 0.25;
  loss.streams = c.streams;
  loss.target = y.data();
  if (c.soft) loss.soft_target = soft.get();
  if (c.masked) {
    loss.mask = mask.get();
    loss.mask_row_stride = loss.mask_stride = 1;
  }
  if (c.weighted) loss.weight = weight.get();
  loss.weight_total = c.weighted ? weight_total : double(c.classes);
  loss.label_smoothing = c.smoothing;
  loss.logit_l1 = c.classes % 2 == 0;

  const size_t scratch_bytes = size_t(arl::cpu::scratch_elements(c.classes, !c.soft)) * sizeof(T);
  std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64),
                                                      &std::free);
  double total = 0, entropy_total = 0, correct_total = 0, dependence_total = 0;
  for (int64_t begin = 0; begin < c.rows; begin += arl::cpu::kChunkRows) {
    const int64_t end = begin + arl::cpu::kChunkRows < c.rows ? begin + arl::cpu::kChunkRows : c.rows;
    arl::cpu::ChunkSums sums;
    arl::cpu::isa_sanitized.rows[c.dtype](loss, 1, begin, end, scratch.get(), &sums);
    total += sums.of[arl::kLoss];
    entropy_total += sums.of[arl::kEntropy];
    correct_total += sums.of[arl::kCorrect];
    dependence_total += sums.of[arl::kDependence];
  }

  // The same in the place of the logits, where these have the gradient's type and no gaps.
  bool in_place = true;
  if (std::is_same<S, G>::value && c.stride == c.classes) {
    std::unique_ptr<S[]> own(new S[elements]);
    std::copy(x.get(), x.get() + elements, own.get());
    loss.logits[1] = loss.grad[1] = own.get();
    for (int64_t begin = 0; begin < c.rows; begin += arl::cpu::kChunkRows) {
      const int64_t end = begin + arl::cpu::kChunkRows < c.rows ? begin + arl::cpu::kChunkRows : c.rows;
      arl::cpu::ChunkSums sums;
      arl::cpu::isa_sanitized.rows[c.dtype](loss, 1, begin, end, scratch.get(), &sums);
    }
    in_place = std::memcmp(own.get(), grad.get(), elements * sizeof(S)) == 0;
  }

  double expected = 0, entropy = 0, correct = 0, dependence = 0, worst = 0;
  // The same class after class, the rows side by side, as the positions of two images or of one.
  if (!c.soft) {
    const int64_t images = c.rows % 2 == 0 && !c.masked ? 2 : 1, positions = c.rows / images;
    std::unique_ptr<S[]> columns(new S[c.rows * c.classes]);
    std::unique_ptr<G[]> column_grad(new G[c.rows * c.classes]);
    const auto at = [&](int64_t row, int64_t k) {
      return (row / positions * c.classes + k) * positions + row % positions;
    };
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t k = 0; k < c.classes; ++k) columns[at(i, k)] = x[i * c.stride + k];
    }
    uint8_t present = 1;
    loss.positions = positions;
    loss.logits[1] = columns.get();
    loss.grad[1] = column_grad.get();
    loss.row_stride[1] = positions * c.classes;
    if (c.masked) loss.mask = &present;
    for (int64_t begin = 0, end; begin < c.rows; begin = end) {
      end = std::min(begin + arl::cpu::kChunkRows, (begin / positions + 1) * positions);
      arl::cpu::ChunkSums sums;
      arl::cpu::isa_sanitized.rows[c.dtype](loss, 1, begin, end, scratch.get(), &sums);
    }
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t k = 0; k < c.classes && (!c.masked || mask[i]); ++k) {
        const double off = read(column_grad[at(i, k)]) - read(grad[i * c.classes + k]);
        worst = std::fmax(worst, std::fabs(off));
      }
    }
  }

  for (int64_t i = 0; i < c.rows; ++i) {
    const S* row = x.get() + i * c.stride;
    double top = -INFINITY, z = 0;
    for (int64_t k = 0; k < c.classes; ++k) top = std::fmax(top, read(row[k]));
    for (int64_t k = 0; k < c.classes; ++k) z += std::exp(read(row[k]) - top);
    const bool valid = (!c.masked || mask[i]) && (c.soft || y[i] >= 0);
    double a = 0;
    int64_t best = 0,
            label = c.soft ? 0 : y[i];  // the first largest logit, and the first largest of a soft target
    std::vector<double> t(c.classes), log_p(c.classes);
    for (int64_t k = 0; k < c.classes; ++k) {
      log_p[k] = read(row[k]) - top - std::log(z);
      t[k] = c.soft ? double(soft[i * c.classes + k]) : double(k == y[i]);
      t[k] = (t[k] * (1 - c.smoothing) + c.smoothing / double(c.classes)) *
             (c.weighted ? double(weight[k]) : 1.0);
      a += t[k];
      if (read(row[k]) > read(row[best])) best = k;
      if (c.soft && soft[i * c.classes + k] > soft[i * c.classes + label]) label = k;
    }
    correct += valid && best == label;
    for (int64_t k = 0; k < c.classes; ++k) {
      const double g = valid ? 0.25 * (a * std::exp(log_p[k]) - t[k]) : 0;
      worst = std::fmax(worst, std::fabs(g - read(grad[i * c.classes + k])));
      if (!valid) continue;
      expected -= t[k] * log_p[k];
      entropy -= std::exp(log_p[k]) * log_p[k];
      const double given = c.soft ? double(soft[i * c.classes + k]) : double(k == y[i]);
      dependence += loss.logit_l1 ? std::fabs(read(row[k])) : given * std::exp(log_p[k]);
    }
  }
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-4;
  const double grad_tolerance = sizeof(G) == 2 ? 2e-3 : sizeof(T) == 8 ? 1e-13 : 1e-6;
  const bool right =
      in_place && std::fabs(total - expected) <= tolerance * (1 + expected) &&
      std::fabs(entropy_total - entropy) <= tolerance * (1 + entropy) && correct_total == correct &&
      std::fabs(dependence_total - dependence) <= tolerance * (1 + dependence) && worst <= grad_tolerance;
  if (!right) {
    std::printf(
        "dtype %d rows %ld classes %ld soft %d weighted %d masked %d smoothing %g: loss %.9g expected %.9g, "
        "entropy %.9g "
        "expected %.9g, correct %g expected %g, dependence %.9g expected %.9g, gradient off by %.3g\n",
        int(c.dtype), long(c.rows), long(c.classes), c.soft, c.weighted, c.masked, c.smoothing, total,
        expected, entropy_total, entropy, correct_total, correct, dependence_total, dependence, worst);
  }
  return right ? 0 : 1;
}

// Labels: a part of them is not known, and the NaN there and in absent rows must not show.
template <class T, class S, class G>
int check_labels(const Case& c) {
  const int64_t elements = (c.rows - 1) * c.stride + c.classes, pairs = c.rows * c.classes;
  std::unique_ptr<S[]> x(new S[elements]);
  std::unique_ptr<G[]> grad(new G[pairs]);
  std::unique_ptr<T[]> t(new T[pairs]), pair_loss(new T[2 * pairs]);
  const int64_t table = c.classes + arl::cpu::kMostLanes;
  std::unique_ptr<T[]> yes(new T[table]), no(new T[table]);
  std::unique_ptr<uint8_t[]> mask(new uint8_t[c.rows]);
  for (int64_t i = 0; i < elements; ++i) x[i] = write<S>(3 * noise());
  for (int64_t k = 0; k < table; ++k) {
    yes[k] = k < c.classes ? T(0.5 + (noise() + 4) / 8) : yes[k - c.classes];
    no[k] = k < c.classes ? T(0.5 + (noise() + 4) / 8) : no[k - c.classes];
  }
  for (int64_t i = 0; i < c.rows; ++i) mask[i] = i % 5 != 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const double label = (noise() + 4) / 8;
    t[i] = T(i % 3 == 0 ? label : label > 0.5);
    const int64_t row = i / c.classes;
    const bool unknown = c.soft && i % 7 == 3;
    if (unknown) t[i] = T(NAN);
    if (unknown || (c.masked && !mask[row])) x[row * c.stride + i % c.classes] = write<S>(double(NAN));
  }

  Loss loss = {};
  loss.branches = 2;
  loss.rows = c.rows;
  loss.classes = c.classes;
  loss.dtype = c.dtype;
  loss.logits[1] = x.get();
  loss.row_stride[1] = c.stride;
  loss.grad[1] = grad.get();
  loss.grad_scale[1] = 0.25;
  loss.soft_target = t.get();
  const int64_t count = arl::sanitized::known<T>(t.get(), 0, pairs);
  loss.all_known = count == pairs;
  if (c.masked) {
    loss.mask = mask.get();
    loss.mask_row_stride = loss.mask_stride = 1;
  }
  if (c.weighted) {
    loss.yes_weight = yes.get();
    loss.no_weight = no.get();
  }
  loss.logit_l1 = c.classes % 2 == 0;
  loss.row_loss = pair_loss.get();
  double total = 0, entropy_total = 0, correct_total = 0, dependence_total = 0;
  for (int64_t begin = 0; begin < pairs; begin += 1000) {
    arl::cpu::ChunkSums sums;
    const int64_t end = std::min(pairs, begin + 1000);
    arl::cpu::isa_sanitized.labels[c.dtype](loss, 1, begin, end, nullptr, &sums);
    total += sums.of[arl::kLoss];
    entropy_total += sums.of[arl::kEntropy];
    correct_total += sums.of[arl::kCorrect];
    dependence_total += sums.of[arl::kDependence];
  }

  double expected = 0, entropy = 0, correct = 0, dependence = 0, worst = 0;
  int64_t counted = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t row = i / c.classes, k = i % c.classes;
    const double v = read(x[row * c.stride + k]), label = double(t[i]);
    counted += label == label;
    const bool valid = label == label && (!c.masked || mask[row]);
    const double p = 1 / (1 + std::exp(-v)), q = 1 / (1 + std::exp(v));
    const double u = label * (c.weighted ? double(yes[k]) : 1);
    const double w = (1 - label) * (c.weighted ? double(no[k]) : 1);
    const double own = valid ? u * std::log1p(std::exp(-v)) + w * std::log1p(std::exp(v)) : 0;
    worst = std::fmax(worst, std::fabs((valid ? 0.25 * (w * p - u * q) : 0) - read(grad[i])));
    worst = std::fmax(worst, std::fabs(own - double(pair_loss[pairs + i])) / (sizeof(T) == 8 ? 100 : 10));
    if (!valid) continue;
    expected += own;
    entropy += p * std::log1p(std::exp(-v)) + q * std::log1p(std::exp(v));
    correct += (v > 0) == (label > 0.5);
    dependence += loss.logit_l1 ? std::fabs(v) : label * p + (1 - label) * q;
  }
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-4;
  const double grad_tolerance = sizeof(G) == 2 ? 2e-3 : sizeof(T) == 8 ? 1e-13 : 1e-6;
  const bool right = std::fabs(total - expected) <= tolerance * (1 + expected) &&
                     std::fabs(entropy_total - entropy) <= tolerance * (1 + entropy) &&
                     correct_total == correct &&
                     std::fabs(dependence_total - dependence) <= tolerance * (1 + dependence) &&
                     worst <= grad_tolerance && count == counted && read(grad[0]) == read(grad[0]);
  if (!right) {
    std::printf(
        "labels: dtype %d rows %ld classes %ld stride %ld unknown %d weighted %d masked %d: loss %.9g "
        "expected %.9g, entropy %.9g expected %.9g, correct %g expected %g, dependence %.9g expected %.9g, "
        "gradient off by %.3g\n",
        int(c.dtype), long(c.rows), long(c.classes), long(c.stride), c.soft, c.weighted, c.masked, total,
        expected, entropy_total, entropy, correct_total, correct, dependence_total, dependence, worst);
  }
  return right ? 0 : 1;
}

// Rows of infinities, NaN and huge values must not trip anything either.
void extremes() {
  const double values[] = {INFINITY, -INFINITY, NAN, 3e38, -3e38, 0};
  for (int64_t classes : {1, 6, 60}) {
    std::unique_ptr<float[]> x(new float[6 * classes]), grad(new float[6 * classes]);
    for (int64_t i = 0; i < 6; ++i) {
      for (int64_t k = 0; k < classes; ++k)
        x[i * classes + k] = float(k % 3 == 0 ? values[i] : values[(i + k) % 6]);
    }
    std::vector<int32_t> y(6 + arl::cpu::kMostLanes, -1);
    std::fill_n(y.begin(), 6, 0);
    Loss loss = {};
    loss.branches = 2;
    loss.rows = 6;
    loss.classes = classes;
    loss.dtype = arl::kFloat32;
    loss.logits[0] = x.get();
    loss.row_stride[0] = classes;
    loss.grad[0] = grad.get();
    loss.grad_scale[0] = 1;
    loss.target = y.data();
    loss.weight_total = double(classes);
    const size_t scratch_bytes = size_t(arl::cpu::scratch_elements(classes, false) * 4 + 63) / 64 * 64;
    std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, scratch_bytes), &std::free);
    arl::cpu::ChunkSums sums;
    arl::cpu::isa_sanitized.rows[arl::kFloat32](loss, 0, 0, 6, scratch.get(), &sums);
    std::unique_ptr<float[]> t(new float[6 * classes]());
    loss.soft_target = t.get();
    loss.all_known = true;
    arl::cpu::isa_sanitized.labels[arl::kFloat32](loss, 0, 0, 6 * classes, nullptr, &sums);
  }
}

}  // namespace

int main() {
  int wrong = 0, cases = 0;
  for (int64_t classes :
       {1, 2, 4, 5, 6, 7, 12, 16, 17, 28, 31, 34, 48, 56, 57, 65, 100, 112, 113, 128, 129, 309, 1000}) {
    for (int64_t rows : {1, 3, 16, 61, 67}) {
      for (int variant = 0; variant < 16; ++variant) {
        const Case c{rows,
                     classes,
                     classes + variant % 3,
                     arl::kFloat32,
                     (variant & 1) != 0,
                     (variant & 2) != 0,
                     (variant & 4) != 0,
                     (variant & 8) != 0,
                     variant % 5 == 0 ? 0.0 : 0.1};
        Case own = c;
        wrong += check<float, float, float>(own);
        own.dtype = arl::kFloat64;
        wrong += check<double, double, double>(own);
        own.dtype = arl::kBFloat16;
        wrong += check<float, arl::sanitized::Bf16, arl::sanitized::Bf16>(own);
        own.dtype = arl::kFloat16;
        wrong += check<float, arl::sanitized::F16, float>(own);
        own.dtype = arl::kFloat32;
        wrong += check_labels<float, float, float>(own);
        own.dtype = arl::kFloat64;
        wrong += check_labels<double, double, double>(own);
        own.dtype = arl::kBFloat16;
        wrong += check_labels<float, arl::sanitized::Bf16, arl::sanitized::Bf16>(own);
        own.dtype = arl::kFloat16;
        wrong += check_labels<float, arl::sanitized::F16, float>(own);
        cases += 8;
      }
    }
  }
  extremes();
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong == 0 ? 0 : 1;
}
