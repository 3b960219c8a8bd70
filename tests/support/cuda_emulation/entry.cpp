// One call of the solve for Python: the tensors lie in the processor's memory.
#include "cuda_solve.cu"

extern "C" const char* solve_emulated(const int64_t* sizes, const void* const* tensors,
                                      const int32_t* types, const uint8_t* key_mask, void* s) {
  using namespace sessa;
  Problem p;
  p.B = sizes[0], p.T = sizes[1], p.P = sizes[2], p.D = sizes[3], p.K = sizes[4];
  Tensor* const given[] = {&p.f, &p.q, &p.k, &p.gamma, &p.past_s};
  for (int i = 0; i < 5; ++i) *given[i] = {tensors[i], static_cast<Type>(types[i])};
  p.key_mask = key_mask, p.s = s;
  std::vector<std::vector<float>> memory;
  CudaRuntime runtime;
  runtime.stream = nullptr;
  runtime.floats = [&](int64_t count) {
    memory.emplace_back(static_cast<size_t>(count), NAN);  // nothing may rely on zeros
    return memory.back().data();
  };
  feedback_solve_cuda(p, runtime);
  return "";
}
