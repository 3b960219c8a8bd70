// The whole solve of one call on a CUDA stream.
#pragma once

#include <functional>

#include "problem.h"

namespace sessa {

// What the operator needs of the runtime it lives in. `floats` may throw.
struct CudaRuntime {
  void* stream;
  // Device memory for `count` floats that lasts until the work on the stream is done.
  std::function<float*(int64_t count)> floats;
};

// Computes p.s, all of whose tensors are on the device. The problem must be checked: sizes at least
// 1, P at least 0, past_s given if P > 0. Throws std::runtime_error when a kernel cannot be started.
void feedback_solve_cuda(const Problem& p, const CudaRuntime& runtime);

}  // namespace sessa
