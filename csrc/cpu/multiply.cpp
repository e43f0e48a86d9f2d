#include "multiply.h"

#include <ATen/Context.h>

#include <algorithm>

#if defined(__x86_64__) && defined(__linux__)
#define ARL_ONEDNN
namespace at::native {
// torch's way to oneDNN, exported but in none of its headers; weak, so that a torch without it uses its BLAS.
__attribute__((weak)) TORCH_API void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
}  // namespace at::native
#endif

namespace arl::cpu {
namespace {

constexpr int64_t kPiece = 1 << 20;               // elements
constexpr int64_t kFewMultiplications = 1 << 19;  // up to here oneDNN's preparations cost more than they save

// On CPUs other than Intel's, MKL leaves AVX-512 unused. oneDNN, which torch's wheels also hold, does not: it takes half the
// time (docs/performance.md).
bool onednn_is_faster() {
#if defined(ARL_ONEDNN)
  static const bool faster = [] {
    __builtin_cpu_init();
    return &at::native::mkldnn_matmul != nullptr && at::hasMKL() && !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }();
  return faster && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

void onednn(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha) {
#if defined(ARL_ONEDNN)
  at::native::mkldnn_matmul(a, b, out, float(beta), float(alpha));
#endif
}

// The same values without gaps. Columns of a wider matrix, transposed, oneDNN's caller would copy element by element.
at::Tensor dense(const at::Tensor& x) {
  return x.stride(0) < x.stride(1) ? x.t().contiguous().t() : x.contiguous();
}

// out = beta out + alpha a b, where the copy that a b with gaps needs is made in pieces: larger ones cost page faults.
template <class Product>
void in_pieces(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, const Product& product) {
  const bool by_column = b.stride(0) < b.stride(1);
  const int64_t size = by_column ? b.size(1) : b.size(0);
  const int64_t most = std::max<int64_t>(1, kPiece * size / std::max<int64_t>(1, b.numel()));
  if (b.is_contiguous() || b.t().is_contiguous() || most >= size) return product(out, dense(a), dense(b), beta);
  for (int64_t start = 0; start < size; start += most) {
    const int64_t length = std::min(most, size - start);
    if (by_column) {
      product(out.narrow(1, start, length), dense(a), dense(b.narrow(1, start, length)), beta);
    } else {
      product(out, dense(a.narrow(1, start, length)), dense(b.narrow(0, start, length)), start == 0 ? beta : 1);
    }
  }
}

}  // namespace

void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double factor, bool first) {
  const double beta = first ? 0 : 1;
  const double alpha = factor == 0 ? 1 : factor;
  if (out.scalar_type() == at::kFloat && out.numel() * a.size(1) > kFewMultiplications && onednn_is_faster()) {
    in_pieces(out, a, b, beta, [alpha](const at::Tensor& to, const at::Tensor& x, const at::Tensor& y, double keep) {
      onednn(to, x, y, keep, alpha);
    });
  } else if (out.scalar_type() == at::kBFloat16) {  // torch's own way to oneDNN
    out.addmm_(dense(a), dense(b), beta, alpha);
  } else {
    out.addmm_(a, b, beta, alpha);
  }
  // A product times 0 may be 0 without a look at a and b; NaN has to stay NaN.
  if (factor == 0) out.mul_(0);
}

}  // namespace arl::cpu
