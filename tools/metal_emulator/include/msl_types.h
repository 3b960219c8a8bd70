// Scalars and vectors of the Metal Shading Language in C++20 (g++ 12 and later).
#pragma once
#include <bit>
#include <cfloat>
#include <climits>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <type_traits>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;  // -fexcess-precision=16 makes every operation round to half

template <class To, class From>
To as_type(From value) { return std::bit_cast<To>(value); }

template <class T>
concept Arithmetic = std::is_arithmetic_v<T> || std::is_same_v<T, half>;

// bfloat op bfloat rounds to bfloat, bfloat op float is float. From a float the conversion is
// explicit, as Apple's compiler demands; from an integer it is implicit.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <Arithmetic T>
  explicit(!std::is_integral_v<T>) constexpr bfloat(T value) : bits(0) {
    const uint32_t word = std::bit_cast<uint32_t>(float(value));
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1);
    bits = nan ? uint16_t((word >> 16) | 0x40) : uint16_t(rounded >> 16);
  }
  constexpr operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
#define EMU_BFLOAT_OP(op)                                                                         \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }       \
  template <class T>                                                                              \
  constexpr bfloat& operator op##=(bfloat& a, T b) { return a = bfloat(float(a) op float(b)); }
EMU_BFLOAT_OP(+)
EMU_BFLOAT_OP(-)
EMU_BFLOAT_OP(*)
EMU_BFLOAT_OP(/)
constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }

namespace metal {

template <class T>
inline constexpr bool is_floating_point_v =
    std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T>
concept Scalar = std::is_arithmetic_v<T> || is_floating_point_v<T>;
using std::conditional_t, std::enable_if_t, std::is_same_v;

template <class T, int N>
struct Elements;
template <class T>
struct alignas(2 * sizeof(T)) Elements<T, 2> {
  union {
    T at[2];
    struct { T x, y; };
  };
};
template <class T>
struct alignas(4 * sizeof(T)) Elements<T, 3> {
  union {
    T at[4];
    struct { T x, y, z; };
  };
};
template <class T>
struct alignas(4 * sizeof(T)) Elements<T, 4> {
  union {
    T at[4];
    struct { T x, y, z, w; };
  };
};

template <class T, int N>
struct vec : Elements<T, N> {
  constexpr vec() { fill(T(0)); }
  constexpr vec(const vec& other) { *this = other; }
  constexpr vec& operator=(const vec& other) {
    for (int i = 0; i < N; ++i) this->at[i] = other.at[i];
    return *this;
  }
  template <Scalar U>
  constexpr vec(U value) { fill(T(value)); }
  template <Scalar... U>
    requires(sizeof...(U) == N)
  constexpr vec(U... values) {
    int i = 0;
    ((this->at[i++] = T(values)), ...);
  }
  template <class U>
  constexpr explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; ++i) this->at[i] = T(other.at[i]);
  }
  constexpr T& operator[](int i) { return this->at[i]; }
  constexpr const T& operator[](int i) const { return this->at[i]; }

 private:
  constexpr void fill(T value) {
    for (int i = 0; i < N; ++i) this->at[i] = value;
  }
};
#define EMU_VECTOR_OP(op)                                                    \
  template <class T, int N>                                                  \
  constexpr vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {  \
    vec<T, N> result;                                                        \
    for (int i = 0; i < N; ++i) result[i] = T(a[i] op b[i]);                 \
    return result;                                                           \
  }                                                                          \
  template <class T, int N, Scalar U>                                        \
  constexpr vec<T, N> operator op(const vec<T, N>& a, U b) { return a op vec<T, N>(b); }
EMU_VECTOR_OP(+)
EMU_VECTOR_OP(-)
EMU_VECTOR_OP(*)
EMU_VECTOR_OP(/)

}  // namespace metal

#define EMU_VECTORS(T)             \
  using T##2 = metal::vec<T, 2>;   \
  using T##3 = metal::vec<T, 3>;   \
  using T##4 = metal::vec<T, 4>;
EMU_VECTORS(float)
EMU_VECTORS(half)
EMU_VECTORS(int)
EMU_VECTORS(uint)
EMU_VECTORS(ushort)
EMU_VECTORS(long)
EMU_VECTORS(ulong)
