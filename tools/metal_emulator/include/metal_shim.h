// The Metal Shading Language as C++20: rewrite.py turns a kernel's text into a file that includes
// this one. The address spaces are empty macros here (metal_strict.h has the real ones), except
// that a threadgroup variable becomes emu::threadgroup_variable.
#pragma once
#include "msl_threads.h"

#define METAL_FUNC inline
#define M_LOG2E_F 1.44269504f
#define M_LN2_F 0.69314718f

namespace emu {

// One parameter of a kernel: a buffer by index, or a built-in by its attribute's name.
struct Parameter {
  int buffer;
  const char* attribute;
};

template <class P>
P built_in(const ThreadState& t, const char* name) {
  const auto is = [&](const char* other) { return !strcmp(name, other); };
  const auto position = [](const uint32_t (&v)[3]) {
    if constexpr (std::is_same_v<P, uint3>) return uint3(v[0], v[1], v[2]);
    else if constexpr (std::is_same_v<P, uint2>) return uint2(v[0], v[1]);
    else return P(v[0]);
  };
  if (is("thread_position_in_grid")) return position(t.position_in_grid);
  if (is("thread_position_in_threadgroup")) return position(t.position_in_group);
  if (is("threadgroup_position_in_grid")) return position(t.group);
  if (is("threads_per_threadgroup")) return position(t.group_size);
  if (is("threads_per_grid")) return position(t.grid_size);
  if (is("threadgroups_per_grid")) return position(t.groups);
  if (is("thread_index_in_threadgroup")) return P(t.index);
  if (is("thread_index_in_simdgroup")) return P(t.simd_lane);
  if (is("simdgroup_index_in_threadgroup")) return P(t.simd_group);
  if (is("simdgroups_per_threadgroup")) return P(t.simd_groups);
  if (is("threads_per_simdgroup")) return P(32);
  fail(std::string("the emulator does not know the attribute ") + name);
}

template <class P>
P argument(void** buffers, const ThreadState& t, const Parameter& p) {
  if constexpr (std::is_reference_v<P>) return *(std::remove_reference_t<P>*)buffers[p.buffer];
  else if constexpr (std::is_pointer_v<P>) return (P)buffers[p.buffer];
  else return built_in<P>(t, p.attribute);
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** buffers, const ThreadState& t, const Parameter* parameters,
          std::index_sequence<I...>) {
  kernel(argument<P>(buffers, t, parameters[I])...);
}
template <class... P>
void call(void (*kernel)(P...), void** buffers, const ThreadState& t, const Parameter* parameters) {
  call(kernel, buffers, t, parameters, std::index_sequence_for<P...>{});
}

// Storage that the threads of a threadgroup share; every declaration has a tag of its own.
template <class Array, class Tag>
Array& threadgroup_variable(Tag, const char* name, int line) {
  static const char key = 0;
  return *(Array*)threadgroup_memory(&key, sizeof(Array), alignof(Array), name, line);
}

}  // namespace emu

#define kernel
#define device
#define constant
#define threadgroup
#define thread
