// Vectors of floats in the compiler's vector extension, and the three element types as floats.
// Included once by each kernels_*.cpp, which sets SESSA_BYTES. Everything has internal linkage and
// nothing of the standard library is used: a shared inline function compiled for a newer
// instruction set could otherwise be the one the linker keeps.
#pragma once

#include <cstdint>

#include "problem.h"

namespace sessa {
namespace {

constexpr int64_t kLanes = SESSA_BYTES / 4;

typedef float Vec __attribute__((vector_size(SESSA_BYTES)));
typedef int32_t Ints __attribute__((vector_size(SESSA_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(SESSA_BYTES / 2)));

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline Ints load_shorts(const void* p) {
  Shorts v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Ints);
}

inline Vec load(const Bfloat* p) { return (Vec)(load_shorts(p) << 16); }

// The exponent is moved by a product, which also makes subnormals normal; infinity and NaN keep
// the largest exponent.
inline Vec load(const Half* p) {
  const Ints h = load_shorts(p);
  const Ints magnitude = (h & 0x7fff) << 13;
  const Ints special = (magnitude >= 0x0f800000) & 0x7f800000;
  const Vec value = (Vec)magnitude * 0x1p112f;
  return (Vec)((Ints)value | special | ((h & 0x8000) << 16));
}

inline float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat x) { return bits_to_float(uint32_t{x.bits} << 16); }
inline float to_float(Half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const float value = bits_to_float(magnitude) * 0x1p112f;
  return bits_to_float(float_to_bits(value) | special | (x.bits & 0x8000u) << 16);
}

inline void from_float(float x, float* out) { *out = x; }

// Both round to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, Bfloat* out) {
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(
      nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_float(float x, Half* out) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 1/2 rounds to a subnormal
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float largest(Vec v) {
  float top = v[0];
  for (int64_t i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

inline float sum(Vec v) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// exp(x) for x <= 0, 0 below -86, NaN for NaN; relative error below 2e-7. x = n ln 2 + r, |r| <= ln 2 / 2; n is
// read from the low bits of x / ln 2 + 1.5 * 2^23.
inline Vec exp_negative(Vec x) {
  const Vec shifted = x * 1.44269504f + 0x1.8p23f;
  const Vec n = shifted - 0x1.8p23f;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec y = splat(1.0f / 720);
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Vec scaled = (Vec)((Ints)y + ((Ints)shifted << 23));
  const Vec clipped = x < -86.0f ? Vec{} : scaled;
  return x == x ? clipped : x;
}

}  // namespace
}  // namespace sessa
