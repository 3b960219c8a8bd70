// Metal's scalar functions: float arithmetic, rounded to the argument's type. As in Metal there is
// none for bfloat, and min(int, uint) does not compile.
#pragma once
#include "msl_types.h"

namespace metal {

template <class T>
concept HasMath = Scalar<T> && !std::is_same_v<T, bfloat>;

// The deleted overload keeps bfloat from converting to the C library's double.
#define EMU_UNARY(f)                                                     \
  template <HasMath T> inline T f(T x) { return T(std::f(float(x))); }   \
  template <std::same_as<bfloat> T> T f(T) = delete;
#define EMU_UNARIES                                                                        \
  EMU_UNARY(exp) EMU_UNARY(exp2) EMU_UNARY(log) EMU_UNARY(log2) EMU_UNARY(sqrt)            \
  EMU_UNARY(sin) EMU_UNARY(cos) EMU_UNARY(tanh) EMU_UNARY(floor) EMU_UNARY(ceil)           \
  EMU_UNARY(fabs)                                                                          \
  template <HasMath T> inline T rsqrt(T x) { return T(1.0f / std::sqrt(float(x))); }
EMU_UNARIES
namespace fast {
EMU_UNARIES
}
namespace precise {
EMU_UNARIES
}

template <HasMath T>
T max(T a, T b) {
  if constexpr (is_floating_point_v<T>) return T(std::fmax(float(a), float(b)));
  else return a < b ? b : a;
}
template <HasMath T>
T min(T a, T b) {
  if constexpr (is_floating_point_v<T>) return T(std::fmin(float(a), float(b)));
  else return b < a ? b : a;
}
template <HasMath T>
T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <HasMath T>
T abs(T x) { return x < T(0) ? T(-x) : x; }
template <HasMath T>
T fma(T a, T b, T c) { return T(std::fma(float(a), float(b), float(c))); }
template <class T>
T select(T a, T b, bool condition) { return condition ? b : a; }
template <HasMath T>
bool isnan(T x) { return std::isnan(float(x)); }
template <HasMath T>
bool isinf(T x) { return std::isinf(float(x)); }

}  // namespace metal
