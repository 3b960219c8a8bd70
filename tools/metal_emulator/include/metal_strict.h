// Declarations of Metal's library with real address spaces, for clang's C++ for OpenCL, which has
// the same four. Only type-checked (-fsyntax-only): nothing here has a body that matters.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#pragma clang diagnostic ignored "-Wundefined-inline"
#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define METAL_FUNC inline
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define M_LOG2E_F 1.44269504f
#define M_LN2_F 0.69314718f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef __bf16 bfloat;
// Metal has no double.
#define double there_is_no_double_in_metal

#define VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(float)
VECTORS(half)
VECTORS(int)
VECTORS(uint)
VECTORS(ushort)
VECTORS(long)
VECTORS(ulong)
#undef VECTORS

template <class To, class From>
To as_type(From value);

namespace metal {

template <class T, class U>
struct same {
  static constexpr __constant bool value = false;
};
template <class T>
struct same<T, T> {
  static constexpr __constant bool value = true;
};
template <bool Condition, class T = void>
struct enable {};
template <class T>
struct enable<true, T> {
  using type = T;
};
// Math and simd-group functions do not take bfloat.
template <class T>
using not_bfloat = typename enable<!same<T, bfloat>::value>::type;

#define UNARY(f) template <class T, class = not_bfloat<T>> T f(T);
#define BINARY(f) template <class T, class = not_bfloat<T>> T f(T, T);
#define TERNARY(f) template <class T, class = not_bfloat<T>> T f(T, T, T);
#define LANE(f) template <class T, class = not_bfloat<T>> T f(T, ushort);
#define MATH                                                                              \
  UNARY(exp) UNARY(exp2) UNARY(log) UNARY(log2) UNARY(sqrt) UNARY(rsqrt) UNARY(sin)       \
  UNARY(cos) UNARY(tanh) UNARY(floor) UNARY(ceil) UNARY(fabs)
MATH
namespace fast {
MATH
}
namespace precise {
MATH
}
UNARY(abs)
BINARY(max)
BINARY(min)
TERNARY(clamp)
TERNARY(fma)
template <class T>
T select(T, T, bool);
template <class T>
bool isnan(T);
template <class T>
bool isinf(T);

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
UNARY(simd_sum)
UNARY(simd_max)
UNARY(simd_min)
LANE(simd_broadcast)
LANE(simd_shuffle)
LANE(simd_shuffle_xor)
LANE(simd_shuffle_up)
LANE(simd_shuffle_down)

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8);
  T pair[2];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
template <class T, int Rows, int Columns>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T);
#define LOAD_STORE(space)                                                                   \
  template <class T>                                                                        \
  void simdgroup_load(__private simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8,      \
                      ulong2 = ulong2(0), bool = false);                                    \
  template <class T>                                                                        \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong = 8, ulong2 = ulong2(0),  \
                       bool = false);
LOAD_STORE(__global)
LOAD_STORE(__local)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(__private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(__private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                        simdgroup_matrix<B, 8, 8>);

}  // namespace metal
#undef UNARY
#undef BINARY
#undef TERNARY
#undef LANE
#undef MATH
#undef LOAD_STORE
