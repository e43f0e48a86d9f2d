#include "multiply.h"

#include <ATen/Context.h>

namespace at::native {
// torch's way to oneDNN, exported but in none of its headers; weak, so that a torch without it uses its BLAS.
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
}  // namespace at::native

namespace arl::cpu {
namespace {

constexpr int64_t kFewMultiplications = 1 << 19;  // up to here oneDNN's preparations cost more than they save

// On CPUs other than Intel's, MKL leaves AVX-512 unused. oneDNN, which torch's wheels also hold, does not: it takes half the
// time (docs/performance.md).
bool onednn_is_faster() {
#if defined(__x86_64__)
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

// The same values without gaps. Columns of a wider matrix, transposed, oneDNN would copy element by element.
at::Tensor dense(const at::Tensor& x) {
  return x.stride(0) < x.stride(1) ? x.t().contiguous().t() : x.contiguous();
}

}  // namespace

void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double factor, bool first) {
  const double beta = first ? 0 : 1;
  const double alpha = factor == 0 ? 1 : factor;
  const at::ScalarType type = out.scalar_type();
  if (type == at::kFloat && out.numel() * a.size(1) > kFewMultiplications && onednn_is_faster()) {
    at::native::mkldnn_matmul(dense(a), dense(b), out, float(beta), float(alpha));
  } else if (type == at::kBFloat16) {  // torch's product in oneDNN as well
    out.addmm_(dense(a), dense(b), beta, alpha);
  } else {
    out.addmm_(a, b, beta, alpha);
  }
  // A product times 0 may be 0 without a look at a and b; NaN has to stay NaN.
  if (factor == 0) out.mul_(0);
}

}  // namespace arl::cpu
