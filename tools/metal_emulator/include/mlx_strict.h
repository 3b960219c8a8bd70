// What MLX's own headers (mlx/backend/metal/kernels/utils.h) need of Metal beyond metal_strict.h,
// so that clang can read them before a kernel's text. Metal's compiler has the __metal_ functions
// built in; address_spaces.py declares those that a header names.
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
#define __METAL_PRECISE_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_MAYBE_FAST_MATH__ 2

namespace metal {

template <class From, class To>
constexpr __constant bool is_convertible_v = __is_convertible_to(From, To);
template <class T, class U>
constexpr __constant bool is_same_v = same<T, U>::value;
template <bool Condition, class T = void>
using enable_if = enable<Condition, T>;
template <bool Condition, class T = void>
using enable_if_t = typename enable<Condition, T>::type;

template <class T>
struct numeric_limits {
  static constexpr T max() { return T(0); }
  static constexpr T min() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
};

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

struct os_log {
  constexpr os_log(__constant char*, __constant char*) __constant {}
};

}  // namespace metal

// The result of a function that is built into Metal's compiler.
struct built_in {
  template <class T>
  operator T() const;
};
