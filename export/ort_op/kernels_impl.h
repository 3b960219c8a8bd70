// The operator's arithmetic, compiled once per instruction set. The including file sets
// SESSA_KERNELS (the table to define), SESSA_NAME, SESSA_BYTES (of a vector) and SESSA_ROWS (of a
// tile, chosen so that its sums stay in registers).
#pragma once

#include <cstddef>
#include <type_traits>

#include "kernels.h"
#include "vectors.h"

namespace sessa {
namespace {

constexpr int64_t kWidth = 2 * kLanes;
constexpr int64_t kRows = SESSA_ROWS;
constexpr int64_t kGroup = 2 * kRows;
constexpr int64_t kBlock = 16 * kGroup;
// Rows of a panel that one product reads, few enough to stay in the first-level cache.
constexpr int64_t kDepth = 128;
constexpr int64_t kLine = 16;  // floats in a cache line

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t panels(int64_t columns) { return (columns + kWidth - 1) / kWidth; }

// Runs body(E*) with the element type of a tensor at an offset in elements.
template <class Body>
inline void with_elements(const Tensor& tensor, int64_t offset, Body body) {
  switch (tensor.type) {
    case Type::kFloat: return body(static_cast<const float*>(tensor.data) + offset);
    case Type::kHalf: return body(static_cast<const Half*>(tensor.data) + offset);
    case Type::kBfloat: return body(static_cast<const Bfloat*>(tensor.data) + offset);
  }
}

template <class E>
inline void convert(const E* from, int64_t count, float scale, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * scale);
  for (; i < count; ++i) to[i] = to_float(from[i]) * scale;
}

inline float inverse_root(int64_t K) { return 1.0f / __builtin_sqrtf(static_cast<float>(K)); }

float scalar(const Tensor& tensor, int64_t index) {
  float x = 0;
  with_elements(tensor, index, [&](auto* p) { x = to_float(*p); });
  return x;
}

// A hidden key becomes zeros, since a score of NaN or infinity would survive the bias.
void pack_keys(const Problem& p, const Workspace& w, int64_t b, int64_t panel) {
  const int64_t first = panel * kWidth, count = smaller(kWidth, p.S() - first);
  float* to = w.keys + (b * panels(p.S()) + panel) * p.K * kWidth;
  with_elements(p.k, (b * p.S() + first) * p.K, [&](auto* from) {
    // One cache line of every key at a time: whole columns would compete for few sets of the cache.
    for (int64_t i = 0; i < p.K; i += kLine) {
      const int64_t end = smaller(p.K, i + kLine);
      for (int64_t j = 0; j < count; ++j) {
        const bool hidden = p.hides(b, first + j);
        for (int64_t d = i; d < end; ++d) {
          to[d * kWidth + j] = hidden ? 0.0f : to_float(from[j * p.K + d]);
        }
      }
      for (int64_t j = count; j < kWidth; ++j) {
        for (int64_t d = i; d < end; ++d) to[d * kWidth + j] = 0;
      }
    }
  });
}

void copy_panel(const Tensor& from, int64_t row, int64_t rows, int64_t D, int64_t panel,
                float* to) {
  const int64_t first = panel * kWidth, count = smaller(kWidth, D - first);
  with_elements(from, row * D + first, [&](auto* source) {
    for (int64_t t = 0; t < rows; ++t, source += D, to += kWidth) {
      convert(source, count, 1.0f, to);
      for (int64_t j = count; j < kWidth; ++j) to[j] = 0;
    }
  });
}

inline float* state_panel(const Problem& p, const Workspace& w, int64_t b, int64_t panel) {
  return w.states + (b * panels(p.D) + panel) * p.S() * kWidth;
}

// Makes rows [first, last) of one panel of states zero where their keys are hidden, since a weight
// of 0 would not hide NaN or infinity.
void clear_hidden(const Problem& p, int64_t b, int64_t first, int64_t last, float* panel) {
  if (!p.key_mask) return;
  for (int64_t t = first; t < last; ++t) {
    if (!p.hides(b, t)) continue;
    for (int64_t j = 0; j < kWidth; ++j) panel[t * kWidth + j] = 0;
  }
}

void pack_states(const Problem& p, const Workspace& w, int64_t b, int64_t panel) {
  float* to = state_panel(p, w, b, panel);
  if (p.P) copy_panel(p.past_s, b * p.P, p.P, p.D, panel, to);
  clear_hidden(p, b, 0, p.P, to);
  copy_panel(p.f, b * p.T, p.T, p.D, panel, to + p.P * kWidth);
}

void pack_bias(const Problem& p, const Workspace& w, int64_t b) {
  float* to = w.bias + b * w.weight_stride;
  for (int64_t j = 0; j < w.weight_stride; ++j) {
    to[j] = j < p.S() && p.hides(b, j) ? -kInfinity : 0.0f;
  }
}

// c (M, width) = [c +] a (M, depth) b (depth, width), with the sums in registers. The sums start
// from 0, because many small terms added to a large c one by one would lose their last digits.
template <int64_t M>
inline void tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                 int64_t c_stride, bool add) {
  Vec sums[M][2] = {};
  for (int64_t i = 0; i < depth; ++i) {
    const Vec b0 = load(b + i * kWidth), b1 = load(b + i * kWidth + kLanes);
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) {
      sums[m][0] += a[m * a_stride + i] * b0;
      sums[m][1] += a[m * a_stride + i] * b1;
    }
  }
  for (int64_t m = 0; m < M; ++m, c += c_stride) {
    store(c, add ? load(c) + sums[m][0] : sums[m][0]);
    store(c + kLanes, add ? load(c + kLanes) + sums[m][1] : sums[m][1]);
  }
}

template <int64_t M>
inline void tiles(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t depth,
                  float* c, int64_t c_stride, bool add) {
  for (; rows >= M; rows -= M, a += M * a_stride, c += M * c_stride) {
    tile<M>(a, a_stride, b, depth, c, c_stride, add);
  }
  if constexpr (M > 1) {
    if (rows) tiles<M / 2>(a, a_stride, rows, b, depth, c, c_stride, add);
  }
}

// One panel: c (rows, width) = [c +] a (rows, depth) b (depth, width).
void product(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t depth,
             float* c, int64_t c_stride, bool add) {
  for (int64_t i = 0; i < depth; i += kDepth) {
    tiles<kRows>(a + i, a_stride, rows, b + i * kWidth, smaller(kDepth, depth - i), c, c_stride,
                 add || i > 0);
  }
}

// Scores of the first `visible` columns become gain * softmax; `row` has room for whole vectors.
void softmax(float* row, int64_t visible, const float* bias, float gain) {
  const int64_t end = (visible + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = visible; j < end; ++j) row[j] = -kInfinity;
  Vec tops = splat(-kInfinity);
  for (int64_t j = 0; j < end; j += kLanes) {
    if (bias) store(row + j, load(row + j) + load(bias + j));
    tops = larger(load(row + j), tops);
  }
  // A row that sees nothing: every weight is exp(-infinity) = 0.
  const float top = largest(tops) > -kInfinity ? largest(tops) : 0.0f;
  Vec totals{};
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vec weight = exp_negative(load(row + j) - top);
    totals += weight;
    store(row + j, weight);
  }
  const float total = sum(totals);
  const float factor = total == 0 ? 0.0f : gain / total;
  for (int64_t j = 0; j < end; j += kLanes) store(row + j, load(row + j) * factor);
}

void weigh(const Problem& p, const Workspace& w, int64_t b, int64_t start, int64_t first,
           int64_t last) {
  const int64_t rows = last - first, old = p.P + start, columns = p.P + last - 1;
  float* queries = w.queries + (b * w.rows + first - start) * w.query_stride;
  float* weights = w.weights + (b * w.rows + first - start) * w.weight_stride;
  const float* bias = w.bias ? w.bias + b * w.weight_stride : nullptr;
  const float scale = inverse_root(p.K);
  for (int64_t t = 0; t < rows; ++t) {
    with_elements(p.q, (b * p.T + first + t) * p.K,
                  [&](auto* q) { convert(q, p.K, scale, queries + t * w.query_stride); });
  }
  for (int64_t panel = 0; panel < panels(columns); ++panel) {
    const float* keys = w.keys + (b * panels(p.S()) + panel) * p.K * kWidth;
    product(queries, w.query_stride, rows, keys, p.K, weights + panel * kWidth, w.weight_stride,
            false);
  }
  for (int64_t t = 0; t < rows; ++t) {
    softmax(weights + t * w.weight_stride, p.P + first + t, bias,
            scalar(p.gamma, b * p.T + first + t));
  }
  for (int64_t panel = 0; panel < panels(p.D); ++panel) {
    float* states = state_panel(p, w, b, panel);
    product(weights, w.weight_stride, rows, states, old, states + (p.P + first) * kWidth, kWidth,
            true);
  }
}

// x += strictly lower part of a times x, row after row; at most one tile of rows. `shown` says
// which rows are read, null that all are.
void substitute(const float* a, int64_t a_stride, int64_t rows, const uint8_t* shown, float* x) {
  for (int64_t i = 0; i < rows; ++i) {
    if (shown && !shown[i]) continue;
    const Vec x0 = load(x + i * kWidth), x1 = load(x + i * kWidth + kLanes);
    for (int64_t j = i + 1; j < rows; ++j) {
      float* to = x + j * kWidth;
      store(to, load(to) + a[j * a_stride + i] * x0);
      store(to + kLanes, load(to + kLanes) + a[j * a_stride + i] * x1);
    }
  }
}

template <class E>
void write_rows(const float* from, int64_t rows, int64_t count, int64_t D, E* to) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < count; ++j) from_float(from[t * kWidth + j], to + t * D + j);
  }
}

void solve(const Problem& p, const Workspace& w, int64_t b, int64_t start, int64_t stop,
           int64_t panel) {
  const float* weights = w.weights + b * w.rows * w.weight_stride + p.P + start;
  float* states = state_panel(p, w, b, panel);
  float* x = states + (p.P + start) * kWidth;
  const int64_t first = panel * kWidth, count = smaller(kWidth, p.D - first);
  for (int64_t i = 0; i < stop - start; i += kRows) {
    const int64_t rows = smaller(kRows, stop - start - i), column = p.P + start + i;
    const float* a = weights + i * w.weight_stride;
    const uint8_t* shown = p.key_mask ? p.key_mask + b * p.S() + column : nullptr;
    product(a, w.weight_stride, rows, x, i, x + i * kWidth, kWidth, true);
    substitute(a + i, w.weight_stride, rows, shown, x + i * kWidth);
    with_elements({p.s, p.f.type}, (b * p.T + start + i) * p.D + first, [&](auto* to) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(to)>>;
      write_rows(x + i * kWidth, rows, count, p.D, const_cast<E*>(to));
    });
    clear_hidden(p, b, column, column + rows, states);
  }
}

void row_query(const Problem& p, int64_t b, int64_t t, float* query) {
  with_elements(p.q, (b * p.T + t) * p.K,
                [&](auto* q) { convert(q, p.K, inverse_root(p.K), query); });
}

// out[j] = <query, keys[j]> for R keys at once.
template <int64_t R, class E>
inline void dots(const float* query, const E* keys, int64_t K, float* out) {
  Vec sums[R] = {};
  int64_t i = 0;
  for (; i + kLanes <= K; i += kLanes) {
    const Vec q = load(query + i);
    for (int64_t r = 0; r < R; ++r) sums[r] += q * load(keys + r * K + i);
  }
  for (int64_t r = 0; r < R; ++r) {
    float total = sum(sums[r]);
    for (int64_t j = i; j < K; ++j) total += query[j] * to_float(keys[r * K + j]);
    out[r] = total;
  }
}

// out += sum of weights[r] * states[r] over R states.
template <int64_t R, class E>
inline void add_states(const float* weights, const E* states, int64_t D, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    Vec total = load(out + i);
    for (int64_t r = 0; r < R; ++r) total += weights[r] * load(states + r * D + i);
    store(out + i, total);
  }
  for (; i < D; ++i) {
    for (int64_t r = 0; r < R; ++r) out[i] += weights[r] * to_float(states[r * D + i]);
  }
}

// out += the sum of weights[j] * states[j] over `count` states, of which only those are read that
// `shown` shows; null shows all.
template <class E>
inline void add_shown(const uint8_t* shown, const float* weights, const E* states, int64_t count,
                      int64_t D, float* out) {
  for (int64_t j = 0, end; j < count; j = end) {
    for (; shown && j < count && !shown[j];) ++j;
    for (end = j; end < count && (!shown || shown[end]);) ++end;
    for (; j + 4 <= end; j += 4) add_states<4>(weights + j, states + j * D, D, out);
    for (; j < end; ++j) add_states<1>(weights + j, states + j * D, D, out);
  }
}

// scores[0..count) become exp(score - top), and the part's top and total are set.
void exponentials(const uint8_t* mask, int64_t count, float* scores, Part* part) {
  part->top = -kInfinity, part->total = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (mask && !mask[j]) scores[j] = -kInfinity;
    part->top = scores[j] > part->top ? scores[j] : part->top;
  }
  // A part that sees nothing: every exponential is exp(-infinity) = 0.
  const float top = part->top > -kInfinity ? part->top : 0.0f;
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec lanes = splat(-kInfinity);
    const size_t used = static_cast<size_t>(smaller(kLanes, count - j)) * sizeof(float);
    __builtin_memcpy(&lanes, scores + j, used);
    lanes = exp_negative(lanes - top);
    part->total += sum(lanes);
    __builtin_memcpy(scores + j, &lanes, used);
  }
}

void row_part(const Problem& p, int64_t b, const float* query, const float* solved, int64_t first,
              int64_t last, float* scores, Part* part) {
  const int64_t count = last - first;
  with_elements(p.k, (b * p.S() + first) * p.K, [&](auto* keys) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) dots<4>(query, keys + j * p.K, p.K, scores + j);
    for (; j < count; ++j) dots<1>(query, keys + j * p.K, p.K, scores + j);
  });
  const uint8_t* shown = p.key_mask ? p.key_mask + b * p.S() + first : nullptr;
  exponentials(shown, count, scores, part);
  for (int64_t i = 0; i < p.D; ++i) part->read[i] = 0;
  const bool old = first < p.P;
  const Tensor states = old ? p.past_s : Tensor{solved, Type::kFloat};
  const int64_t row = old ? b * p.P + first : b * p.T + first - p.P;
  with_elements(states, row * p.D, [&](auto* from) {
    add_shown(shown, scores, from, count, p.D, part->read);
  });
}

void row_join(const Problem& p, int64_t b, int64_t t, Part* parts, int64_t count, float* solved) {
  float top = -kInfinity, total = 0;
  for (int64_t j = 0; j < count; ++j) top = parts[j].top > top ? parts[j].top : top;
  float* sums = solved + (b * p.T + t) * p.D;
  for (int64_t i = 0; i < p.D; ++i) sums[i] = 0;
  for (int64_t j = 0; j < count; ++j) {
    // A part without a visible key has the top -infinity, and -infinity - -infinity is NaN.
    if (parts[j].total == 0) continue;
    const float weight = exp_negative(splat(parts[j].top - top))[0];
    total += weight * parts[j].total;
    for (int64_t i = 0; i < p.D; ++i) sums[i] += weight * parts[j].read[i];
  }
  const int64_t row = b * p.T + t;
  const float factor = total == 0 ? 0.0f : scalar(p.gamma, row) / total;
  with_elements({p.s, p.f.type}, row * p.D, [&](auto* to) {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(to)>>;
    const E* f = static_cast<const E*>(p.f.data) + row * p.D;
    for (int64_t i = 0; i < p.D; ++i) {
      sums[i] = to_float(f[i]) + factor * sums[i];
      from_float(sums[i], const_cast<E*>(to) + i);
    }
  });
}

}  // namespace

const Kernels SESSA_KERNELS = {SESSA_NAME, kWidth, kGroup, kBlock,    pack_keys, pack_states,
                               pack_bias,  weigh,  solve,  row_query, row_part,  row_join};

}  // namespace sessa
