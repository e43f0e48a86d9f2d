// Vectors of the instruction set this file is compiled for, their loads and stores, and exp and log.
//
// Written with the compiler's vector types, so that one source serves every instruction set: define ARL_ISA
// (a namespace) and ARL_VECTOR_BYTES (16, 32 or 64) before. Everything lies in that namespace and uses
// nothing from the standard library, so that the linker can never pick code made for another instruction set.
// No torch headers here.
#pragma once

#include <cstdint>

#if !defined(ARL_ISA) || !defined(ARL_VECTOR_BYTES)
#error "define ARL_ISA and ARL_VECTOR_BYTES"
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define ARL_INLINE static inline __attribute__((always_inline))
#define ARL_LAMBDA __attribute__((always_inline))

namespace arl::ARL_ISA {

// Storage of 16-bit floats.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int lanes = ARL_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(ARL_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(ARL_VECTOR_BYTES)));
  typedef uint16_t half __attribute__((vector_size(ARL_VECTOR_BYTES / 2)));
  typedef uint32_t word __attribute__((vector_size(ARL_VECTOR_BYTES)));
};

template <>
struct Vector<double> {
  static constexpr int lanes = ARL_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(ARL_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(ARL_VECTOR_BYTES)));
};

template <class T>
using V = typename Vector<T>::type;
template <class T>
using Bits = typename Vector<T>::bits;
template <class T>
using Lane = decltype(Bits<T>{}[0] + 0);  // an integer of the size of T

template <class T>
ARL_INLINE V<T> splat(T value) {
  return value - V<T>{};
}

// first, first + 1, ...
template <class T>
ARL_INLINE Bits<T> class_numbers(int64_t first) {
  Bits<T> numbers{};
  for (int lane = 0; lane < Vector<T>::lanes; ++lane) numbers[lane] = lane;
  return numbers + Lane<T>(first);
}

template <class To, class From>
ARL_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

ARL_INLINE float to_float(Bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

ARL_INLINE float to_float(F16 value) {  // 2^112 rebiases the exponent and makes subnormals right
  const float magnitude = bit_cast<float>(uint32_t(value.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(magnitude);
  if ((value.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  return bit_cast<float>(bits | uint32_t(value.bits & 0x8000) << 16);
}

ARL_INLINE float to_float(float value) { return value; }
ARL_INLINE double to_float(double value) { return value; }

template <class To>
ARL_INLINE To from_float(float value);
template <class To>
ARL_INLINE To from_float(double value) {
  return To(value);
}
template <>
inline __attribute__((always_inline)) float from_float<float>(float value) {
  return value;
}
template <>
inline __attribute__((always_inline)) Bf16 from_float<Bf16>(float value) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
ARL_INLINE V<T> load(const T* from) {
  V<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class T>
ARL_INLINE Vector<float>::word load_half(const T* from) {
  Vector<float>::half raw;
  __builtin_memcpy(&raw, from, sizeof(raw));
  return __builtin_convertvector(raw, Vector<float>::word);
}

template <class T>
ARL_INLINE V<float> load(const Bf16* from) {
  return bit_cast<V<float>>(load_half(from) << 16);
}

template <class T>
ARL_INLINE V<float> load(const F16* from) {
  typedef Vector<float>::word Word;
  const Word raw = load_half(from);
  Word bits = bit_cast<Word>(bit_cast<V<float>>((raw & 0x7fff) << 13) * 0x1p112f);
  bits |= bit_cast<Word>((raw & 0x7c00) == 0x7c00) & 0x7f800000;
  return bit_cast<V<float>>(bits | (raw & 0x8000) << 16);
}

template <class T>
ARL_INLINE void store(T* to, V<T> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

ARL_INLINE Vector<float>::half to_bf16(V<float> value) {
  typedef Vector<float>::word Word;
  Word bits = bit_cast<Word>(value);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = value != value ? Word{} + 0x7fc0 : bits;
  return __builtin_convertvector(bits, Vector<float>::half);
}
ARL_INLINE void store(Bf16* to, V<float> value) {
  const auto half = to_bf16(value);
  __builtin_memcpy(to, &half, sizeof(half));
}

// Stores past the caches, which would not keep what is written anyway: to addresses that are a multiple of
// what is written at a time. Before another thread reads it, finish_streams().
template <class T, class G>
ARL_INLINE bool can_stream(const G* to) {
#if defined(__SSE2__)
  constexpr int bytes = Vector<T>::lanes * int(sizeof(G));
  return bytes >= 16 && reinterpret_cast<uintptr_t>(to) % bytes == 0;
#else
  (void)to;
  return false;
#endif
}
template <class W>
ARL_INLINE void stream_words(void* to, W words) {
#if defined(__AVX512F__)
  if constexpr (sizeof(W) == 64) _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(words));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(W) == 32) _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(words));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(W) == 16) _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(words));
#endif
}
template <class T>
ARL_INLINE void stream(T* to, V<T> value) {
  stream_words(to, value);
}
ARL_INLINE void stream(Bf16* to, V<float> value) { stream_words(to, to_bf16(value)); }
ARL_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The last L of `count` elements: a row whose length is no multiple of L ends with a vector that has some
// elements for a second time. Where there are fewer than L: all of them, and `fill` in the lanes behind.
template <class T, class S>
ARL_INLINE V<T> load_last(const S* from, int64_t count, T fill) {
  constexpr int L = Vector<T>::lanes;
  if (count >= L) return load<T>(from + count - L);
  T lanes[L];
#pragma GCC unroll 1  // so that it becomes a masked load, not L branches
  for (int lane = 0; lane < L; ++lane) lanes[lane] = lane < int(count) ? T(to_float(from[lane])) : fill;
  return load<T>(lanes);
}

// Which elements those are; the numbers of the lanes behind are `count` and more.
template <class T>
ARL_INLINE Bits<T> last_numbers(int64_t count) {
  return class_numbers<T>(count > Vector<T>::lanes ? count - Vector<T>::lanes : 0);
}

template <class T, class G>
ARL_INLINE void store_last(G* to, int64_t count, V<T> value) {
  constexpr int L = Vector<T>::lanes;
  if (count >= L) return store(to + count - L, value);
#pragma GCC unroll 1
  for (int lane = 0; lane < L; ++lane) {
    if (lane < int(count)) to[lane] = from_float<G>(value[lane]);
  }
}

// Two vectors' lanes by a table: lane i of the result is number index(i) of the lanes of a and, behind them,
// of b.
template <class T, class Index>
ARL_INLINE V<T> shuffle(V<T> a, V<T> b, Index index) {
  constexpr int L = Vector<T>::lanes;
#if defined(__clang__)
  V<T> result;
  for (int lane = 0; lane < L; ++lane) result[lane] = index(lane) < L ? a[index(lane)] : b[index(lane) - L];
  return result;
#else
  Bits<T> table{};
  for (int lane = 0; lane < L; ++lane) table[lane] = index(lane);
  return __builtin_shuffle(a, b, table);
#endif
}

// Lane j of vector i becomes lane i of vector j. Every step is an instruction that all x86 vectors have:
// first within pieces of 16 bytes, then whole pieces.
template <class T>
ARL_INLINE void transpose(V<T>* v) {
  constexpr int L = Vector<T>::lanes, piece = 16 / sizeof(T), pieces = L / piece;
  V<T> w[L];
  for (int i = 0; i < L; i += 2) {  // [a0 b0 a1 b1], [a2 b2 a3 b3]
    for (int high = 0; high < 2; ++high) {
      const auto index = [high](int lane) ARL_LAMBDA {
        return lane / piece * piece + high * piece / 2 + lane % piece / 2 + lane % 2 * L;
      };
      w[i + high] = shuffle<T>(v[i], v[i + 1], index);
    }
  }
  for (int i = 0; i < L; i += piece) {
    if constexpr (piece == 2) {
      for (int j = 0; j < 2; ++j) v[i + j] = w[i + j];
    } else {
      for (int j = 0; j < 4; ++j) {  // [a0 a1 b0 b1], [a2 a3 b2 b3]
        const auto index = [j](int lane)
                               ARL_LAMBDA { return lane / 4 * 4 + j % 2 * 2 + lane % 2 + lane % 4 / 2 * L; };
        v[i + j] = shuffle<T>(w[i + j / 2], w[i + 2 + j / 2], index);
      }
    }
  }
  for (int j = 0; j < piece && pieces > 1;
       ++j) {  // vectors j, j + piece, ... now hold pieces of the same classes
    V<T> u[pieces];
    const auto lower = [](int lane) ARL_LAMBDA { return lane < L / 2 ? lane : lane + L / 2; };
    const auto upper = [](int lane) ARL_LAMBDA { return lane < L / 2 ? lane + L / 2 : lane + L; };
    for (int k = 0; k < pieces; k += 2) {
      u[k] = shuffle<T>(v[j + k * piece], v[j + (k + 1) * piece], lower);
      u[k + 1] = shuffle<T>(v[j + k * piece], v[j + (k + 1) * piece], upper);
    }
    if constexpr (pieces == 4) {
      for (int k = 0; k < 4; ++k) {  // of [a0 a1 b0 b1] and [c0 c1 d0 d1]: [a0 b0 c0 d0], [a1 b1 c1 d1]
        const auto index = [k](int lane)
                               ARL_LAMBDA { return lane / piece * 2 * piece + k % 2 * piece + lane % piece; };
        v[j + k * piece] = shuffle<T>(u[k / 2], u[2 + k / 2], index);
      }
    } else {
      for (int k = 0; k < pieces; ++k) v[j + k * piece] = u[k];
    }
  }
}

// The cache lines of some elements.
template <class S>
ARL_INLINE void prefetch(const S* from, int64_t count) {
  constexpr int line = 64 / sizeof(S);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

// The larger operand; the second if either is NaN, which is what the instruction does.
#if ARL_VECTOR_BYTES == 64  // compilers make two instructions of a comparison and a choice
template <class T>
ARL_INLINE V<T> larger(V<T> a, V<T> b) {
  if constexpr (sizeof(T) == 4)
    return _mm512_max_ps(a, b);
  else
    return _mm512_max_pd(a, b);
}
#else
template <class T>
ARL_INLINE V<T> larger(V<T> a, V<T> b) {
  return a > b ? a : b;
}
#endif

template <class T>
ARL_INLINE V<T> absolute(V<T> x) {
  constexpr auto magnitude = sizeof(T) == 4 ? 0x7fffffffll : 0x7fffffffffffffffll;
  return bit_cast<V<T>>(bit_cast<Bits<T>>(x) & Lane<T>(magnitude));
}

// The lanes of x brought together in halves: a chain of as many steps as lanes would take longer than the
// rest of a short row.
template <class T, int N, class X, class Join>
ARL_INLINE T fold(X x, Join join) {
  if constexpr (N == 2) {
    return join(x[0], x[1]);
  } else {
    typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
    struct Halves {
      Half low, high;
    };
    const Halves halves = bit_cast<Halves>(x);
    return fold<T, N / 2>(join(halves.low, halves.high), join);
  }
}

template <class T>
ARL_INLINE T sum(V<T> x) {
  return fold<T, Vector<T>::lanes>(x, [](auto a, auto b) ARL_LAMBDA { return a + b; });
}

template <class T>
ARL_INLINE T largest(V<T> x) {
  return fold<T, Vector<T>::lanes>(x, [](auto a, auto b) ARL_LAMBDA { return a > b ? a : b; });
}

// Bit l: whether lane l, which is 0 or -1, is set.
template <class T>
ARL_INLINE uint32_t mask_of(Bits<T> lanes) {
  constexpr bool single = sizeof(T) == 4;
#if ARL_VECTOR_BYTES == 64
  return single ? _mm512_movepi32_mask(bit_cast<__m512i>(lanes))
                : _mm512_movepi64_mask(bit_cast<__m512i>(lanes));
#elif ARL_VECTOR_BYTES == 32
  return single ? _mm256_movemask_ps(bit_cast<__m256>(lanes)) : _mm256_movemask_pd(bit_cast<__m256d>(lanes));
#elif defined(__SSE2__)
  return single ? _mm_movemask_ps(bit_cast<__m128>(lanes)) : _mm_movemask_pd(bit_cast<__m128d>(lanes));
#else
  uint32_t mask = 0;
  for (int l = 0; l < Vector<T>::lanes; ++l) mask |= uint32_t(lanes[l] != 0) << l;
  return mask;
#endif
}

// The reverse.
template <class T>
ARL_INLINE Bits<T> lanes_of(uint32_t mask) {
  Bits<T> bits{};
  for (int l = 0; l < Vector<T>::lanes; ++l) bits[l] = 1 << l;
  return ((Bits<T>{} + Lane<T>(mask)) & bits) != 0;
}

template <class T>
ARL_INLINE bool any(Bits<T> lanes) {
  return mask_of<T>(lanes) != 0;
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2. Adding `round` leaves n, and the bias of an
// exponent, in the low bits. exp of `lowest` is 0, or taken for 0, since it is below 2e-38.
template <class T>
struct Exp;

template <>
struct Exp<float> {
  static constexpr float lowest = -88.0296919f;  // -127 ln 2
  static constexpr float per_ln2 = 1.44269504f, ln2 = 0.693147181f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 0x1.8p23f + 127;
  static constexpr int mantissa = 23;
  // Minimax on |r| <= ln 2 / 2, relative error 3e-9; the first two coefficients are 1, so that exp(0) = 1
  // exactly.
  ARL_INLINE V<float> polynomial(V<float> r) {
    V<float> p = 0.0013814594f * r + 0.0083687175f;
    p = p * r + 0.04166839f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999994f;
    return (p * r + 1.0f) * r + 1.0f;
  }
};

template <>
struct Exp<double> {
  static constexpr double lowest = -709.08956571282405;  // -1023 ln 2
  static constexpr double per_ln2 = 1.4426950408889634, ln2 = 0.69314718055994531;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 0x1.8p52 + 1023;
  static constexpr int mantissa = 52;
  ARL_INLINE V<double> polynomial(V<double> r) {  // Taylor; the first term left out is below 5e-18
    V<double> p = 1.0 / 6227020800 * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    return (p * r + 1.0) * r + 1.0;
  }
};

// x - n ln 2. A float's ln 2 is exact to 3e-9, which will do where the product is not rounded; else ln 2
// comes in two pieces, and n times the first is exact.
template <class T>
ARL_INLINE V<T> remainder(V<T> x, V<T> n) {
  typedef Exp<T> E;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (sizeof(T) == 4) return x - n * E::ln2;
#endif
  return (x - n * E::ln2_high) - n * E::ln2_low;
}

#if ARL_VECTOR_BYTES >= 32
// 2^(i/N) by a table of N entries, which an instruction looks up by the low bits of a lane: n is rounded to
// multiples of 1/N, and what remains, |r| <= ln 2 / 2N, needs a short polynomial (minimax; relative error
// 5e-8 with 32 entries, 3e-8 with 8). Added to an exponent, n carries i along, which the table has less:
// entry i holds the bits of 2^(i/N) - (i << below).
ARL_INLINE V<float> exp_by_table(V<float> x) {
  typedef Bits<float> B;
#if ARL_VECTOR_BYTES == 64
  constexpr int below = 18;  // bits of a mantissa behind those of i
  const B table[] = {
      {0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
       0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6},
      {0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
       0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3}};
  const auto look_up = [&table](B i) ARL_LAMBDA {
    return bit_cast<B>(_mm512_permutex2var_epi32(bit_cast<__m512i>(table[0]), bit_cast<__m512i>(i),
                                                 bit_cast<__m512i>(table[1])));
  };
#else
  constexpr int below = 20;
  const B table = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                   0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  const auto look_up = [&table](B i) ARL_LAMBDA {
    return bit_cast<B>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(table), bit_cast<__m256i>(i)));
  };
#endif
  constexpr float round = 3 << (below - 1);
  const V<float> shifted = x * Exp<float>::per_ln2 + round;
  const V<float> n = shifted - round, r = remainder<float>(x, n);
  const B bits = bit_cast<B>(shifted);
  const V<float> power = bit_cast<V<float>>(look_up(bits) + (bits << below));
#if ARL_VECTOR_BYTES == 64
  return (power * r) * (0.5f * r + 1.00001465f) + power;
#else
  const V<float> more = (0.16666906f * r + 0.5000658f) * (r * r) + r;  // exp(r) - 1, by a short chain
  return power * more + power;
#endif
}
#endif

// exp of a value that is not above 0. `x` is raised to the lowest argument, so that exp(x) * x is 0 where x
// was -inf (0 log 0 = 0). NaN stays NaN.
template <class T>
ARL_INLINE V<T> exp_nonpositive(V<T>& x) {
  typedef Exp<T> E;
  x = larger<T>(splat<T>(E::lowest), x);
#if ARL_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) return exp_by_table(x);
#endif
  const V<T> shifted = x * E::per_ln2 + E::round;
  const V<T> n = shifted - E::round;
  const V<T> p = E::polynomial(remainder<T>(x, n));
  return p * bit_cast<V<T>>(bit_cast<Bits<T>>(shifted) << E::mantissa);  // 0 at the lowest
}

// log of a finite normal value > 0; NaN and infinity come out as NaN or infinity.
template <class T>
ARL_INLINE V<T> log_positive(V<T> x) {
  typedef Bits<T> B;
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52;
  constexpr T ln2_high = single ? T(0.693359375f) : T(0x1.62e42fee00000p-1);
  constexpr T ln2_low = single ? T(-2.12194440e-4f) : T(0x1.a39ef35793c76p-33);
  // x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  const B half = bit_cast<B>(splat<T>(T(0.70710678118654752)));
  const B shifted = bit_cast<B>(x) - half;
  const B k = shifted >> mantissa;
  const V<T> f = bit_cast<V<T>>(bit_cast<B>(x) - (k << mantissa)) - T(1);
  const V<T> power = __builtin_convertvector(k, V<T>);
  // log(1 + f) = f - f^2/2 + s (f^2/2 + R), s = f / (2 + f), R = 2/3 s^2 + 2/5 s^4 + ...
  const V<T> s = f / (T(2) + f);
  const V<T> z = s * s;
  V<T> r = splat<T>(T(2) / T(single ? 11 : 25));
  for (int odd = single ? 9 : 23; odd >= 3; odd -= 2) r = r * z + T(2) / T(odd);
  r = r * z;
  const V<T> square = T(0.5) * f * f;
  const V<T> value = power * ln2_high + (f - (square - (s * (square + r) + power * ln2_low)));
  return x < splat<T>(T(__builtin_inf())) ? value : x;
}

}  // namespace arl::ARL_ISA
