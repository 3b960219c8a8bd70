// What the kernels need of CUDA. Tests give another file under the same name, which runs the
// kernels on the processor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SESSA_LAUNCH(KERNEL, GRID, THREADS, STREAM, ...) \
  KERNEL<<<GRID, THREADS, 0, static_cast<cudaStream_t>(STREAM)>>>(__VA_ARGS__)
