// The part of ONNX Runtime's C interface that the operator uses: its own header where there is one,
// else the declarations below. The interface is binary and append-only, so an entry's place never
// changes; the library asks for version 17 of it whichever header it was built with, and so loads
// in every later runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else

#define ORT_API_CALL

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16
};
enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtCustomOp;
using OrtStatusPtr = OrtStatus*;

// The number in a gap's name is the index of its first entry.
struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode, const char* message);
  void* gap_1[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain**);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);
  void* gap_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);
  void* gap_52[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t* dimensions, size_t count);
  void* gap_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
  void* gap_66[3];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);
  void* gap_70[5];
  OrtStatus* (*AllocatorAlloc)(OrtAllocator*, size_t bytes, void**);
  OrtStatus* (*AllocatorFree)(OrtAllocator*, void*);
  void* gap_77[11];
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext*, size_t*);
  void* gap_89;
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t index, const OrtValue**);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t index, const int64_t* dimensions,
                                        size_t count, OrtValue**);
  void* gap_92;
  void (*ReleaseStatus)(OrtStatus*);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
  void* gap_95[4];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
  void* gap_100[32];
  void (*ReleaseAllocator)(OrtAllocator*);
  void* gap_133[60];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext*, void** stream);
  OrtStatus* (*GetTensorMemoryInfo)(const OrtValue*, const OrtMemoryInfo**);
  void* gap_195[58];
  OrtStatus* (*KernelContext_GetAllocator)(const OrtKernelContext*, const OrtMemoryInfo*,
                                           OrtAllocator**);
  void* gap_254[20];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*task)(void*, size_t),
                                          size_t count, size_t batches, void* argument);
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatusPtr (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatusPtr (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatusPtr (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

#endif

// These hold for the declarations above and are checked against the real header where it is found.
#define SESSA_PLACE(STRUCT, MEMBER, INDEX)                              \
  static_assert(offsetof(STRUCT, MEMBER) == (INDEX) * sizeof(void*),    \
                #STRUCT "::" #MEMBER " is not where the interface has it")
SESSA_PLACE(OrtApi, CreateStatus, 0);
SESSA_PLACE(OrtApi, CreateCustomOpDomain, 26);
SESSA_PLACE(OrtApi, CustomOpDomain_Add, 27);
SESSA_PLACE(OrtApi, AddCustomOpDomain, 28);
SESSA_PLACE(OrtApi, GetTensorMutableData, 51);
SESSA_PLACE(OrtApi, GetTensorElementType, 60);
SESSA_PLACE(OrtApi, GetDimensionsCount, 61);
SESSA_PLACE(OrtApi, GetDimensions, 62);
SESSA_PLACE(OrtApi, GetTensorTypeAndShape, 65);
SESSA_PLACE(OrtApi, CreateCpuMemoryInfo, 69);
SESSA_PLACE(OrtApi, AllocatorAlloc, 75);
SESSA_PLACE(OrtApi, AllocatorFree, 76);
SESSA_PLACE(OrtApi, KernelContext_GetInputCount, 88);
SESSA_PLACE(OrtApi, KernelContext_GetInput, 90);
SESSA_PLACE(OrtApi, KernelContext_GetOutput, 91);
SESSA_PLACE(OrtApi, ReleaseStatus, 93);
SESSA_PLACE(OrtApi, ReleaseMemoryInfo, 94);
SESSA_PLACE(OrtApi, ReleaseTensorTypeAndShapeInfo, 99);
SESSA_PLACE(OrtApi, ReleaseAllocator, 132);
SESSA_PLACE(OrtApi, KernelContext_GetGPUComputeStream, 193);
SESSA_PLACE(OrtApi, GetTensorMemoryInfo, 194);
SESSA_PLACE(OrtApi, KernelContext_GetAllocator, 253);
SESSA_PLACE(OrtApi, KernelContext_ParallelFor, 274);
SESSA_PLACE(OrtCustomOp, version, 0);
SESSA_PLACE(OrtCustomOp, CreateKernel, 1);
SESSA_PLACE(OrtCustomOp, GetName, 2);
SESSA_PLACE(OrtCustomOp, GetExecutionProviderType, 3);
SESSA_PLACE(OrtCustomOp, GetInputType, 4);
SESSA_PLACE(OrtCustomOp, GetInputTypeCount, 5);
SESSA_PLACE(OrtCustomOp, GetOutputType, 6);
SESSA_PLACE(OrtCustomOp, GetOutputTypeCount, 7);
SESSA_PLACE(OrtCustomOp, KernelCompute, 8);
SESSA_PLACE(OrtCustomOp, KernelDestroy, 9);
SESSA_PLACE(OrtCustomOp, GetInputCharacteristic, 10);
SESSA_PLACE(OrtCustomOp, GetOutputCharacteristic, 11);
SESSA_PLACE(OrtCustomOp, GetInputMemoryType, 12);
SESSA_PLACE(OrtCustomOp, GetVariadicInputMinArity, 13);
SESSA_PLACE(OrtCustomOp, GetVariadicInputHomogeneity, 14);
SESSA_PLACE(OrtCustomOp, GetVariadicOutputMinArity, 15);
SESSA_PLACE(OrtCustomOp, GetVariadicOutputHomogeneity, 16);
SESSA_PLACE(OrtCustomOp, CreateKernelV2, 17);
SESSA_PLACE(OrtCustomOp, KernelComputeV2, 18);
SESSA_PLACE(OrtCustomOp, InferOutputShapeFn, 19);
SESSA_PLACE(OrtCustomOp, GetStartVersion, 20);
SESSA_PLACE(OrtCustomOp, GetEndVersion, 21);
SESSA_PLACE(OrtCustomOp, GetMayInplace, 22);
SESSA_PLACE(OrtCustomOp, ReleaseMayInplace, 23);
SESSA_PLACE(OrtCustomOp, GetAliasMap, 24);
SESSA_PLACE(OrtCustomOp, ReleaseAliasMap, 25);
#undef SESSA_PLACE
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL == 9 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == 10 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == 16);
static_assert(ORT_INVALID_ARGUMENT == 2 && INPUT_OUTPUT_OPTIONAL == 1 && OrtArenaAllocator == 1);
