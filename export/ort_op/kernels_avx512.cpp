#if defined(__x86_64__) || defined(_M_X64)
#define SESSA_KERNELS kAvx512Kernels
#define SESSA_NAME "avx512"
#define SESSA_ROWS 8
#define SESSA_BYTES 64
#include "kernels_impl.h"
#endif
