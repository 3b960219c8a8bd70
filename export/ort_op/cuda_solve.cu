// The order of the work on a CUDA device. Blocks of rows one after the other: a product gives their
// scores, a kernel the weights, another product what the states before the block add, and a
// substitution the rest. A few rows behind a past read keys and states where they lie, each once.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda_kernels.cuh"
#include "cuda_solve.h"

namespace sessa {
namespace {

// Keys that one part of a past must have at least, to pay for its block of threads.
constexpr int64_t kPartKeys = 32;
// Terms of one part of a sum, when a product has few tiles.
constexpr int64_t kPartDepth = 256;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned blocks(int64_t count, int64_t size) { return static_cast<unsigned>(divide_up(count, size)); }

unsigned whole(int64_t count) { return static_cast<unsigned>(count); }

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("sessa::FeedbackSolve: CUDA says: ") +
                             cudaGetErrorString(error));
  }
}

int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

const float* queries(const Problem& p, const CudaRuntime& runtime) {
  const int64_t count = p.B * p.T * p.K;
  float* scaled = runtime.floats(count);
  const float scale = 1 / std::sqrt(static_cast<float>(p.K));
  SESSA_LAUNCH(convert, blocks(count, kThreads), kThreads, runtime.stream, p.q, count, scale,
               scaled);
  return scaled;
}

// The keys in float32: where they lie, if they are.
const float* keys(const Problem& p, const CudaRuntime& runtime) {
  if (p.k.type == Type::kFloat) return static_cast<const float*>(p.k.data);
  const int64_t count = p.B * p.S() * p.K;
  float* converted = runtime.floats(count);
  SESSA_LAUNCH(convert, blocks(count, kThreads), kThreads, runtime.stream, p.k, count, 1.0f,
               converted);
  return converted;
}

template <bool kTurned>
void product(Matrix a, Matrix b, Matrix out, int64_t rows, int64_t columns, int64_t depth,
             int64_t parts, int64_t B, int64_t spread, const CudaRuntime& runtime) {
  const dim3 grid(blocks(columns, kTile), blocks(rows, kTile), whole(B * parts));
  SESSA_LAUNCH(multiply<kTurned>, grid, kThreads, runtime.stream, a, b, out, rows, columns, depth,
               divide_up(depth, parts), B, spread);
}

void solve_blocks(const Problem& p, const CudaRuntime& runtime) {
  const int64_t S = p.S(), most = std::min<int64_t>(p.T, kBlock);
  float* states = runtime.floats(p.B * S * p.D);
  SESSA_LAUNCH(gather_states, blocks(p.B * S * p.D, kThreads), kThreads, runtime.stream, p, states);
  const Matrix q{const_cast<float*>(queries(p, runtime)), p.T * p.K, p.K};
  const Matrix k{const_cast<float*>(keys(p, runtime)), S * p.K, p.K};
  const Matrix weights{runtime.floats(p.B * most * S), most * S, S};
  const Matrix known{states, S * p.D, p.D};
  float* sums = runtime.floats(divide_up(S, kPartDepth) * p.B * most * p.D);
  for (int64_t start = 0; start < p.T; start += kBlock) {
    const int64_t stop = std::min<int64_t>(p.T, start + kBlock), rows = stop - start;
    const int64_t before = p.P + start, parts = divide_up(before, kPartDepth);
    const int64_t spread = p.B * rows * p.D;
    const Matrix block{q.data + start * p.K, q.batch, q.row};
    product<true>(block, k, weights, rows, p.P + stop, p.K, 1, p.B, 0, runtime);
    SESSA_LAUNCH(weigh, dim3(whole(rows), whole(p.B)), kThreads, runtime.stream, p, start, stop,
                 weights);
    if (before) {
      const Matrix partial{sums, rows * p.D, p.D};
      product<false>(weights, known, partial, rows, p.D, before, parts, p.B, spread, runtime);
    }
    SESSA_LAUNCH(substitute, dim3(blocks(p.D, kStrip), whole(p.B)), kThreads, runtime.stream, p,
                 start, stop, weights, states, sums, parts, spread);
  }
}

template <typename KeyType, typename StateType>
void read_past(const Problem& p, const float* q, Parts parts, const CudaRuntime& runtime) {
  const dim3 grid(whole(parts.count), whole(p.B));
  if (p.T == 1) {
    SESSA_LAUNCH((read_part<KeyType, StateType, 1>), grid, kThreads, runtime.stream, p, q, parts);
  } else {
    SESSA_LAUNCH((read_part<KeyType, StateType, kFewRows>), grid, kThreads, runtime.stream, p, q,
                 parts);
  }
}

template <typename KeyType>
void read_past(const Problem& p, const float* q, Parts parts, const CudaRuntime& runtime) {
  if (p.past_s.type == Type::kFloat) return read_past<KeyType, float>(p, q, parts, runtime);
  if (p.past_s.type == Type::kHalf) return read_past<KeyType, __half>(p, q, parts, runtime);
  return read_past<KeyType, __nv_bfloat16>(p, q, parts, runtime);
}

void solve_rows(const Problem& p, const CudaRuntime& runtime) {
  const float* q = queries(p, runtime);
  Parts parts;
  const int64_t room = std::max<int64_t>(1, 2 * multiprocessors() / p.B);
  parts.length = std::max(kPartKeys, divide_up(p.P, room));
  parts.count = divide_up(p.P, parts.length);
  parts.stats = runtime.floats(p.B * parts.count * p.T * 2);
  parts.reads = runtime.floats(p.B * parts.count * p.T * p.D);
  if (p.k.type == Type::kFloat) {
    read_past<float>(p, q, parts, runtime);
  } else if (p.k.type == Type::kHalf) {
    read_past<__half>(p, q, parts, runtime);
  } else {
    read_past<__nv_bfloat16>(p, q, parts, runtime);
  }
  SESSA_LAUNCH(join_parts, dim3(blocks(p.D, kThreads), whole(p.B)), kThreads, runtime.stream, p, q,
               parts);
}

}  // namespace

void feedback_solve_cuda(const Problem& p, const CudaRuntime& runtime) {
  if (p.P > 0 && p.T <= kFewRows) {
    solve_rows(p, runtime);
  } else {
    solve_blocks(p, runtime);
  }
  check_launch();
}

}  // namespace sessa
