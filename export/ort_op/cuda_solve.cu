// The order of the work on a CUDA device. A panel of rows at a time, all of them where memory allows:
// a product gives their scores, a kernel the weights, another product what the states before the
// panel add. Then block after block: a substitution solves it, and a product adds it to all later
// rows of the panel. A few rows behind a past read keys and states where they lie, each once.
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
// Least number of terms of one part of a sum, when a product has few tiles.
constexpr int64_t kPartDepth = 256;
// Weights that are held at once, at most, where this leaves a block of rows.
constexpr int64_t kPanelFloats = int64_t{1} << 26;

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

// A tensor in float32: where it lies, if it is.
const float* in_float(Tensor x, int64_t count, const CudaRuntime& runtime) {
  if (x.type == Type::kFloat) return static_cast<const float*>(x.data);
  float* converted = runtime.floats(count);
  SESSA_LAUNCH(convert, blocks(count, kThreads), kThreads, runtime.stream, x, count, converted);
  return converted;
}

Queries queries(const Problem& p, const CudaRuntime& runtime) {
  return {in_float(p.q, p.B * p.T * p.K, runtime), 1 / std::sqrt(static_cast<float>(p.K))};
}

int64_t tiles(int64_t rows, int64_t columns) {
  return divide_up(rows, kTile) * divide_up(columns, kTile);
}

template <bool kTurned, bool kAdd>
void product(Matrix a, Matrix b, Matrix out, const Sizes& sizes, const CudaRuntime& runtime) {
  const int64_t parts = divide_up(sizes.depth, sizes.part_depth);
  const dim3 grid(blocks(sizes.columns, kTile), blocks(sizes.rows, kTile), whole(sizes.B * parts));
  SESSA_LAUNCH((multiply<kTurned, kAdd>), grid, kThreads, runtime.stream, a, b, out, sizes);
}

// Adds to `rows` rows of states from `first` on what all states before them add, with the weights
// of the first of these rows in `weights`.
void read_before(const Problem& p, Matrix weights, Matrix known, int64_t first, int64_t rows,
                 const CudaRuntime& runtime) {
  const Matrix out{known.data + first * known.row, known.batch, known.row};
  const int64_t room = 2 * multiprocessors() / (p.B * tiles(rows, p.D));
  const int64_t depth = std::max(kPartDepth, divide_up(first, std::max<int64_t>(1, room)));
  const int64_t parts = divide_up(first, depth), spread = p.B * rows * p.D;
  const Sizes sizes{p.B, rows, p.D, first, p.D, depth, spread};
  if (parts == 1) return product<false, true>(weights, known, out, sizes, runtime);
  float* sums = runtime.floats(parts * spread);
  product<false, false>(weights, known, {sums, rows * p.D, p.D}, sizes, runtime);
  SESSA_LAUNCH(add_parts, blocks(spread, kThreads), kThreads, runtime.stream, p, first, rows,
               known.data, sums, parts, spread);
}

// Rows [start, stop), whose weights are in `weights`, block after block.
void solve_panel(const Problem& p, Matrix weights, Matrix known, int64_t start, int64_t stop,
                 const CudaRuntime& runtime) {
  for (int64_t first = start; first < stop; first += kBlock) {
    const int64_t last = std::min<int64_t>(stop, first + kBlock), later = stop - last;
    const Matrix own{weights.data + (first - start) * weights.row + p.P + first, weights.batch,
                     weights.row};
    SESSA_LAUNCH(substitute, dim3(blocks(p.D, kStrip), whole(p.B)), kStripThreads, runtime.stream, p,
                 first, last, own, known.data);
    if (!later) break;
    const Matrix seen{own.data + kBlock * own.row, own.batch, own.row};
    const Matrix solved{known.data + (p.P + first) * known.row, known.batch, known.row};
    const Matrix out{known.data + (p.P + last) * known.row, known.batch, known.row};
    const Sizes sizes{p.B, later, p.D, kBlock, p.D, kBlock, 0};
    product<false, true>(seen, solved, out, sizes, runtime);
  }
}

void solve_blocks(const Problem& p, const CudaRuntime& runtime) {
  const int64_t S = p.S(), fit = kPanelFloats / (p.B * S) / kBlock * kBlock;
  const int64_t most = std::min<int64_t>(p.T, std::max<int64_t>(kBlock, fit));
  float* states = runtime.floats(p.B * S * p.D);
  SESSA_LAUNCH(gather_states, blocks(p.B * S * p.D, kThreads), kThreads, runtime.stream, p, states);
  const Queries q = queries(p, runtime);
  const Matrix k{const_cast<float*>(in_float(p.k, p.B * S * p.K, runtime)), S * p.K, p.K};
  const Matrix weights{runtime.floats(p.B * most * S), most * S, S};
  const Matrix known{states, S * p.D, p.D};
  for (int64_t start = 0; start < p.T; start += most) {
    const int64_t stop = std::min<int64_t>(p.T, start + most), rows = stop - start;
    const Matrix panel{const_cast<float*>(q.data) + start * p.K, p.T * p.K, p.K};
    const Sizes sizes{p.B, rows, p.P + stop, p.K, p.P + start, p.K, 0};
    product<true, false>(panel, k, weights, sizes, runtime);
    SESSA_LAUNCH(weigh, dim3(whole(rows), whole(p.B)), kThreads, runtime.stream, p, start, q.scale,
                 weights);
    if (p.P + start) read_before(p, weights, known, p.P + start, rows, runtime);
    solve_panel(p, weights, known, start, stop, runtime);
  }
}

template <typename KeyType, typename StateType>
void read_past(const Problem& p, Queries q, Parts parts, const CudaRuntime& runtime) {
  const dim3 grid(whole(parts.count), whole(p.B));
  if (p.T == 1) {
    SESSA_LAUNCH((read_part<KeyType, StateType, 1>), grid, kThreads, runtime.stream, p, q, parts);
  } else {
    SESSA_LAUNCH((read_part<KeyType, StateType, kFewRows>), grid, kThreads, runtime.stream, p, q,
                 parts);
  }
}

template <typename KeyType>
void read_past(const Problem& p, Queries q, Parts parts, const CudaRuntime& runtime) {
  if (p.past_s.type == Type::kFloat) return read_past<KeyType, float>(p, q, parts, runtime);
  if (p.past_s.type == Type::kHalf) return read_past<KeyType, __half>(p, q, parts, runtime);
  return read_past<KeyType, __nv_bfloat16>(p, q, parts, runtime);
}

void solve_rows(const Problem& p, const CudaRuntime& runtime) {
  const Queries q = queries(p, runtime);
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
