// sessa::FeedbackSolve as a custom operator of ONNX Runtime's CPU provider and, where it is built
// with SESSA_CUDA, of its CUDA provider too: reads and checks the inputs, lends the solver the
// runtime's threads or stream, and memory.
#include <array>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "solve.h"
#if defined(SESSA_CUDA)
#include "cuda_solve.h"
#endif

namespace sessa {
namespace {

constexpr uint32_t kApiVersion = 17;
constexpr size_t kInputs = 6, kRequired = 4, kMask = 5;
const char* const kNames[kInputs] = {"f", "q", "k", "gamma", "past_s", "key_mask"};

// Carries a status of the runtime through C++ code.
struct Failure {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw Failure{status};
}

struct Kernel {
  const OrtApi* api;
  OrtMemoryInfo* memory;
};

struct Input {
  const void* data = nullptr;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape;
  bool given = false;
};

using Inputs = std::array<Input, kInputs>;

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

[[noreturn]] void refuse(size_t index, const std::string& what) {
  throw std::invalid_argument(std::string("sessa::FeedbackSolve: input ") + kNames[index] + " " +
                              what);
}

Input read_input(const OrtApi& api, const OrtKernelContext* context, size_t index) {
  Input input;
  const OrtValue* value = nullptr;
  check(api.KernelContext_GetInput(context, index, &value));
  if (!value) return input;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = api.GetTensorElementType(info, &input.type);
  if (!status) status = api.GetDimensionsCount(info, &rank);
  input.shape.resize(rank);
  if (!status) status = api.GetDimensions(info, input.shape.data(), rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  void* data = nullptr;
  check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  input.data = data, input.given = true;
  return input;
}

void check_type(const Inputs& inputs, size_t index) {
  const int type = inputs[index].type;
  const bool real = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ||
                    type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ||
                    type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  if (index == kMask ? type != ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : !real) {
    refuse(index, "has ONNX element type " + std::to_string(type) + ", expected " +
                      (index == kMask ? "bool (9)" : "float (1), float16 (10) or bfloat16 (16)"));
  }
}

void check_shape(const Inputs& inputs, size_t index, const std::vector<int64_t>& expected) {
  if (inputs[index].shape != expected) {
    refuse(index, "has shape " + describe(inputs[index].shape) + ", expected " +
                      describe(expected));
  }
}

Tensor tensor(const Input& input) { return {input.data, static_cast<Type>(input.type)}; }

// The problem that the inputs describe, without its output. Throws std::invalid_argument.
Problem check_inputs(const Inputs& inputs) {
  for (size_t i = 0; i < kInputs; ++i) {
    if (!inputs[i].given && i < kRequired) refuse(i, "is missing");
    if (inputs[i].given) check_type(inputs, i);
  }
  if (inputs[1].type != inputs[2].type) refuse(2, "has another element type than q");
  for (size_t i = 0; i < 3; ++i) {
    const std::vector<int64_t>& shape = inputs[i].shape;
    if (shape.size() != 3) {
      refuse(i, "has shape " + describe(shape) + ", expected three dimensions");
    }
    for (int64_t size : shape) {
      if (size < 1) refuse(i, "has shape " + describe(shape) + ", expected no empty dimension");
    }
  }
  Problem p;
  p.B = inputs[0].shape[0], p.T = inputs[0].shape[1], p.D = inputs[0].shape[2];
  p.K = inputs[1].shape[2], p.P = inputs[2].shape[1] - p.T;
  check_shape(inputs, 1, {p.B, p.T, p.K});
  if (p.P < 0) {
    refuse(2, "has shape " + describe(inputs[2].shape) + ", expected at least the " +
                  std::to_string(p.T) + " rows of f");
  }
  check_shape(inputs, 2, {p.B, p.P + p.T, p.K});
  check_shape(inputs, 3, {p.B, p.T});
  if (inputs[4].given) check_shape(inputs, 4, {p.B, p.P, p.D});
  if (!inputs[4].given && p.P > 0) {
    refuse(4, "is missing, expected shape " + describe({p.B, p.P, p.D}) + " because k has " +
                  std::to_string(p.P) + " more rows than f");
  }
  if (inputs[5].given) check_shape(inputs, 5, {p.B, p.P + p.T});
  p.f = tensor(inputs[0]), p.q = tensor(inputs[1]), p.k = tensor(inputs[2]);
  p.gamma = tensor(inputs[3]), p.past_s = tensor(inputs[4]);
  p.key_mask = static_cast<const uint8_t*>(inputs[5].data);
  return p;
}

// Memory of the runtime's arena, given back together.
class Memory {
 public:
  Memory(const OrtApi& api, const OrtMemoryInfo* memory, const OrtKernelContext* context)
      : api_(api) {
    check(api_.KernelContext_GetAllocator(context, memory, &allocator_));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* block : blocks_) drop(api_.AllocatorFree(allocator_, block));
    api_.ReleaseAllocator(allocator_);
  }

  float* floats(int64_t count) {
    blocks_.reserve(blocks_.size() + 1);
    void* block = nullptr;
    check(api_.AllocatorAlloc(allocator_, static_cast<size_t>(count) * sizeof(float), &block));
    blocks_.push_back(block);
    return static_cast<float*>(block);
  }

 private:
  void drop(OrtStatus* status) {
    if (status) api_.ReleaseStatus(status);
  }

  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> blocks_;
};

void parallel_for(const OrtApi& api, const OrtKernelContext* context, int64_t count,
                  const std::function<void(int64_t)>& task) {
  using Task = std::function<void(int64_t)>;
  if (count == 1) return task(0);
  auto call = [](void* argument, size_t i) {
    (*static_cast<const Task*>(argument))(static_cast<int64_t>(i));
  };
  const size_t size = static_cast<size_t>(count);
  // As many batches as tasks, so that a free thread takes the next task.
  check(api.KernelContext_ParallelFor(context, call, size, size, const_cast<Task*>(&task)));
}

// The problem of one call with its output, which `output` receives.
Problem read_problem(const OrtApi& api, OrtKernelContext* context, OrtValue** output) {
  size_t count = 0;
  check(api.KernelContext_GetInputCount(context, &count));
  Inputs inputs;
  for (size_t i = 0; i < kInputs && i < count; ++i) inputs[i] = read_input(api, context, i);
  Problem p = check_inputs(inputs);
  const std::vector<int64_t>& shape = inputs[0].shape;
  check(api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), output));
  check(api.GetTensorMutableData(*output, &p.s));
  return p;
}

void compute(const Kernel& kernel, OrtKernelContext* context) {
  const OrtApi& api = *kernel.api;
  OrtValue* output = nullptr;
  const Problem p = read_problem(api, context, &output);
  Memory memory(api, kernel.memory, context);
  Runtime runtime;
  runtime.floats = [&](int64_t size) { return memory.floats(size); };
  runtime.parallel_for = [&](int64_t size, const std::function<void(int64_t)>& task) {
    parallel_for(api, context, size, task);
  };
  feedback_solve(p, runtime);
}

#if defined(SESSA_CUDA)
// The memory is given back before the kernels have run. The next owner's work follows them on the
// same stream.
void compute_on_cuda(const Kernel& kernel, OrtKernelContext* context) {
  const OrtApi& api = *kernel.api;
  OrtValue* output = nullptr;
  const Problem p = read_problem(api, context, &output);
  const OrtMemoryInfo* device = nullptr;
  check(api.GetTensorMemoryInfo(output, &device));
  Memory memory(api, device, context);
  CudaRuntime runtime;
  check(api.KernelContext_GetGPUComputeStream(context, &runtime.stream));
  runtime.floats = [&](int64_t size) { return memory.floats(size); };
  feedback_solve_cuda(p, runtime);
}
#endif

// Runs C++ code for the C interface: what it throws becomes a status.
template <class Body>
OrtStatus* guarded(const OrtApi& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::invalid_argument& error) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

// One operator per type of f and s. The types of q, k, gamma and past_s are free of it, which the
// interface can only say as "any type", so they are checked at run time.
struct Operator : OrtCustomOp {
  ONNXTensorElementDataType type;
};

ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  if (index == 0) return static_cast<const Operator*>(op)->type;
  return index == kMask ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL
                        : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

OrtStatus* create_kernel(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo*,
                         void** out) noexcept {
  return guarded(*api, [&] {
    OrtMemoryInfo* memory = nullptr;
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    *out = new Kernel{api, memory};
  });
}

void destroy_kernel(void* pointer) noexcept {
  Kernel* kernel = static_cast<Kernel*>(pointer);
  kernel->api->ReleaseMemoryInfo(kernel->memory);
  delete kernel;
}

template <void (*kCompute)(const Kernel&, OrtKernelContext*)>
OrtStatusPtr run(void* kernel, OrtKernelContext* context) noexcept {
  const Kernel& self = *static_cast<const Kernel*>(kernel);
  return guarded(*self.api, [&] { kCompute(self, context); });
}

Operator make_operator(ONNXTensorElementDataType type) {
  Operator op{};
  op.type = type;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "FeedbackSolve"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return input_type(self, 0); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.KernelDestroy = destroy_kernel;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index < kRequired ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = run<compute>;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

#if defined(SESSA_CUDA)
Operator make_cuda_operator(ONNXTensorElementDataType type) {
  Operator op = make_operator(type);
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
  op.KernelComputeV2 = run<compute_on_cuda>;
  return op;
}
#endif

std::vector<Operator> make_operators() {
  std::vector<Operator> made;
  for (ONNXTensorElementDataType type :
       {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
    made.push_back(make_operator(type));
#if defined(SESSA_CUDA)
    made.push_back(make_cuda_operator(type));
#endif
  }
  return made;
}

// The domain must outlive every session that uses it, and two runtimes in one process cannot share
// one, so each runtime gets a domain that is made once and kept.
OrtCustomOpDomain* domain(const OrtApi& api) {
  static const std::vector<Operator> operators = make_operators();
  static std::mutex mutex;
  static std::map<const OrtApi*, OrtCustomOpDomain*> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& found = domains[&api];
  if (!found) {
    OrtCustomOpDomain* made = nullptr;
    check(api.CreateCustomOpDomain("sessa", &made));
    for (const Operator& op : operators) check(api.CustomOpDomain_Add(made, &op));
    found = made;
  }
  return found;
}

}  // namespace
}  // namespace sessa

#if defined(_WIN32)
#define SESSA_EXPORT extern "C" __declspec(dllexport)
#else
#define SESSA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The entry point that ONNX Runtime looks for in a library of custom operators.
SESSA_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                       const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(sessa::kApiVersion);
  if (!api) {
    const char* needed = "sessa::FeedbackSolve needs ONNX Runtime 1.17 or later";
    return base->GetApi(1)->CreateStatus(ORT_FAIL, needed);
  }
  return sessa::guarded(*api, [&] {
    sessa::check(api->AddCustomOpDomain(options, sessa::domain(*api)));
  });
}

// Name of the instruction set in use, and the choice of another for tests: false when the processor
// does not have it.
SESSA_EXPORT const char* SessaInstructionSet() { return sessa::kernels().name; }
SESSA_EXPORT bool SessaUseInstructionSet(const char* name) { return sessa::use_kernels(name); }

// Whether the library also has the operator of the CUDA provider.
SESSA_EXPORT bool SessaHasCuda() {
#if defined(SESSA_CUDA)
  return true;
#else
  return false;
#endif
}
