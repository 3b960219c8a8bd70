// One call of the operator, checked, and the memory it works in. Letters: B batch, T rows, P past,
// S = P + T columns, D width of the states, K width of the keys.
#pragma once

#include <cstdint>

// CUDA's kernels use some of these functions too.
#if defined(__CUDACC__)
#define SESSA_EVERYWHERE __host__ __device__
#else
#define SESSA_EVERYWHERE
#endif

namespace sessa {

// ONNX's numbers for the element types.
enum class Type : int32_t { kFloat = 1, kHalf = 10, kBfloat = 16 };

inline int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

struct Tensor {
  const void* data = nullptr;
  Type type = Type::kFloat;
};

struct Problem {
  int64_t B = 0, T = 0, P = 0, D = 0, K = 0;
  Tensor f;                           // (B, T, D)
  Tensor q;                           // (B, T, K)
  Tensor k;                           // (B, S, K)
  Tensor gamma;                       // (B, T)
  Tensor past_s;                      // (B, P, D), null when P is 0
  const uint8_t* key_mask = nullptr;  // (B, S), 0 hides a key; null hides none
  void* s = nullptr;                  // (B, T, D) in the type of f

  SESSA_EVERYWHERE int64_t S() const { return P + T; }
  SESSA_EVERYWHERE bool hides(int64_t b, int64_t key) const {
    return key_mask && !key_mask[b * S() + key];
  }
};

// A panel is `width` neighbouring columns (of states) or keys, laid out row by row, so that the
// products read memory in order. Keys are turned: a panel's rows are the K coordinates.
struct Workspace {
  float* keys = nullptr;     // (B, ceil(S / width), K, width)
  float* states = nullptr;   // (B, ceil(D / width), S, width): past, then f, which becomes s and
                             // then 0 where its key is hidden
  float* queries = nullptr;  // (B, rows, query_stride): one block of rows, scaled by K^-1/2
  float* weights = nullptr;  // (B, rows, weight_stride): gamma times attention of that block
  float* bias = nullptr;     // (B, weight_stride): 0, or -infinity for a hidden key; may be null
  int64_t query_stride = 0;
  int64_t weight_stride = 0;
  int64_t rows = 0;  // of a block: the whole of T when it is shorter
};

// What one part of the keys adds to one decoded row: sum of exp(score - top), the same over states.
struct Part {
  float top, total;
  float* read;  // (D)
};

}  // namespace sessa
