// Switching between stacks, and what ThreadSanitizer is told about it.
#pragma once
#include <cstddef>
#include <cstring>

#if defined(EMU_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateBenignRaceSized(const char*, int, const volatile void*, size_t, const char*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

// emu_switch(save, to): keep the callee-saved registers on this stack, continue on the other.
extern "C" void emu_switch(void** save, void* to);
#if defined(__APPLE__)  // Mach-O puts a line before names and has neither types nor sizes of symbols
#define EMU_HEAD ".text\n.p2align 2\n.globl _emu_switch\n_emu_switch:"
#define EMU_TAIL ""
#else
#define EMU_HEAD ".text\n.globl emu_switch\n.type emu_switch,%function\nemu_switch:"
#define EMU_TAIL ".size emu_switch,.-emu_switch\n"
#endif
#if defined(__x86_64__)
asm(EMU_HEAD R"(
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)" EMU_TAIL);
#elif defined(__aarch64__)
asm(EMU_HEAD R"(
  sub sp,sp,#160
  stp x19,x20,[sp]; stp x21,x22,[sp,#16]; stp x23,x24,[sp,#32]; stp x25,x26,[sp,#48]
  stp x27,x28,[sp,#64]; stp x29,x30,[sp,#80]
  stp d8,d9,[sp,#96]; stp d10,d11,[sp,#112]; stp d12,d13,[sp,#128]; stp d14,d15,[sp,#144]
  mov x9,sp; str x9,[x0]; mov sp,x1
  ldp x19,x20,[sp]; ldp x21,x22,[sp,#16]; ldp x23,x24,[sp,#32]; ldp x25,x26,[sp,#48]
  ldp x27,x28,[sp,#64]; ldp x29,x30,[sp,#80]
  ldp d8,d9,[sp,#96]; ldp d10,d11,[sp,#112]; ldp d12,d13,[sp,#128]; ldp d14,d15,[sp,#144]
  add sp,sp,#160
  ret
)" EMU_TAIL);
#else
#error "emu_switch is written for x86-64 and AArch64"
#endif

namespace emu {

// ThreadSanitizer's view: which accesses a barrier orders, and nothing of the emulator's own.
struct Sanitizer {
#if defined(EMU_TSAN)
  static void release(void* at) { __tsan_release(at); }
  static void acquire(void* at) { __tsan_acquire(at); }
  static void ignore(const volatile void* at, size_t size) {
    AnnotateBenignRaceSized("", 0, at, size, "not checked in this mode");
  }
  static void quiet(bool on) {
    if (on) AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
    else AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0);
  }
  static void* self() { return __tsan_get_current_fiber(); }
  static void* create() { return __tsan_create_fiber(0); }
  static void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
  static void enter(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
  static constexpr bool on = true;
#else
  static void release(void*) {}
  static void acquire(void*) {}
  static void ignore(const volatile void*, size_t) {}
  static void quiet(bool) {}
  static void* self() { return nullptr; }
  static void* create() { return nullptr; }
  static void destroy(void*) {}
  static void enter(void*) {}
  static constexpr bool on = false;
#endif
};

// A stack from which emu_switch returns into `start`.
inline void* initial_stack(char* top, void (*start)()) {
#if defined(__x86_64__)
  void** frame = (void**)top - 8;
  memset(frame, 0, 8 * sizeof(void*));
  frame[6] = (void*)start;
#else
  char* frame = top - 160;
  memset(frame, 0, 160);
  *(void**)(frame + 88) = (void*)start;
#endif
  return frame;
}

}  // namespace emu
