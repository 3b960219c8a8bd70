// The arithmetic of the CUDA operator. Letters as in problem.h; n rows of one block of rows. Sums
// are float32 for every type of input.
#pragma once

#include <cstdint>

#include <cuda_runtime_calls.h>

#include "problem.h"

namespace sessa {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
// Rows that are solved at once behind a past; more rows are solved in blocks.
constexpr int kFewRows = 16;
// A product's tile is kTile x kTile, and a thread's part of it kPart x kPart.
constexpr int kTile = 64, kDepth = 16, kPart = 4;
// Rows of a diagonal block, rows of it that are solved at once, and columns of one of its strips,
// of which a warp takes kWarpColumns.
constexpr int kBlock = 256, kSub = 64, kStrip = 8, kWarpColumns = 2;
constexpr int kStripThreads = kStrip / kWarpColumns * kWarp;

constexpr float kMinusInfinity = -__builtin_inff();

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline float read(Tensor x, int64_t i) {
  if (x.type == Type::kFloat) return static_cast<const float*>(x.data)[i];
  if (x.type == Type::kHalf) return to_float(static_cast<const __half*>(x.data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(x.data)[i]);
}

__device__ inline void write(void* out, Type type, int64_t i, float x) {
  if (type == Type::kFloat) {
    static_cast<float*>(out)[i] = x;
  } else if (type == Type::kHalf) {
    static_cast<__half*>(out)[i] = __float2half(x);
  } else {
    static_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16(x);
  }
}

__device__ inline float warp_sum(float x) {
  for (int step = kWarp / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = kWarp / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The sum or the largest of one value of every thread; `shared` holds kWarps floats.
template <bool kSum>
__device__ float block_reduce(float x, float* shared) {
  x = kSum ? warp_sum(x) : warp_max(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = shared[0];
  for (int i = 1; i < kWarps; ++i) total = kSum ? total + shared[i] : fmaxf(total, shared[i]);
  return total;
}

// states (B, S, D) = past_s, 0 where its key is hidden, followed by f.
__global__ void gather_states(Problem p, float* states) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= p.B * p.S() * p.D) return;
  const int64_t d = i % p.D, j = i / p.D % p.S(), b = i / p.D / p.S();
  if (j >= p.P) {
    states[i] = read(p.f, (b * p.T + j - p.P) * p.D + d);
  } else {
    states[i] = p.hides(b, j) ? 0 : read(p.past_s, (b * p.P + j) * p.D + d);
  }
}

// out = x in float32.
__global__ void convert(Tensor x, int64_t count, float* out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) out[i] = read(x, i);
}

// Matrices of a batch, with the distances from one to the next and from one row to the next.
struct Matrix {
  float* data;
  int64_t batch, row;
};

// Four neighbours in shared memory, read at once.
struct alignas(16) Four {
  float x[4];
};

// One thread's part of a tile that kDepth terms of the sum need: rows of kTile of one matrix, whose
// terms lie in a row (`kAlong`) or below one another.
template <bool kAlong>
struct Fetch {
  static constexpr int kEach = kTile * kDepth / kThreads;
  float values[kEach];

  __device__ void load(const float* from, int64_t row, int lines, int depth) {
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      const int k = kAlong ? i % kDepth : i / kTile, line = kAlong ? i / kDepth : i % kTile;
      const bool inside = line < lines && k < depth;
      values[e] = inside ? from[kAlong ? line * row + k : k * row + line] : 0;
    }
  }

  __device__ void store(float (&tile)[kDepth][kTile + 4]) const {
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      tile[kAlong ? i % kDepth : i / kTile][kAlong ? i / kDepth : i % kTile] = values[e];
    }
  }
};

// A product of rows x depth and depth x columns for each of B matrices.
struct Sizes {
  int64_t B, rows, columns, depth;
  // Columns that row 0 needs, each further row one more; the tiles that no row needs are left out.
  int64_t needed;
  // Terms of one part of the sums, and the distance from the result of one part to the next.
  int64_t part_depth, spread;
};

// Tile (blockIdx.y, blockIdx.x) of out = a b, or of a b^T (`kTurned`), or of out += a b (`kAdd`).
// With several parts of the sums, blockIdx.z = part * B + b.
template <bool kTurned, bool kAdd>
__global__ void multiply(Matrix a, Matrix b, Matrix out, Sizes sizes) {
  alignas(16) __shared__ float left[kDepth][kTile + 4];
  alignas(16) __shared__ float right[kDepth][kTile + 4];
  const int64_t batch = blockIdx.z % sizes.B, part = blockIdx.z / sizes.B;
  const int64_t first = part * sizes.part_depth, row0 = blockIdx.y * int64_t{kTile};
  const int64_t column0 = blockIdx.x * int64_t{kTile};
  if (column0 >= sizes.needed + row0 + kTile - 1) return;
  const int64_t left_terms = sizes.depth - first;
  const int length = static_cast<int>(sizes.part_depth < left_terms ? sizes.part_depth : left_terms);
  const int64_t left_rows = sizes.rows - row0, left_columns = sizes.columns - column0;
  const int height = static_cast<int>(left_rows < kTile ? left_rows : kTile);
  const int width = static_cast<int>(left_columns < kTile ? left_columns : kTile);
  const float* A = a.data + batch * a.batch + row0 * a.row + first;
  const float* R = b.data + batch * b.batch;
  R += kTurned ? column0 * b.row + first : first * b.row + column0;
  const int row = threadIdx.x / (kTile / kPart) * kPart;
  const int column = threadIdx.x % (kTile / kPart) * kPart;
  float sums[kPart][kPart] = {};
  Fetch<true> next_left;
  Fetch<kTurned> next_right;
  next_left.load(A, a.row, height, length);
  next_right.load(R, b.row, width, length);
  for (int k0 = 0; k0 < length; k0 += kDepth) {
    __syncthreads();
    next_left.store(left);
    next_right.store(right);
    __syncthreads();
    // The next terms are on their way while these are multiplied.
    A += kDepth, R += kTurned ? kDepth : kDepth * b.row;
    next_left.load(A, a.row, height, length - k0 - kDepth);
    next_right.load(R, b.row, width, length - k0 - kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const Four l = *reinterpret_cast<const Four*>(&left[k][row]);
      const Four r = *reinterpret_cast<const Four*>(&right[k][column]);
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
#pragma unroll
        for (int j = 0; j < kPart; ++j) sums[i][j] += l.x[i] * r.x[j];
      }
    }
  }
  float* O = out.data + batch * out.batch + part * sizes.spread + row0 * out.row + column0;
  for (int i = 0; i < kPart; ++i) {
    for (int j = 0; j < kPart; ++j) {
      if (row + i >= height || column + j >= width) continue;
      float& result = O[(row + i) * out.row + column + j];
      result = kAdd ? result + sums[i][j] : sums[i][j];
    }
  }
}

// states (B, S, D) of `rows` rows from `first` on += the sums of `parts` parts.
__global__ void add_parts(Problem p, int64_t first, int64_t rows, float* states, const float* sums,
                          int64_t parts, int64_t spread) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= p.B * rows * p.D) return;
  const int64_t b = i / (rows * p.D), inside = i % (rows * p.D);
  float total = 0;
  for (int64_t part = 0; part < parts; ++part) total += sums[part * spread + i];
  states[(b * p.S() + first) * p.D + inside] += total;
}

// Scores of row start + blockIdx.x, times `scale`, to gamma times their softmax, 0 where the row
// sees nothing and in the rest of its diagonal block.
__global__ void weigh(Problem p, int64_t start, float scale, Matrix weights) {
  __shared__ float shared[kWarps];
  const int64_t t = start + blockIdx.x, b = blockIdx.y, seen = p.P + t;
  const int64_t block_end = (t / kBlock + 1) * kBlock;
  const int64_t all = p.P + (block_end < p.T ? block_end : p.T);
  float* row = weights.data + b * weights.batch + blockIdx.x * weights.row;
  float top = kMinusInfinity;
  for (int64_t j = threadIdx.x; j < seen; j += kThreads) {
    if (!p.hides(b, j)) top = fmaxf(top, scale * row[j]);
  }
  top = block_reduce<false>(top, shared);
  float total = 0;
  for (int64_t j = threadIdx.x; j < all; j += kThreads) {
    const bool visible = j < seen && !p.hides(b, j);
    row[j] = visible ? expf(scale * row[j] - top) : 0;
    total += row[j];
  }
  total = block_reduce<true>(total, shared);
  const float gain = total == 0 ? 0 : read(p.gamma, b * p.T + t) / total;
  for (int64_t j = threadIdx.x; j < all; j += kThreads) row[j] = row[j] == 0 ? 0 : gain * row[j];
}

// A thread's part of a kSub x kSub tile of weights, which is on its way while the last one is used.
struct NextTile {
  static constexpr int kEach = kSub * kSub / kStripThreads;
  float values[kEach];

  __device__ void load(const float* from, int64_t row, int lines, int columns) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kStripThreads, r = i / kSub, j = i % kSub;
      values[e] = r < lines && j < columns ? from[r * row + j] : 0;
    }
  }

  // By column: tile[j][r] of row r and column j.
  __device__ void store(float (&tile)[kSub][kSub + 4]) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kStripThreads;
      tile[i % kSub][i / kSub] = values[e];
    }
  }
};

// Forward substitution in rows [start, stop) of kStrip columns of the states, to which the rows
// before the block are added already: adds what the rows of the block add to one another, and
// writes s. `own` are the block's weights on its own rows. A warp holds kSub rows of kWarpColumns
// columns, so that rows pass their values on without a barrier.
__global__ void substitute(Problem p, int64_t start, int64_t stop, Matrix own, float* states) {
  alignas(16) __shared__ float w[kSub][kSub + 4];
  __shared__ float x[kBlock][kStrip + 1];  // solved rows, 0 where their key is hidden
  __shared__ bool hidden[kBlock];
  constexpr int kEach = 4, kLanes = kSub / kEach;
  const int n = static_cast<int>(stop - start), lane = threadIdx.x % kLanes;
  const int column = threadIdx.x / kLanes, row = lane * kEach;
  const int64_t b = blockIdx.y, first = p.P + start, D = p.D;
  const int64_t d0 = blockIdx.x * int64_t{kStrip};
  const int columns = static_cast<int>(D - d0 < kStrip ? D - d0 : kStrip);
  const float* from = own.data + b * own.batch;
  NextTile next;
  next.load(from, own.row, n, n);
  float* to = states + (b * p.S() + first) * D + d0;
  for (int i = threadIdx.x; i < n * kStrip; i += kStripThreads) {
    const int r = i / kStrip, c = i % kStrip;
    x[r][c] = c < columns ? to[r * D + c] : 0;
  }
  for (int r = threadIdx.x; r < n; r += kStripThreads) hidden[r] = p.hides(b, first + r);
  for (int r0 = 0; r0 < n; r0 += kSub) {
    __syncthreads();
    float value[kEach];
    for (int u = 0; u < kEach; ++u) value[u] = r0 + row + u < n ? x[r0 + row + u][column] : 0;
    for (int j0 = 0; j0 <= r0; j0 += kSub) {
      __syncthreads();
      next.store(w);
      __syncthreads();
      const int next_r = j0 == r0 ? r0 + kSub : r0, next_j = j0 == r0 ? 0 : j0 + kSub;
      next.load(from + next_r * own.row + next_j, own.row, n - next_r, n - next_j);
      if (j0 == r0) break;
#pragma unroll 8
      for (int j = 0; j < kSub; ++j) {
        const Four weight = *reinterpret_cast<const Four*>(&w[j][row]);
        for (int u = 0; u < kEach; ++u) value[u] += weight.x[u] * x[j0 + j][column];
      }
    }
    for (int owner = 0; owner < kLanes; ++owner) {
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        const int r = owner * kEach + u;
        float solved = __shfl_sync(0xffffffffu, value[u], owner, kLanes);
        solved = r0 + r < n && !hidden[r0 + r] ? solved : 0;
        const Four weight = *reinterpret_cast<const Four*>(&w[r][row]);
        // The weights of a row on itself and on later rows are 0, but what they would weigh may be
        // NaN.
        for (int v = 0; v < kEach; ++v) {
          if (row + v > r) value[v] += weight.x[v] * solved;
        }
      }
    }
    for (int u = 0; u < kEach; ++u) {
      const int r = r0 + row + u;
      if (r >= n) break;
      x[r][column] = hidden[r] ? 0 : value[u];
      if (column < columns) {
        write(p.s, p.f.type, (b * p.T + start + r) * D + d0 + column, value[u]);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n * kStrip; i += kStripThreads) {
    if (i % kStrip < columns) to[i / kStrip * D + i % kStrip] = x[i / kStrip][i % kStrip];
  }
}

// What one part of the past adds to a few rows: (top, total) and the read of D floats a row.
struct Parts {
  float* stats;  // (B, parts, T, 2)
  float* reads;  // (B, parts, T, D)
  int64_t count, length;
};

// Queries in float32, and by how much their products are to be scaled.
struct Queries {
  const float* data;  // (B, T, K)
  float scale;
};

// One chunk of keys for T <= kRows rows: scores in `weights`, and whether each key is shown.
template <typename KeyType, int kRows, int kChunk>
__device__ void score_chunk(const Problem& p, Queries q, int64_t b, int64_t first, int count,
                            float (&weights)[kRows][kChunk], bool (&shown)[kChunk]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* rows = q.data + b * p.T * p.K;
  for (int j = warp; j < count; j += kWarps) {
    const KeyType* key = static_cast<const KeyType*>(p.k.data) + (b * p.S() + first + j) * p.K;
    float sums[kRows] = {};
    for (int64_t c = lane; c < p.K; c += kWarp) {
      const float value = to_float(key[c]);
      for (int t = 0; t < kRows; ++t) sums[t] += t < p.T ? rows[t * p.K + c] * value : 0;
    }
    for (int t = 0; t < kRows && t < p.T; ++t) {
      const float score = q.scale * warp_sum(sums[t]);
      if (lane == 0) weights[t][j] = score;
    }
    if (lane == 0) shown[j] = !p.hides(b, first + j);
  }
}

// Reads keys and states [blockIdx.x * length, ...) of the past once for all T <= kRows rows, chunk
// by chunk; a larger score in a later chunk scales down what the earlier ones gave.
template <typename KeyType, typename StateType, int kRows>
__global__ void read_part(Problem p, Queries queries, Parts out) {
  constexpr int kChunk = kRows == 1 ? 256 : 64;
  __shared__ float weights[kRows][kChunk], tops[kRows], totals[kRows], scales[kRows];
  __shared__ bool shown[kChunk];
  const int64_t b = blockIdx.y, begin = blockIdx.x * out.length;
  const int64_t end = begin + out.length < p.P ? begin + out.length : p.P;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* reads = out.reads + (b * out.count + blockIdx.x) * p.T * p.D;
  if (threadIdx.x < kRows) tops[threadIdx.x] = kMinusInfinity, totals[threadIdx.x] = 0;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int count = static_cast<int>(end - first < kChunk ? end - first : kChunk);
    __syncthreads();
    score_chunk<KeyType>(p, queries, b, first, count, weights, shown);
    __syncthreads();
    for (int t = warp; t < p.T; t += kWarps) {
      float top = tops[t], total = 0;
      for (int j = lane; j < count; j += kWarp) {
        if (shown[j]) top = fmaxf(top, weights[t][j]);
      }
      top = warp_max(top);
      for (int j = lane; j < count; j += kWarp) {
        weights[t][j] = shown[j] ? expf(weights[t][j] - top) : 0;
        total += weights[t][j];
      }
      total = warp_sum(total);
      if (lane == 0) {
        scales[t] = totals[t] == 0 ? 0 : expf(tops[t] - top);
        totals[t] = scales[t] * totals[t] + total, tops[t] = top;
      }
    }
    __syncthreads();
    const StateType* state = static_cast<const StateType*>(p.past_s.data) + (b * p.P + first) * p.D;
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
      float sums[kRows];
      for (int t = 0; t < kRows; ++t) {
        sums[t] = first > begin && t < p.T ? scales[t] * reads[t * p.D + d] : 0;
      }
#pragma unroll 8
      for (int j = 0; j < count; ++j) {
        const float value = shown[j] ? to_float(state[j * p.D + d]) : 0;
        for (int t = 0; t < kRows; ++t) sums[t] += t < p.T ? weights[t][j] * value : 0;
      }
      for (int t = 0; t < kRows; ++t) {
        if (t < p.T) reads[t * p.D + d] = sums[t];
      }
    }
  }
  if (threadIdx.x < p.T) {
    float* stats = out.stats + ((b * out.count + blockIdx.x) * p.T + threadIdx.x) * 2;
    stats[0] = tops[threadIdx.x], stats[1] = totals[threadIdx.x];
  }
}

// Joins the parts of T <= kFewRows rows in kThreads columns: each row also reads the rows before it.
__global__ void join_parts(Problem p, Queries queries, Parts in) {
  __shared__ float own[kFewRows][kFewRows], solved[kFewRows][kThreads];
  const int64_t b = blockIdx.y, d = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int T = static_cast<int>(p.T);
  for (int pair = warp; pair < T * T; pair += kWarps) {
    const int t = pair / T, i = pair % T;
    float sum = 0;
    for (int64_t c = lane; c < p.K && i < t; c += kWarp) {
      sum += queries.data[(b * T + t) * p.K + c] * read(p.k, (b * p.S() + p.P + i) * p.K + c);
    }
    sum = queries.scale * warp_sum(sum);
    if (lane == 0) own[t][i] = sum;
  }
  __syncthreads();
  const float* stats = in.stats + b * in.count * T * 2;
  for (int t = 0; t < T; ++t) {
    float top = kMinusInfinity, total = 0, sum = 0;
    for (int64_t i = 0; i < in.count; ++i) top = fmaxf(top, stats[(i * T + t) * 2]);
    for (int i = 0; i < t; ++i) {
      if (!p.hides(b, p.P + i)) top = fmaxf(top, own[t][i]);
    }
    for (int64_t i = 0; i < in.count; ++i) {
      // A part without a visible key has the top -infinity and adds nothing.
      const float part = stats[(i * T + t) * 2], all = stats[(i * T + t) * 2 + 1];
      if (all == 0) continue;
      const float scale = expf(part - top);
      total += scale * all;
      if (d < p.D) sum += scale * in.reads[((b * in.count + i) * T + t) * p.D + d];
    }
    for (int i = 0; i < t; ++i) {
      if (p.hides(b, p.P + i)) continue;
      const float weight = expf(own[t][i] - top);
      total += weight;
      sum += weight * solved[i][threadIdx.x];
    }
    float value = d < p.D ? read(p.f, (b * T + t) * p.D + d) : 0;
    if (total != 0) value += read(p.gamma, b * T + t) * (sum / total);
    solved[t][threadIdx.x] = value;
    if (d < p.D) write(p.s, p.f.type, (b * T + t) * p.D + d, value);
  }
}

}  // namespace sessa
