// Memory whose misuse is noticed.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emu {

inline const size_t page = size_t(sysconf(_SC_PAGESIZE));  // 16 KiB on Apple silicon

// Memory between two inaccessible pages: it ends at the second one, the slack before it is 0xFF.
struct Block {
  char* map;
  size_t length;
  char* data;
  size_t size;

  static Block reserve(size_t size) {
    const size_t body = (size + page - 1) / page * page;
    Block b{nullptr, body + 2 * page, nullptr, size};
    void* map = mmap(nullptr, b.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) perror("mmap"), abort();
    b.map = (char*)map;
    mprotect(b.map, page, PROT_NONE);
    mprotect(b.map + page + body, page, PROT_NONE);
    b.data = b.map + page + body - size;
    b.poison();
    return b;
  }
  void release() { munmap(map, length); }
  void poison() { memset(map + page, 0xFF, length - 2 * page); }
  bool intact() const {
    return std::all_of(map + page, data, [](char byte) { return byte == char(0xFF); });
  }
  bool contains(const char* address) const { return address >= map && address < map + length; }
};

}  // namespace emu
