// CUDA's names for code that runs on the CPU, so that the kernels in csrc can be executed, and checked, without a GPU.
// A block runs as fibers of one host thread; barriers and warp operations are where they wait (emulator.cpp).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

struct Index {
  unsigned x;
};

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};

enum class WarpOp { shuffle, shuffle_up, shuffle_xor, ballot, any, sync };

// What one thread sees of itself.
struct Thread {
  Index thread, block;
  std::vector<std::vector<Copy>> committed;  // asynchronous copies that have not been waited for
  std::vector<Copy> open;
};

Thread& self();
void wait_for_block();
uint64_t wait_for_warp(WarpOp op, uint64_t value, int argument, int width, const void* where);
void launch(const char* name, int64_t blocks, int64_t threads, size_t shared_bytes,
            const std::function<void()>& kernel);
void* shared_memory(int declaration, size_t bytes);
void* dynamic_shared_memory();
bool copies_are_early();
[[noreturn]] void fail(const char* what);

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

template <class T>
T exchange(WarpOp op, const void* where, unsigned mask, T value, int argument, int width = 32) {
  if (mask != 0xFFFFFFFFu) fail("a warp operation without all lanes");
  const uint64_t bits = wait_for_warp(op, bits_of(value), argument, width, where);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint64_t vote(WarpOp op, const void* where, unsigned mask, bool value) {
  if (mask != 0xFFFFFFFFu) fail("a warp operation without all lanes");
  return wait_for_warp(op, value, 0, 32, where);
}

// A sum, product or conversion in another rounding mode; volatile, so that it is computed in that mode.
template <class R, class A, class F>
R rounded(int mode, A a, A b, A c, const F& f) {
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile A va = a, vb = b, vc = c;
  volatile R result = f(va, vb, vc);
  std::fesetround(before);
  return result;
}

}  // namespace emulator

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define threadIdx (emulator::self().thread)
#define blockIdx (emulator::self().block)

// lanes of a warp must meet at the same place of the source, not only at the same kind of operation
#define EMULATOR_HERE                \
  ({                                 \
    static const char here = 0;      \
    static_cast<const void*>(&here); \
  })
#define __syncthreads() emulator::wait_for_block()
#define __syncwarp() emulator::wait_for_warp(emulator::WarpOp::sync, 0, 0, 32, EMULATOR_HERE)
#define __shfl_sync(...) emulator::exchange(emulator::WarpOp::shuffle, EMULATOR_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::exchange(emulator::WarpOp::shuffle_up, EMULATOR_HERE, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::exchange(emulator::WarpOp::shuffle_xor, EMULATOR_HERE, __VA_ARGS__)
#define __ballot_sync(...) static_cast<unsigned>(emulator::vote(emulator::WarpOp::ballot, EMULATOR_HERE, __VA_ARGS__))
#define __any_sync(...) static_cast<int>(emulator::vote(emulator::WarpOp::any, EMULATOR_HERE, __VA_ARGS__))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
using std::isnan;

template <class To, class From>
To reinterpreted(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline int __float_as_int(float v) { return reinterpreted<int>(v); }
inline unsigned __float_as_uint(float v) { return reinterpreted<unsigned>(v); }
inline float __int_as_float(int v) { return reinterpreted<float>(v); }
inline float __uint_as_float(unsigned v) { return reinterpreted<float>(v); }
inline long long __double_as_longlong(double v) { return reinterpreted<long long>(v); }
inline double __longlong_as_double(long long v) { return reinterpreted<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half v) { return static_cast<float>(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return static_cast<float>(v); }
inline __half __float2half_rn(float v) { return static_cast<__half>(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return static_cast<__nv_bfloat16>(v); }

inline float __fadd_rd(float a, float b) {
  return emulator::rounded<float>(FE_DOWNWARD, a, b, 0.0f, [](auto& x, auto& y, auto&) { return x + y; });
}
inline float __fadd_ru(float a, float b) {
  return emulator::rounded<float>(FE_UPWARD, a, b, 0.0f, [](auto& x, auto& y, auto&) { return x + y; });
}
inline float __fsub_rd(float a, float b) { return __fadd_rd(a, -b); }
inline float __fsub_ru(float a, float b) { return __fadd_ru(a, -b); }
inline float __fmaf_rd(float a, float b, float c) {
  return emulator::rounded<float>(FE_DOWNWARD, a, b, c, [](auto& x, auto& y, auto& z) { return std::fmaf(x, y, z); });
}
inline float __fmaf_ru(float a, float b, float c) {
  return emulator::rounded<float>(FE_UPWARD, a, b, c, [](auto& x, auto& y, auto& z) { return std::fmaf(x, y, z); });
}
inline float __double2float_rd(double a) {
  return emulator::rounded<float>(FE_DOWNWARD, a, 0.0, 0.0,
                                  [](auto& x, auto&, auto&) { return static_cast<float>(x); });
}
inline float __double2float_ru(double a) {
  return emulator::rounded<float>(FE_UPWARD, a, 0.0, 0.0, [](auto& x, auto&, auto&) { return static_cast<float>(x); });
}

// fibers are switched at waits only, so that these are atomic
template <class T, class U>
T atomicAdd(T* at, U v) {
  const T old = *at;
  *at = old + v;
  return old;
}
template <class T>
T atomicMin(T* at, T v) {
  const T old = *at;
  *at = min(old, v);
  return old;
}
template <class T>
T atomicMax(T* at, T v) {
  const T old = *at;
  *at = max(old, v);
  return old;
}
template <class T>
T atomicCAS(T* at, T expected, T v) {
  const T old = *at;
  if (old == expected) *at = v;
  return old;
}

// Asynchronous copies are made at the last moment, in the wait, or with copies_are_early() at the first.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
    emulator::fail("a misaligned asynchronous copy");
  if (emulator::copies_are_early())
    std::memcpy(to, from, bytes);
  else
    emulator::self().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
}
inline void __pipeline_commit() { emulator::self().committed.push_back(std::exchange(emulator::self().open, {})); }
inline void __pipeline_wait_prior(size_t prior) {
  auto& groups = emulator::self().committed;
  while (groups.size() > prior) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

using cudaStream_t = void*;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline int cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return 0;
}
inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return 0;
}
inline int cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return 0;
}
inline int cudaStreamSynchronize(cudaStream_t) { return 0; }

namespace cub {

template <class T>
struct DoubleBuffer {
  T* buffers[2];
  int selector = 0;
  DoubleBuffer(T* current, T* alternate) : buffers{current, alternate} {}
  T* Current() { return buffers[selector]; }
  T* Alternate() { return buffers[selector ^ 1]; }
};

struct DeviceRadixSort {
  template <class K, class V>
  static int SortPairs(void* scratch, size_t& bytes, DoubleBuffer<K>& keys, DoubleBuffer<V>& values, int64_t count,
                       int first, int end, cudaStream_t) {
    if (!scratch) return bytes = 1, 0;
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    const K mask = end - first >= 64 ? ~K{0} : (K{1} << (end - first)) - 1;
    const auto key = [&](int64_t i) { return keys.Current()[i] >> first & mask; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
    for (int64_t i = 0; i < count; ++i) {
      keys.Alternate()[i] = keys.Current()[order[i]];
      values.Alternate()[i] = values.Current()[order[i]];
    }
    keys.selector ^= 1;
    values.selector ^= 1;
    std::memset(keys.Alternate(), 0xA5, count * sizeof(K));
    return 0;
  }
};

struct DeviceScan {
  template <class T>
  static int ExclusiveSum(void* scratch, size_t& bytes, T* in, T* out, int64_t count, cudaStream_t) {
    if (!scratch) return bytes = 1, 0;
    std::exclusive_scan(in, in + count, out, T{0});
    return 0;
  }
};

}  // namespace cub
