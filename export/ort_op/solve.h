// The whole solve of one call, spread over a runtime's threads.
#pragma once

#include <cstddef>
#include <functional>

#include "kernels.h"

namespace sessa {

// What the operator needs of the runtime it lives in. Both may throw.
struct Runtime {
  // Calls task(i) for every i < count, on any threads; returns when all are done.
  std::function<void(int64_t count, const std::function<void(int64_t)>& task)> parallel_for;
  // Uninitialised memory for `count` floats that lasts until the call ends.
  std::function<float*(int64_t count)> floats;
};

// The kernels of the newest instruction set that this processor has, or those chosen by name.
const Kernels& kernels();
// False when the processor has no such instruction set.
bool use_kernels(const char* name);

// Computes p.s. The problem must be checked: sizes at least 1, P at least 0, past_s given if P > 0.
void feedback_solve(const Problem& p, const Runtime& runtime);

}  // namespace sessa
