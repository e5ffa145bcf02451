// Vector code written once, compiled for several instruction sets, chosen at run time: for the CPU kernels of knn,
// graphs, laplacian, krylov and maps. A kernel is an always-inline template over the bytes of a vector register; three
// thin functions with target attributes instantiate it, and LFM_SIMD_DISPATCH picks one. Vectors are the compilers' own
// vector types, so ARM gets NEON. They are read and written by memcpy: nothing has to be aligned.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define LFM_INLINE inline __attribute__((always_inline))

// Instructions that the compilers do not find themselves are written as GCC takes them: Clang refuses registers wider
// than those of the function in which they stand, even where that is to be inlined, and gets plain vector code.
#if defined(__x86_64__) && !defined(__clang__)
#define LFM_X86_ASM 1
#else
#define LFM_X86_ASM 0
#endif

#if defined(__x86_64__)
#define LFM_TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)  // takes vectors as wide as they are written, and ignores what names a preference
#define LFM_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#else
#define LFM_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")))
#endif
#endif

namespace lfm::simd {

enum class Level { generic, avx2, avx512 };

// LFM_TORCH_SIMD=generic, avx2, avx512 (without VNNI) or vnni keeps to what that name says, to try the code of other
// machines; lfm_torch/ops/_extension.py refuses other names.
inline bool allowed(const char* name) {
  const char* most = std::getenv("LFM_TORCH_SIMD");
  if (most == nullptr || *most == 0) return true;
  const auto rank = [](const char* level) {
    constexpr const char* kLevels[] = {"generic", "avx2", "avx512"};
    for (int i = 0; i < 3; ++i)
      if (std::strcmp(level, kLevels[i]) == 0) return i;
    return 3;  // vnni
  };
  return rank(name) <= rank(most);
}

inline Level level() {
#if defined(__x86_64__)
  static const Level found = [] {
    if (!allowed("avx2")) return Level::generic;
    __builtin_cpu_init();
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      return Level::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Level::avx2 : Level::generic;
  }();
  return found;
#else
  return Level::generic;
#endif
}

// 16-bit products added up in 32 bits by one instruction, at the AVX-512 level.
inline bool has_vnni() {
#if LFM_X86_ASM
  static const bool found = level() == Level::avx512 && allowed("vnni") && __builtin_cpu_supports("avx512vnni");
  return found;
#else
  return false;
#endif
}

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

template <class V, class T>
LFM_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
LFM_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class V, class T>
LFM_INLINE V broadcast(T value) {
#if LFM_X86_ASM
  // GCC fills 64-bit lanes one by one
  if constexpr (sizeof(V) == 64 && std::is_same_v<T, uint64_t>) {
    V v;
    asm("vpbroadcastq %1, %0" : "=v"(v) : "r"(value));
    return v;
  }
#endif
  return V{} + value;
}

// A vector of doubles from as many floats or doubles. (GCC splits the conversion to 512 bits in two and joins them.)
template <class V, class In>
LFM_INLINE V widened(In v) {
#if LFM_X86_ASM
  if constexpr (sizeof(V) == 64 && sizeof(In) == 32) {
    V wide;
    asm("vcvtps2pd %1, %0" : "=v"(wide) : "v"(v));
    return wide;
  }
#endif
  return __builtin_convertvector(v, V);
}

// Keeps the compiler from fusing the product it hides with a following sum: where x == y, x s - y s must be exactly 0.
template <class V>
LFM_INLINE V rounded(V v) {
#if LFM_X86_ASM
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

// One bit for every lane with a <= b.
template <int kBytes, class V>
LFM_INLINE unsigned lanes_not_above(V a, V b) {
  unsigned bits = 0;
#if LFM_X86_ASM
  if constexpr (kBytes == 64) {
    uint16_t mask;
    asm("vcmpleps %2, %1, %0" : "=Yk"(mask) : "v"(a), "v"(b));
    bits = mask;
  } else if constexpr (kBytes == 32) {
    asm("vcmpleps %2, %1, %1\n\tvmovmskps %1, %0" : "=r"(bits), "+x"(a) : "x"(b));
  } else {
    asm("cmpleps %2, %1\n\tmovmskps %1, %0" : "=r"(bits), "+x"(a) : "x"(b));
  }
#else
  const auto passes = a <= b;
  for (int lane = 0; lane < kBytes / 4; ++lane) bits |= static_cast<unsigned>(passes[lane] & 1) << lane;
#endif
  return bits;
}

// Writes the lanes whose bit is set, in order, to `out`, which has room for a whole vector; returns how many.
template <int kBytes, class V, class T>
LFM_INLINE int store_lanes(V v, unsigned bits, T* out) {
#if LFM_X86_ASM
  if constexpr (kBytes == 64) {
    V packed;
    asm("vcompressps %1, %0 %{%2%}%{z%}" : "=v"(packed) : "v"(v), "Yk"(static_cast<uint16_t>(bits)));
    store(out, packed);
    return __builtin_popcount(bits);
  }
#endif
  int count = 0;
  for (; bits; bits &= bits - 1) out[count++] = v[__builtin_ctz(bits)];
  return count;
}

// The lanes of a and b that `indices` name, counted through both.
#if defined(__clang__) || __GNUC__ >= 12
#define LFM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LFM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif

// Lanes of one vector register, in elements of T.
template <class T, int kBytes>
inline constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

}  // namespace lfm::simd

// Defines NAME(args...) that runs NAME##_body<bytes per vector register>(args...) compiled for this machine.
#if defined(__x86_64__)
#define LFM_SIMD_DISPATCH(TEMPLATE, RETURN, NAME, PARAMS, ARGS)                    \
  TEMPLATE LFM_TARGET_AVX512 RETURN NAME##_avx512 PARAMS { NAME##_body<64> ARGS; } \
  TEMPLATE LFM_TARGET_AVX2 RETURN NAME##_avx2 PARAMS { NAME##_body<32> ARGS; }     \
  TEMPLATE RETURN NAME##_generic PARAMS { NAME##_body<16> ARGS; }                  \
  TEMPLATE RETURN NAME PARAMS {                                                    \
    switch (lfm::simd::level()) {                                                  \
      case lfm::simd::Level::avx512:                                               \
        return NAME##_avx512 ARGS;                                                 \
      case lfm::simd::Level::avx2:                                                 \
        return NAME##_avx2 ARGS;                                                   \
      default:                                                                     \
        return NAME##_generic ARGS;                                                \
    }                                                                              \
  }
#else
#define LFM_SIMD_DISPATCH(TEMPLATE, RETURN, NAME, PARAMS, ARGS) \
  TEMPLATE RETURN NAME PARAMS { NAME##_body<16> ARGS; }
#endif
