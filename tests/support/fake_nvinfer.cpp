// Fake TensorRT and CUDA runtime for examples/cpp/tensorrt.cpp. They implement declarations/ and verify that the
// program makes the right calls in the right order. The fake engine returns three logits: the sum of the ids, the sum
// of the mask, and the selected profile. Work is deferred until the stream is synchronized. FAKE_* variables inject
// failures.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

std::vector<std::function<void()>> waiting;
nvinfer1::ILogger* logger = nullptr;
int selected = -1;
std::map<std::string, std::pair<nvinfer1::Dims, const int64_t*>> inputs;
float* logits = nullptr;
constexpr size_t kDeviceOffset = size_t{1} << 44;  // device addresses are not host addresses

template <typename T>
T* host_of(void* device) {
  return reinterpret_cast<T*>(reinterpret_cast<size_t>(device) - kDeviceOffset);
}

}  // namespace

extern "C" {

const char* cudaGetErrorString(cudaError_t) {
  return "no CUDA-capable device is detected";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 7;
  return std::getenv("FAKE_NO_DEVICE") ? cudaError_t(100) : cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(7);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  for (auto& work : waiting) work();
  waiting.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** host, size_t size, unsigned flags) {
  *host = flags == cudaHostAllocMapped ? std::malloc(size) : nullptr;
  return *host ? cudaSuccess : cudaError_t(2);
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = reinterpret_cast<void*>(reinterpret_cast<size_t>(host) + kDeviceOffset);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* host) {
  std::free(host);
  return cudaSuccess;
}

int32_t getInferLibVersion() noexcept {
  return 100300;
}

}  // extern "C"

namespace nvinfer1 {

IRuntime* createInferRuntime(ILogger& given) noexcept {
  logger = &given;
  return new IRuntime;
}

ICudaEngine* IRuntime::deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
  if (std::string(static_cast<const char*>(blob), size) == "plan") return new ICudaEngine;
  logger->log(ILogger::Severity::kERROR, "magic tag does not match");
  return nullptr;
}

IExecutionContext* ICudaEngine::createExecutionContext() noexcept {
  return new IExecutionContext;
}

bool IExecutionContext::setOptimizationProfileAsync(int32_t profile, CUstream_st*) noexcept {
  waiting.push_back([profile] { selected = profile; });
  inputs.clear();
  return true;
}

bool IExecutionContext::setInputShape(char const* name, Dims const& dims) noexcept {
  inputs[name].first = dims;
  return dims.nbDims == 2 && dims.d[0] == 1;
}

bool IExecutionContext::setTensorAddress(char const* name, void* data) noexcept {
  if (std::string(name) == "logits")
    logits = host_of<float>(data);
  else
    inputs[name].second = host_of<int64_t>(data);
  return true;
}

bool IExecutionContext::enqueueV3(CUstream_st*) noexcept {
  if (inputs.size() != 3 || logits == nullptr || selected < 0 || std::getenv("FAKE_REFUSE")) {
    logger->log(ILogger::Severity::kERROR, "execution was refused");
    return false;
  }
  waiting.push_back([] {
    const auto sum = [](const char* name) {
      const auto& [dims, values] = inputs.at(name);
      int64_t total = 0;
      for (int64_t index = 0; index < dims.d[1]; ++index) total += values[index];
      return static_cast<float>(total);
    };
    logits[0] = sum("input_ids");
    logits[1] = sum("attention_mask");
    logits[2] = static_cast<float>(selected) + sum("token_type_ids");
  });
  return true;
}

}  // namespace nvinfer1
