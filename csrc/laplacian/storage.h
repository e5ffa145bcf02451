// Values kept in half the space and computed with in float32, how vectors of them are read and written: for
// laplacian_product on the CPU. Rounded to the nearest, ties to even, as torch does it.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace lfm {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

namespace simd {

// Vector of float32 or float64 from kLanes stored values.
template <class V, class S>
LFM_INLINE V load_as(const S* from) {
  if constexpr (!std::is_same_v<S, Bfloat16> && !std::is_same_v<S, Float16>) {
    return load<V>(from);
  } else {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Bits = Vec<uint16_t, kLanes>;
    if constexpr (std::is_same_v<S, Bfloat16>) {  // the upper half of a float32
      Vec<uint32_t, kLanes> wide;
#if LFM_X86_ASM
      // vectors as wide as these occur in code for AVX2 and AVX-512 only
      if constexpr (kLanes == 16 || kLanes == 8) {
        asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Bits*>(from)));
      } else
#endif
        wide = __builtin_convertvector(load<Bits>(from), Vec<uint32_t, kLanes>);
      wide <<= 16;
      V v;
      std::memcpy(&v, &wide, sizeof(V));
      return v;
    } else {
      V v;
#if LFM_X86_ASM
      // every processor with AVX2 has F16C
      if constexpr (kLanes == 16 || kLanes == 8) {
        asm("vcvtph2ps %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const Bits*>(from)));
        return v;
      }
#endif
      for (int lane = 0; lane < kLanes; ++lane)
        v[lane] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[lane].bits);
      return v;
    }
  }
}

// Rounds to the nearest stored value, ties to even.
template <class S, class V>
LFM_INLINE void store_as(S* into, V v) {
  if constexpr (!std::is_same_v<S, Bfloat16> && !std::is_same_v<S, Float16>) {
    store(into, v);
  } else {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Bits = Vec<uint16_t, kLanes>;
    if constexpr (std::is_same_v<S, Bfloat16>) {
      using Wide = Vec<uint32_t, kLanes>;
      Wide bits;
      std::memcpy(&bits, &v, sizeof(V));
      const auto number = v == v;
      const Wide rounded_up = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
      const Wide mask = reinterpret_cast<const Wide&>(number);
      store(into, __builtin_convertvector((rounded_up & mask) | (~mask & 0x7FC0u), Bits));
    } else {
#if LFM_X86_ASM
      if constexpr (kLanes == 16 || kLanes == 8) {
        asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<Bits*>(into)) : "v"(v));
        return;
      }
#endif
      for (int lane = 0; lane < kLanes; ++lane)
        into[lane].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[lane]);
    }
  }
}

}  // namespace simd
}  // namespace lfm
