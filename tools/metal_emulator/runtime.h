// What a compiled kernel and Python see of the emulator: one fiber per Metal thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace emu {

struct ThreadState {
  uint32_t position_in_grid[3], position_in_group[3], group[3], group_size[3], grid_size[3];
  uint32_t groups[3], index, simd_lane, simd_group, simd_groups;
};

using Kernel = void (*)(void** buffers, const ThreadState&);
using Collective = void (*)(void** slots);  // one slot per lane, null where there is no thread

// Mirrored by ctypes in build.py.
struct Launch {
  Kernel kernel;
  void** buffers;
  const uint64_t* sizes;  // bytes
  int32_t buffer_count;
  int32_t sync_mask;  // the mem_flags that make a barrier order memory (see races.py)
  uint32_t grid[3], group[3];
  uint64_t seed, memory_limit, memory_used;
  char error[4096];
};

extern thread_local ThreadState* current;

void threadgroup_barrier(int flags, const char* what, int line);
void simd_collective(void* slot, Collective run, const void* operation, const char* what, int line,
                     int flags);
void* threadgroup_memory(const void* key, size_t size, size_t align, const char* name, int line);
[[noreturn]] void fail(const std::string& message);

}  // namespace emu

extern "C" {
// A block whose last byte is followed by an inaccessible page and whose slack before is poisoned.
void* emu_allocate(size_t size);
// Frees it; false if something was written before its start.
bool emu_free(void* block);
int emu_launch(emu::Launch* launch);
}
