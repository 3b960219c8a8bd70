#include "solve.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace sessa {
namespace {

// Number of rows up to which solving row by row is faster than packing the past; measured at
// P = 1024.
constexpr int64_t kFewRows = 8;
// Floats of keys and states that one part of a single row reads: enough to pay for a task.
constexpr int64_t kPartFloats = 1 << 16;
// Rows whose lengths are multiples of this would compete for few sets of the first-level cache.
constexpr int64_t kResonant = 256, kShift = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t stride(int64_t columns, int64_t width) {
  const int64_t rounded = divide_up(columns, width) * width;
  return rounded % kResonant ? rounded : rounded + kShift;
}

bool has(const Kernels& kernels) {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (&kernels == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           has(kAvx2Kernels);
  }
  if (&kernels == &kAvx2Kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return &kernels == &kBaseKernels;
}

// Newest first.
const Kernels* const kAll[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kBaseKernels};

const Kernels* newest() {
  return *std::find_if(std::begin(kAll), std::end(kAll), [](auto* k) { return has(*k); });
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{newest()};
  return kernels;
}

Workspace make_workspace(const Problem& p, const Kernels& run, const Runtime& runtime) {
  Workspace w;
  const int64_t rows = std::min(p.T, run.block);
  w.query_stride = stride(p.K, run.width), w.weight_stride = stride(p.S(), run.width);
  w.keys = runtime.floats(p.B * divide_up(p.S(), run.width) * p.K * run.width);
  w.states = runtime.floats(p.B * divide_up(p.D, run.width) * p.S() * run.width);
  w.queries = runtime.floats(p.B * rows * w.query_stride);
  w.weights = runtime.floats(p.B * rows * w.weight_stride);
  if (p.key_mask) w.bias = runtime.floats(p.B * w.weight_stride);
  w.rows = rows;
  return w;
}

void pack(const Problem& p, const Workspace& w, const Kernels& run, const Runtime& runtime) {
  const int64_t key_panels = divide_up(p.S(), run.width);
  const int64_t state_panels = divide_up(p.D, run.width);
  runtime.parallel_for(p.B * (key_panels + state_panels), [&](int64_t i) {
    const int64_t b = i / (key_panels + state_panels), panel = i % (key_panels + state_panels);
    if (panel == 0 && p.key_mask) run.pack_bias(p, w, b);
    if (panel < key_panels) {
      run.pack_keys(p, w, b, panel);
    } else {
      run.pack_states(p, w, b, panel - key_panels);
    }
  });
}

// Blocks of rows one after the other; in each, first every row's weights and what the states before
// the block add (tasks are groups of rows), then the substitution inside it (tasks are panels of
// columns, which do not depend on each other).
void prefill(const Problem& p, const Kernels& run, const Runtime& runtime) {
  const Workspace w = make_workspace(p, run, runtime);
  pack(p, w, run, runtime);
  const int64_t state_panels = divide_up(p.D, run.width);
  for (int64_t start = 0; start < p.T; start += run.block) {
    const int64_t stop = std::min(p.T, start + run.block);
    const int64_t groups = divide_up(stop - start, run.group);
    runtime.parallel_for(p.B * groups, [&](int64_t i) {
      const int64_t first = start + i % groups * run.group;
      run.weigh(p, w, i / groups, start, first, std::min(stop, first + run.group));
    });
    runtime.parallel_for(p.B * state_panels, [&](int64_t i) {
      run.solve(p, w, i / state_panels, start, stop, i % state_panels);
    });
  }
}

// Decoding, and a few rows after a past: every row reads keys and states where they lie, in parts.
// The last part holds the rows of this call that are solved already.
void solve_rows(const Problem& p, const Kernels& run, const Runtime& runtime) {
  const int64_t length = std::max<int64_t>(16, kPartFloats / (p.K + p.D));
  const int64_t old = std::max<int64_t>(1, divide_up(p.P, length)), most = old + 1;
  float* queries = runtime.floats(p.B * p.K);
  float* scores = runtime.floats(p.B * p.S());
  float* reads = runtime.floats(p.B * most * p.D);
  float* solved = runtime.floats(p.B * p.T * p.D);
  std::vector<Part> parts(static_cast<size_t>(p.B * most));
  for (size_t i = 0; i < parts.size(); ++i) parts[i].read = reads + static_cast<int64_t>(i) * p.D;
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t count = t ? most : old;
    for (int64_t b = 0; b < p.B; ++b) run.row_query(p, b, t, queries + b * p.K);
    runtime.parallel_for(p.B * count, [&](int64_t i) {
      const int64_t b = i / count, part = i % count;
      const int64_t first = part < old ? part * length : p.P;
      const int64_t last = part < old ? std::min(p.P, first + length) : p.P + t;
      run.row_part(p, b, queries + b * p.K, solved, first, last, scores + b * p.S() + first,
                   &parts[static_cast<size_t>(b * most + part)]);
    });
    for (int64_t b = 0; b < p.B; ++b) {
      run.row_join(p, b, t, &parts[static_cast<size_t>(b * most)], count, solved);
    }
  }
}

}  // namespace

const Kernels& kernels() { return *chosen().load(); }

bool use_kernels(const char* name) {
  for (const Kernels* candidate : kAll) {
    if (has(*candidate) && std::strcmp(candidate->name, name) == 0) {
      chosen().store(candidate);
      return true;
    }
  }
  return false;
}

void feedback_solve(const Problem& p, const Runtime& runtime) {
  const Kernels& run = kernels();
  if (p.T <= kFewRows) {
    solve_rows(p, run, runtime);
  } else {
    prefill(p, run, runtime);
  }
}

}  // namespace sessa
