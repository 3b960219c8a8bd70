// The feedback solve on Apple GPUs: what framework matrix products cannot do well.
//
// s_t = f_t + gamma_t sum_{j<t} alpha_tj s_j, by block rows of n rows with L columns: P past keys,
// all rows up to the block row's last, and maybe some that no row sees. Within a block row up to
// BLOCK_ROWS rows at a time are solved. docs/metal.md says why the T^2 products stay with the
// framework.
//   feedback_weights      scores (n, L) -> log-sum-exp, alpha, and gamma alpha within blocks
//   feedback_block        (I - N) x = rhs within a block, or (I - N^T) x = rhs reversed
//   feedback_score_grads  alpha, u s^T -> gradients of the scores and of gamma
//   feedback_step, feedback_merge   one new token: the feedback read in one pass over the past
//
// Storage T is float, half or bfloat; everything is accumulated in float. MLX compiles the
// functions under bodies of its own (SESSA_FUNCTIONS_ONLY), PyTorch the kernels at the end.
// Input pointers are template parameters: MLX binds inputs of fewer than 8 elements as `constant`.
// No guard compares with infinity or NaN, because PyTorch can compile with fast math, which may take
// such a comparison for false (PYTORCH_MPS_FAST_MATH=1).

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

constant constexpr int THREADS = 128;     // of every threadgroup: four simdgroups
constant constexpr int SIMDGROUPS = 4;
constant constexpr int BLOCK_ROWS = 256;  // rows that feedback_block solves, at most
constant constexpr int COLUMNS = 16;      // columns of D that one threadgroup solves
constant constexpr int X_LD = 20;         // padded rows keep 8x8 tile loads off one memory bank
constant constexpr int TILE = 32;
constant constexpr int TILE_LD = 36;
constant constexpr int CHUNK = 32;        // past tokens that one threadgroup reads in feedback_step

// The sum of one value per thread, to every thread; `partial` holds SIMDGROUPS floats.
METAL_FUNC float group_sum(float value, threadgroup float* partial, uint lane, uint sg) {
  const float sum = simd_sum(value);
  if (lane == 0) partial[sg] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return partial[0] + partial[1] + partial[2] + partial[3];
}

METAL_FUNC float group_max(float value, threadgroup float* partial, uint lane, uint sg) {
  const float top = simd_max(value);
  if (lane == 0) partial[sg] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return max(max(partial[0], partial[1]), max(partial[2], partial[3]));
}

constant constexpr float LOWEST = -3.402823466e38f;  // of an empty maximum
constant constexpr uint INFINITE = 0x7f800000u;      // bits of infinity; NaN has more of them
constant constexpr uint NOT_A_NUMBER = 0x7fc00000u;

// False for NaN and infinity.
METAL_FUNC bool finite(float value) { return (as_type<uint>(value) & INFINITE) != INFINITE; }

// exp(a - b), and 0 where a is an empty maximum.
METAL_FUNC float ratio(float a, float b) { return a == LOWEST ? 0.0f : exp(a - b); }

// One threadgroup owns one row: weights[j] = exp(scores[j] - lse) where column j is visible, else
// 0. Row r of the block row sees the columns j < own + r that the mask does not hide, or with
// DOCUMENTS, when there is no past and key_mask holds a number for each row instead, from that
// column on, the first of the row's document. A row that sees nothing has lse = +inf. The block row has blocks of `width` rows; coupling holds gamma alpha of
// the columns of the row's own block, NaN in all of them if one is not finite. The backward pass
// runs this again, because the rounding of a stored lse would cost digits.
// sizes: n, L, own, width; rows and first row of gamma; columns of key_mask.
template <bool MASKED, bool DOCUMENTS, typename T, typename Scores, typename Mask, typename Gamma,
          typename Sizes>
METAL_FUNC void feedback_weights(Scores scores, Mask key_mask, Gamma gamma, Sizes sizes,
                                 device T* weights, device float* coupling, device float* lse,
                                 threadgroup float* partial, uint3 tgid, uint tid, uint lane,
                                 uint sg) {
  const int n = sizes[0], L = sizes[1], own = sizes[2], width = sizes[3];
  const int r = tgid.x;
  const int visible = own + r, block = own + r / width * width;
  const size_t row = size_t(tgid.y) * n + r;
  scores += row * L;
  weights += row * L;
  coupling += row * width;
  if (MASKED || DOCUMENTS) key_mask += size_t(tgid.y) * sizes[6];
  const int begin = DOCUMENTS ? int(key_mask[visible]) : 0;
  float top = LOWEST, sum = 0.0f;
  for (int j = begin + tid; j < visible; j += THREADS) {
    if (MASKED && !key_mask[j]) continue;
    const float score = float(scores[j]);
    if (score > top) {
      sum = sum * ratio(top, score) + 1.0f;
      top = score;
    } else {
      sum += exp(score - top);
    }
  }
  const float row_top = group_max(top, partial, lane, sg);
  const float row_sum = group_sum(sum * ratio(top, row_top), partial + SIMDGROUPS, lane, sg);
  const float gain = float(gamma[size_t(tgid.y) * sizes[4] + sizes[5] + r]);
  const float unseen = finite(gain) && finite(row_sum) ? 0.0f : as_type<float>(NOT_A_NUMBER);
  for (int j = tid; j < L; j += THREADS) {
    const bool seen = j >= begin && j < visible && (!MASKED || bool(key_mask[j]));
    const float weight = seen ? exp(float(scores[j]) - row_top) / row_sum : 0.0f;
    weights[j] = T(weight);
    if (j >= block && j < block + width) {
      coupling[j - block] = seen ? gain * weight + unseen : unseen;
    }
  }
  if (tid == 0) lse[row] = row_sum == 0.0f ? as_type<float>(INFINITE) : row_top + log(row_sum);
}

// tile <- the TILE x TILE block (i, j) of coupling (n, width), zero where it has no row or column
// and where it is not finite.
template <typename Coupling>
METAL_FUNC void load_tile(threadgroup float* tile, Coupling coupling, int n, int width, int i,
                          int j, uint tid) {
  for (int e = tid; e < TILE * TILE; e += THREADS) {
    const int r = i * TILE + e / TILE, c = j * TILE + e % TILE;
    const float value = r < n && c < n ? float(coupling[size_t(r) * width + c]) : 0.0f;
    tile[e / TILE * TILE_LD + e % TILE] = finite(value) ? value : 0.0f;
  }
}

// The 8x8 tile (i, j) of N, or of N^T when REVERSED.
template <bool REVERSED>
METAL_FUNC void load_8x8(thread simdgroup_float8x8& m, const threadgroup float* tile, int i,
                         int j) {
  const threadgroup float* corner = REVERSED ? tile + 8 * j * TILE_LD + 8 * i
                                             : tile + 8 * i * TILE_LD + 8 * j;
  simdgroup_load(m, corner, TILE_LD, ulong2(0, 0), REVERSED);
}

// x <- (I - N)^-1 (x + sum) for the TILE rows of one diagonal tile and 8 columns, by one simdgroup.
// An 8x8 diagonal tile L has L^8 = 0, so its inverse is (I + L)(I + L^2)(I + L^4) exactly. Applied
// to sum + L x, and added to x last, it rounds at the size of the correction, not at that of x.
template <bool REVERSED>
METAL_FUNC void solve_tile(const threadgroup float* tile, threadgroup float* x,
                           const threadgroup float* sum) {
  simdgroup_float8x8 one(1.0f);  // the identity
  simdgroup_float8x8 solved[4];
#pragma clang loop unroll(full)
  for (int step = 0; step < 4; step++) {
    const int i = REVERSED ? 3 - step : step;
    simdgroup_float8x8 rows, change, power, square;
    simdgroup_load(rows, x + 8 * i * X_LD, X_LD);
    simdgroup_load(change, sum + 8 * i * X_LD, X_LD);
#pragma clang loop unroll(full)
    for (int k = 0; k < step; k++) {
      simdgroup_float8x8 left;
      load_8x8<REVERSED>(left, tile, i, REVERSED ? 3 - k : k);
      simdgroup_multiply_accumulate(change, left, solved[k], change);
    }
    load_8x8<REVERSED>(power, tile, i, i);
    simdgroup_multiply_accumulate(change, power, rows, change);
    simdgroup_multiply_accumulate(change, power, change, change);
    simdgroup_multiply(square, power, power);
    simdgroup_multiply_accumulate(change, square, change, change);
    simdgroup_multiply(power, square, square);
    simdgroup_multiply_accumulate(change, power, change, change);
    simdgroup_multiply_accumulate(rows, one, change, rows);
    solved[step] = rows;
    simdgroup_store(rows, x + 8 * i * X_LD, X_LD);
  }
}

// rhs + gain (carried + added) at `at`; NaN where the row's coupling is not finite.
template <int CARRIED, typename Rhs, typename Carried, typename Added>
METAL_FUNC float right_side(Rhs rhs, float gain, Carried carried, Added added, float coupling,
                            size_t at) {
  float value = float(rhs[at]);
  if (CARRIED == 1) value += gain * float(carried[at]);
  if (CARRIED == 2) value += gain * (float(carried[at]) + float(added[at]));
  return finite(coupling) ? value : as_type<float>(NOT_A_NUMBER);
}

// x = (I - N)^-1 (rhs + gamma (carried + added)), N = coupling strictly lower triangular; CARRIED
// says how many of the two there are. With REVERSED x = (I - N^T)^-1 rhs, and scaled = gamma x.
// One threadgroup solves COLUMNS of the D columns of one batch element and keeps them in threadgroup
// memory; simdgroup sg multiplies the 16 rows of a tile from 16 (sg / 2) and the 8 columns from
// 8 (sg % 2).
// sizes: n rows, D, width of coupling; rows and first row of rhs, gamma, coupling, carried and
// key_mask. added has n rows.
//
// In the products a value that is not finite would reach the rows before it. It is solved as 0;
// afterwards it gets its own value back, and the rows behind it become NaN unless its key is
// hidden. A thread loads and stores one column, of which `broken` is the first such row.
template <bool REVERSED, int CARRIED, bool MASKED, typename Rhs, typename Gamma, typename Carried,
          typename Added, typename Coupling, typename Mask, typename Sizes, typename Out,
          typename Scaled>
METAL_FUNC void feedback_block(Rhs rhs, Gamma gamma, Carried carried, Added added,
                               Coupling coupling, Mask key_mask, Sizes sizes, device Out* x,
                               device Scaled* scaled, threadgroup float* xs,
                               threadgroup float* sums, threadgroup float* tile,
                               threadgroup int* broken, uint3 tgid, uint tid, uint sg) {
  const int n = sizes[0], D = sizes[1], width = sizes[2];
  const int first = tgid.x * COLUMNS;
  const int tiles = (n + TILE - 1) / TILE;
  rhs += (size_t(tgid.y) * sizes[3] + sizes[4]) * D;
  gamma += size_t(tgid.y) * sizes[5] + sizes[6];
  coupling += (size_t(tgid.y) * sizes[7] + sizes[8]) * width;
  if (CARRIED > 0) carried += (size_t(tgid.y) * sizes[9] + sizes[10]) * D;
  if (CARRIED > 1) added += size_t(tgid.y) * n * D;
  if (MASKED) key_mask += size_t(tgid.y) * sizes[11] + sizes[12];
  x += size_t(tgid.y) * n * D;
  if (REVERSED) scaled += size_t(tgid.y) * n * D;
  int own_broken = n;
  for (int e = tid; e < tiles * TILE * COLUMNS; e += THREADS) {
    const int r = e / COLUMNS, c = first + e % COLUMNS;
    float value = 0.0f;
    if (r < n && c < D) {
      const size_t at = size_t(r) * D + c;
      value = right_side<CARRIED>(rhs, float(gamma[r]), carried, added,
                                  float(coupling[size_t(r) * width]), at);
      if (!finite(value)) {
        value = 0.0f;
        if (!MASKED || key_mask[r]) own_broken = min(own_broken, REVERSED ? n - 1 - r : r);
      }
    }
    xs[r * X_LD + e % COLUMNS] = value;
  }
  broken[tid] = own_broken;
  const int row = sg / 2 * 16, column = sg % 2 * 8;
  threadgroup float* own = sums + row * X_LD + column;
  for (int step = 0; step < tiles; step++) {
    const int i = REVERSED ? tiles - 1 - step : step;
    simdgroup_float8x8 sum[2];
    sum[0] = sum[1] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < step; k++) {
      const int j = REVERSED ? tiles - 1 - k : k;
      load_tile(tile, coupling, n, width, REVERSED ? j : i, REVERSED ? i : j, tid);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int m = 0; m < 4; m++) {
        simdgroup_float8x8 left, right;
        simdgroup_load(right, xs + (j * TILE + 8 * m) * X_LD + column, X_LD);
        for (int half_row = 0; half_row < 2; half_row++) {
          load_8x8<REVERSED>(left, tile, row / 8 + half_row, m);
          simdgroup_multiply_accumulate(sum[half_row], left, right, sum[half_row]);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    simdgroup_store(sum[0], own, X_LD);
    simdgroup_store(sum[1], own + 8 * X_LD, X_LD);
    load_tile(tile, coupling, n, width, i, i, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg < COLUMNS / 8) solve_tile<REVERSED>(tile, xs + i * TILE * X_LD + 8 * sg, sums + 8 * sg);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = tid % COLUMNS; i < THREADS; i += COLUMNS) own_broken = min(own_broken, broken[i]);
  for (int e = tid; e < n * COLUMNS; e += THREADS) {
    const int r = e / COLUMNS, c = first + e % COLUMNS;
    if (c >= D) continue;
    const size_t at = size_t(r) * D + c;
    float value = xs[r * X_LD + e % COLUMNS];
    if ((REVERSED ? n - 1 - r : r) > own_broken) value = as_type<float>(NOT_A_NUMBER);
    const float given = right_side<CARRIED>(rhs, float(gamma[r]), carried, added,
                                            float(coupling[size_t(r) * width]), at);
    value = finite(given) ? value : given;
    x[at] = Out(value);
    if (REVERSED) scaled[at] = Scaled(float(gamma[r]) * value);
  }
}

// One threadgroup owns one row. products = u s^T; the gradient of gamma is r = sum_j alpha_j
// products_j, that of the products q k^T is scale gamma alpha (products - r), scale = K^-1/2.
// sizes: n, L, own, K; rows and first row of gamma.
template <typename T, typename Weights, typename Products, typename Gamma, typename Sizes>
METAL_FUNC void feedback_score_grads(Weights weights, Products products, Gamma gamma, Sizes sizes,
                                     device T* dscores, device float* dgamma,
                                     threadgroup float* partial, uint3 tgid, uint tid, uint lane,
                                     uint sg) {
  const int n = sizes[0], L = sizes[1], visible = sizes[2] + int(tgid.x);
  const size_t row = size_t(tgid.y) * n + tgid.x;
  weights += row * L;
  products += row * L;
  dscores += row * L;
  float dot = 0.0f;
  for (int j = tid; j < visible; j += THREADS) dot += float(weights[j]) * float(products[j]);
  const float total = group_sum(dot, partial, lane, sg);
  const float gain = float(gamma[size_t(tgid.y) * sizes[4] + sizes[5] + tgid.x]);
  const float scaled = gain * rsqrt(float(sizes[3]));
  for (int j = tid; j < L; j += THREADS) {
    const float slope = scaled * float(weights[j]) * (float(products[j]) - total);
    dscores[j] = T(j < visible ? slope : 0.0f);
  }
  if (tid == 0) dgamma[row] = total;
}

// One new token, CHUNK past tokens to a threadgroup: partial[d] = sum_j exp(score_j - top) s_j[d]
// over the visible j, and stats = (top, sum_j exp(score_j - top)). keys holds P + 1 rows for each
// batch element, of which the new token does not see the last. The strides, in elements by axis,
// let a cache be read where it lies in a larger buffer.
template <bool MASKED, typename Query, typename Keys, typename States, typename Mask,
          typename Strides>
METAL_FUNC void feedback_step(Query q, Keys keys, States past_s, Mask key_mask, Strides q_at,
                              Strides key_at, Strides s_at, Strides mask_at,
                              device float* partial, device float* stats, int P, int K, int D,
                              threadgroup float* shared, uint3 tgid, uint tid, uint lane, uint sg) {
  const int first = tgid.x * CHUNK;
  const int count = min(CHUNK, P - first);
  const size_t chunk = size_t(tgid.y) * ((P + CHUNK - 1) / CHUNK) + tgid.x;
  q += tgid.y * q_at[0];
  keys += tgid.y * key_at[0] + first * key_at[1];
  past_s += tgid.y * s_at[0] + first * s_at[1];
  partial += chunk * D;
  if (MASKED) key_mask += tgid.y * mask_at[0] + first * mask_at[1];
  const float scale = rsqrt(float(K));
  for (int j = sg; j < count; j += SIMDGROUPS) {
    float dot = 0.0f;
    for (int c = lane; c < K; c += 32) {
      dot += float(q[c * q_at[2]]) * float(keys[j * key_at[1] + c * key_at[2]]);
    }
    const float score = simd_sum(dot) * scale;
    if (lane == 0) shared[j] = MASKED && !key_mask[j * mask_at[1]] ? LOWEST : score;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float score = int(lane) < count ? shared[lane] : LOWEST;
  const float top = simd_max(score);
  const float weight = ratio(score, top);
  const float sum = simd_sum(weight);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) shared[lane] = weight;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int d = tid; d < D; d += THREADS) {
    float mixed = 0.0f;
    for (int j = 0; j < count; j++) {
      if (MASKED && !key_mask[j * mask_at[1]]) continue;
      mixed += shared[j] * float(past_s[j * s_at[1] + d * s_at[2]]);
    }
    partial[d] = mixed;
  }
  if (tid == 0) {
    stats[2 * chunk] = top;
    stats[2 * chunk + 1] = sum;
  }
}

// s = f + gamma (sum over chunks of partial) / (sum over chunks of sums), scaled to one maximum.
// One threadgroup merges 32 columns; simdgroup sg reads every fourth chunk.
template <typename T, typename F, typename Gamma, typename Partial, typename Stats>
METAL_FUNC void feedback_merge(F f, Gamma gamma, Partial partial, Stats stats, device T* s,
                               device float* lse, int chunks, int D, threadgroup float* shared,
                               uint3 tgid, uint tid, uint lane, uint sg) {
  const int d = tgid.x * 32 + lane;
  partial += size_t(tgid.y) * chunks * D;
  stats += size_t(tgid.y) * chunks * 2;
  float chunk_top = LOWEST, chunk_sum = 0.0f;
  for (int c = tid; c < chunks; c += THREADS) chunk_top = max(chunk_top, float(stats[2 * c]));
  const float top = group_max(chunk_top, shared, lane, sg);
  for (int c = tid; c < chunks; c += THREADS) {
    chunk_sum += float(stats[2 * c + 1]) * ratio(float(stats[2 * c]), top);
  }
  const float sum = group_sum(chunk_sum, shared + SIMDGROUPS, lane, sg);
  float mixed = 0.0f;
  if (d < D) {
    for (int c = sg; c < chunks; c += SIMDGROUPS) {
      mixed += float(partial[size_t(c) * D + d]) * ratio(float(stats[2 * c]), top);
    }
  }
  threadgroup float* columns = shared + 2 * SIMDGROUPS;
  columns[sg * 32 + lane] = mixed;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0 && d < D) {
    mixed = columns[lane] + columns[32 + lane] + columns[64 + lane] + columns[96 + lane];
    const float share = sum == 0.0f ? 0.0f : float(gamma[tgid.y]) / sum;
    s[size_t(tgid.y) * D + d] = T(float(f[size_t(tgid.y) * D + d]) + share * mixed);
  }
  if (tgid.x == 0 && tid == 0) lse[tgid.y] = sum == 0.0f ? as_type<float>(INFINITE) : top + log(sum);
}

#ifndef SESSA_FUNCTIONS_ONLY

#define POSITION                                                                               \
  uint3 tgid [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]],       \
      uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]
#define INSTANTIATE(name, function, ...) \
  template [[host_name(name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;
#define FOR_STORAGE(macro, ...) \
  macro(float, __VA_ARGS__) macro(half, __VA_ARGS__) macro(bfloat, __VA_ARGS__)

template <typename T, bool MASKED>
[[kernel]] void weights_kernel(const device float* scores [[buffer(0)]],
                               const device bool* key_mask [[buffer(1)]],
                               const device float* gamma [[buffer(2)]],
                               device T* weights [[buffer(3)]],
                               device float* coupling [[buffer(4)]],
                               device float* lse [[buffer(5)]],
                               constant long* sizes [[buffer(6)]], POSITION) {
  threadgroup float partial[2 * SIMDGROUPS];
  feedback_weights<MASKED, false>(scores, key_mask, gamma, sizes, weights, coupling, lse, partial,
                                  tgid, tid, lane, sg);
}
#define WEIGHTS(T, MASKED) \
  INSTANTIATE("feedback_weights_" #T "_" #MASKED, weights_kernel, T, MASKED)
FOR_STORAGE(WEIGHTS, 0)
FOR_STORAGE(WEIGHTS, 1)

// T is the type of rhs and x, S that of carried, added and scaled.
template <typename T, typename S, bool REVERSED, int CARRIED, bool MASKED>
[[kernel]] void block_kernel(const device T* rhs [[buffer(0)]],
                             const device float* gamma [[buffer(1)]],
                             const device S* carried [[buffer(2)]],
                             const device S* added [[buffer(3)]],
                             const device float* coupling [[buffer(4)]],
                             const device bool* key_mask [[buffer(5)]],
                             device T* x [[buffer(6)]], device S* scaled [[buffer(7)]],
                             constant long* sizes [[buffer(8)]], POSITION) {
  threadgroup float xs[BLOCK_ROWS * X_LD];
  threadgroup float sums[TILE * X_LD];
  threadgroup float tile[TILE * TILE_LD];
  threadgroup int broken[THREADS];
  feedback_block<REVERSED, CARRIED, MASKED>(rhs, gamma, carried, added, coupling, key_mask, sizes,
                                            x, scaled, xs, sums, tile, broken, tgid, tid, sg);
}
#define BLOCK(T, S, REVERSED, CARRIED, MASKED)                                                 \
  INSTANTIATE("feedback_block_" #T "_" #S "_" #REVERSED #CARRIED #MASKED, block_kernel, T, S, \
              REVERSED, CARRIED, MASKED)
#define FORWARD_BLOCKS(T, S) \
  BLOCK(T, S, 0, 0, 0) BLOCK(T, S, 0, 0, 1) BLOCK(T, S, 0, 1, 0) \
  BLOCK(T, S, 0, 1, 1) BLOCK(T, S, 0, 2, 0) BLOCK(T, S, 0, 2, 1)
FORWARD_BLOCKS(float, float)
FORWARD_BLOCKS(half, half)
FORWARD_BLOCKS(bfloat, bfloat)
FORWARD_BLOCKS(float, half)
FORWARD_BLOCKS(float, bfloat)
BLOCK(float, float, 1, 0, 0)
BLOCK(float, half, 1, 0, 0)
BLOCK(float, bfloat, 1, 0, 0)

template <typename T>
[[kernel]] void score_grads_kernel(const device T* weights [[buffer(0)]],
                                   const device float* products [[buffer(1)]],
                                   const device float* gamma [[buffer(2)]],
                                   device T* dscores [[buffer(3)]],
                                   device float* dgamma [[buffer(4)]],
                                   constant long* sizes [[buffer(5)]], POSITION) {
  threadgroup float partial[SIMDGROUPS];
  feedback_score_grads(weights, products, gamma, sizes, dscores, dgamma, partial, tgid, tid, lane,
                       sg);
}
INSTANTIATE("feedback_score_grads_float", score_grads_kernel, float)
INSTANTIATE("feedback_score_grads_half", score_grads_kernel, half)
INSTANTIATE("feedback_score_grads_bfloat", score_grads_kernel, bfloat)

template <typename T, typename S, bool MASKED>
[[kernel]] void step_kernel(const device T* q [[buffer(0)]], const device T* keys [[buffer(1)]],
                            const device S* past_s [[buffer(2)]],
                            const device bool* key_mask [[buffer(3)]],
                            device float* partial [[buffer(4)]], device float* stats [[buffer(5)]],
                            constant long* sizes [[buffer(6)]], POSITION) {
  threadgroup float shared[CHUNK];
  feedback_step<MASKED>(q, keys, past_s, key_mask, sizes + 3, sizes + 6, sizes + 9, sizes + 12,
                        partial, stats, int(sizes[0]), int(sizes[1]), int(sizes[2]), shared, tgid,
                        tid, lane, sg);
}
#define STEP(T, S, MASKED) \
  INSTANTIATE("feedback_step_" #T "_" #S "_" #MASKED, step_kernel, T, S, MASKED)
FOR_STORAGE(STEP, float, 0)
FOR_STORAGE(STEP, float, 1)
STEP(half, half, 0)
STEP(half, half, 1)
STEP(bfloat, bfloat, 0)
STEP(bfloat, bfloat, 1)

template <typename T>
[[kernel]] void merge_kernel(const device T* f [[buffer(0)]],
                             const device float* gamma [[buffer(1)]],
                             const device float* partial [[buffer(2)]],
                             const device float* stats [[buffer(3)]], device T* s [[buffer(4)]],
                             device float* lse [[buffer(5)]], constant long* sizes [[buffer(6)]],
                             POSITION) {
  threadgroup float shared[2 * SIMDGROUPS + THREADS];
  feedback_merge(f, gamma, partial, stats, s, lse, int(sizes[0]), int(sizes[1]), shared, tgid, tid,
                 lane, sg);
}
INSTANTIATE("feedback_merge_float", merge_kernel, float)
INSTANTIATE("feedback_merge_half", merge_kernel, half)
INSTANTIATE("feedback_merge_bfloat", merge_kernel, bfloat)

#endif  // SESSA_FUNCTIONS_ONLY
