// Barriers, simd-group functions and 8x8 simdgroup matrices, on the fibers of runtime.cc.
#pragma once
#include "../runtime.h"
#include "msl_math.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emu::threadgroup_barrier(int(flags), "threadgroup_barrier", line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  static const char operation = 0;
  emu::simd_collective(nullptr, nullptr, &operation, "simdgroup_barrier", line, int(flags));
}

// A value that no correct kernel reads: NaN in every floating type.
template <class T>
T undefined() {
  T value;
  memset((void*)&value, 0xFF, sizeof value);
  return value;
}

// Every lane deposits a Slot; the last lane to arrive runs F on the 32 slots for all.
template <class T>
struct Slot {
  T value, result;
  uint argument;
};
template <class F, class T>
T collective(T value, uint argument, const char* what, int line) {
  static_assert(HasMath<T>, "simd-group functions do not take bfloat");
  static_assert(sizeof(T) <= 4, "simd-group functions do not take 64-bit values");
  static const char operation = 0;
  Slot<T> slot{value, value, argument};
  emu::simd_collective(&slot, [](void** slots) { F::run((Slot<T>**)slots); }, &operation, what,
                       line, 0);
  return slot.result;
}

// Lanes that do not exist (a threadgroup of fewer than 32 threads) have no slot.
#define EMU_LANES(lane) for (int lane = 0; lane < 32; ++lane) if (slot[lane])
#define EMU_REDUCTION(name, expression)                                                     \
  struct name##_lanes {                                                                     \
    template <class T>                                                                      \
    static void run(Slot<T>** slot) {                                                       \
      T a = slot[0]->value;                                                                 \
      for (int lane = 1; lane < 32; ++lane)                                                 \
        if (slot[lane]) {                                                                   \
          const T b = slot[lane]->value;                                                    \
          a = T(expression);                                                                \
        }                                                                                   \
      EMU_LANES(lane) slot[lane]->result = a;                                               \
    }                                                                                       \
  };                                                                                        \
  template <class T>                                                                        \
  T name(T value, int line = __builtin_LINE()) {                                            \
    return collective<name##_lanes>(value, 0, #name, line);                                 \
  }
EMU_REDUCTION(simd_sum, a + b)
EMU_REDUCTION(simd_max, max(a, b))
EMU_REDUCTION(simd_min, min(a, b))

#define EMU_SHUFFLE(name, from)                                                             \
  struct name##_lanes {                                                                     \
    template <class T>                                                                      \
    static void run(Slot<T>** slot) {                                                       \
      EMU_LANES(lane) {                                                                     \
        const int argument = int(slot[lane]->argument), source = (from);                    \
        const bool exists = source >= 0 && source < 32 && slot[source];                     \
        slot[lane]->result = exists ? slot[source]->value : undefined<T>();                 \
      }                                                                                     \
    }                                                                                       \
  };                                                                                        \
  template <class T>                                                                        \
  T name(T value, ushort argument, int line = __builtin_LINE()) {                           \
    return collective<name##_lanes>(value, argument, #name, line);                          \
  }
EMU_SHUFFLE(simd_broadcast, argument)
EMU_SHUFFLE(simd_shuffle, argument)
EMU_SHUFFLE(simd_shuffle_xor, lane ^ argument)
EMU_SHUFFLE(simd_shuffle_up, lane - argument)
EMU_SHUFFLE(simd_shuffle_down, lane + argument)

// A lane holds two neighbours of one row: (row_of(lane), column_of(lane)) and the next column.
inline int row_of(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
inline int column_of(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8 && is_floating_point_v<T>);
  T pair[2] = {undefined<T>(), undefined<T>()};
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    const int lane = emu::current->simd_lane;
    for (int j = 0; j < 2; ++j)
      pair[j] = row_of(lane) == column_of(lane) + j ? diagonal : T(0);
  }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int Rows, int Columns>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.pair[0] = matrix.pair[1] = value;
  return matrix;
}

inline ulong offset_of(int j, ulong stride, const ulong2& origin, bool transpose) {
  const int lane = emu::current->simd_lane;
  const ulong row = row_of(lane), column = column_of(lane) + j;
  return transpose ? (column + origin.y) * stride + row + origin.x
                   : (row + origin.y) * stride + column + origin.x;
}
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* source, ulong stride = 8,
                    ulong2 origin = ulong2(0, 0), bool transpose = false) {
  for (int j = 0; j < 2; ++j) matrix.pair[j] = source[offset_of(j, stride, origin, transpose)];
}
template <class T>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* target, ulong stride = 8,
                     ulong2 origin = ulong2(0, 0), bool transpose = false) {
  for (int j = 0; j < 2; ++j) target[offset_of(j, stride, origin, transpose)] = matrix.pair[j];
}

template <class D, class A, class B, class C>
struct MultiplyAccumulate {
  D* d;
  const A* a;
  const B* b;
  const C* c;
  template <class M>
  static void gather(float (&full)[8][8], const M& matrix, int lane) {
    for (int j = 0; j < 2; ++j) full[row_of(lane)][column_of(lane) + j] = float(matrix.pair[j]);
  }
  static void run(void** slots) {
    auto** lane_of = (MultiplyAccumulate**)slots;
    float a[8][8], b[8][8], sum[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      if (!lane_of[lane]) emu::fail("simdgroup matrix in a simdgroup of fewer than 32 threads");
      gather(a, *lane_of[lane]->a, lane);
      gather(b, *lane_of[lane]->b, lane);
      gather(sum, *lane_of[lane]->c, lane);
    }
    for (int k = 0; k < 8; ++k)
      for (int m = 0; m < 8; ++m)
        for (int n = 0; n < 8; ++n) sum[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 2; ++j) {
        auto& target = lane_of[lane]->d->pair[j];
        target = std::remove_reference_t<decltype(target)>(sum[row_of(lane)][column_of(lane) + j]);
      }
  }
};
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b,
                                   const simdgroup_matrix<C, 8, 8>& c,
                                   int line = __builtin_LINE()) {
  using Lanes = MultiplyAccumulate<simdgroup_matrix<D, 8, 8>, simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>>;
  static const char operation = 0;
  Lanes slot{&d, &a, &b, &c};
  emu::simd_collective(&slot, Lanes::run, &operation, "simdgroup_multiply_accumulate", line, 0);
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                        const simdgroup_matrix<B, 8, 8>& b, int line = __builtin_LINE()) {
  const auto zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero, line);
}

}  // namespace metal
