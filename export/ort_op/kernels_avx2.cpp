#if defined(__x86_64__) || defined(_M_X64)
#define SESSA_KERNELS kAvx2Kernels
#define SESSA_NAME "avx2"
#define SESSA_ROWS 6
#define SESSA_BYTES 32
#include "kernels_impl.h"
#endif
