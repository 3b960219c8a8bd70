// Runs the CUDA kernels on the processor, so that their arithmetic can be tested without a GPU. A
// block's threads are contexts of one system thread: each runs until a barrier or a shuffle, then
// the next one does. Shuffles take all lanes of a warp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx;

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

namespace emulation {

constexpr unsigned kStack = 1 << 16, kLanes = 32;

// A context gives a thread its stack; jumps, which are faster, switch between threads.
struct Thread {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started, done;
};

inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline unsigned current, waiting, round_of_barrier;
inline std::vector<float> slots;

inline void yield() {
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

inline void resume() {
  Thread& thread = threads[current];
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.context);
}

inline void enter() {
  kernel();
  threads[current].done = true;
  yield();
}

inline void run_block(unsigned count) {
  threads.resize(count), slots.resize(count), waiting = 0;
  for (Thread& thread : threads) {
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.started = thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (current = 0; current < count; ++current) {
      if (threads[current].done) continue;
      threadIdx.x = current;
      resume();
      alive = true;
    }
  }
}

inline void launch(dim3 grid, unsigned count, std::function<void()> body) {
  kernel = std::move(body);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(count);
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
  using namespace emulation;
  const unsigned round = round_of_barrier;
  if (++waiting == threads.size()) {
    waiting = 0;
    ++round_of_barrier;
  }
  while (round == round_of_barrier) yield();
}

namespace emulation {

// The value that thread `from` gives at the same place.
inline float shuffle(float x, unsigned from) {
  slots[current] = x;
  yield();
  const float other = slots[from];
  yield();
  return other;
}

}  // namespace emulation

inline float __shfl_xor_sync(unsigned, float x, int step) {
  return emulation::shuffle(x, emulation::current ^ static_cast<unsigned>(step));
}

inline float __shfl_sync(unsigned, float x, int lane, int width) {
  const unsigned group = emulation::current / static_cast<unsigned>(width);
  return emulation::shuffle(x, group * static_cast<unsigned>(width) + static_cast<unsigned>(lane));
}

#define SESSA_LAUNCH(KERNEL, GRID, THREADS, STREAM, ...) \
  emulation::launch(GRID, THREADS, [=] { (KERNEL)(__VA_ARGS__); })

enum cudaError_t { cudaSuccess };
enum { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaDeviceGetAttribute(int* value, int, int) { *value = 2; }
