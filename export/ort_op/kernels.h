// The arithmetic of the operator for one instruction set; see kernels_impl.h.
#pragma once

#include "problem.h"

namespace sessa {

struct Kernels {
  const char* name;
  int64_t width;  // floats in a panel
  int64_t group;  // rows that one task weighs
  int64_t block;  // rows between two synchronisations

  void (*pack_keys)(const Problem&, const Workspace&, int64_t b, int64_t panel);
  void (*pack_states)(const Problem&, const Workspace&, int64_t b, int64_t panel);
  void (*pack_bias)(const Problem&, const Workspace&, int64_t b);
  // Rows [first, last) of the block that starts at row `start`: attention weights, and what the
  // states before the block add to these rows.
  void (*weigh)(const Problem&, const Workspace&, int64_t b, int64_t start, int64_t first,
                int64_t last);
  // Rows [start, stop) of one panel: forward substitution inside the block, then the output.
  void (*solve)(const Problem&, const Workspace&, int64_t b, int64_t start, int64_t stop,
                int64_t panel);
  // The same one row at a time, nothing packed. `query` (K) is filled once; parts of the keys,
  // either all before row 0 or all after it, are read apart and then joined into row t of s and of
  // `solved` (B, T, D).
  void (*row_query)(const Problem&, int64_t b, int64_t t, float* query);
  void (*row_part)(const Problem&, int64_t b, const float* query, const float* solved,
                   int64_t first, int64_t last, float* scores, Part* part);
  void (*row_join)(const Problem&, int64_t b, int64_t t, Part* parts, int64_t count,
                   float* solved);
};

extern const Kernels kBaseKernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace sessa
