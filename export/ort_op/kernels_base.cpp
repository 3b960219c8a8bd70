// The instruction set that every processor of the platform has: SSE2 on x86-64, NEON on arm64.
#if defined(__aarch64__)
#define SESSA_NAME "neon"
#define SESSA_ROWS 8
#elif defined(__x86_64__)
#define SESSA_NAME "sse2"
#define SESSA_ROWS 6
#else
#define SESSA_NAME "generic"
#define SESSA_ROWS 4
#endif
#define SESSA_KERNELS kBaseKernels
#define SESSA_BYTES 16
#include "kernels_impl.h"
