// Runs a bundle's engine.plan with TensorRT's C++ API (10.3 to 11), as a Jetson application would.
//
//     echo "101 2023 2003 102" | run_tensorrt model.bundle
//
// Inputs and outputs are in page-locked memory that is mapped to the GPU. On a Jetson, CPU and GPU share this memory,
// so nothing is copied. A discrete GPU reads it over the bus, which is sufficient for token ids and logits.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <iomanip>
#include <map>
#include <memory>

#include "bundle.h"

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void check(bool succeeded, const std::string& what) {
  if (!succeeded) throw std::runtime_error("TensorRT could not " + what + "; see its messages above");
}

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << "tensorrt: " << message << "\n";
  }
};

struct Stream {
  cudaStream_t handle = nullptr;
  Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "create a stream"); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
};

// Memory that CPU and GPU share, at the address `host` for the CPU and `device` for the GPU.
struct Shared {
  void *host = nullptr, *device = nullptr;
  size_t size = 0;

  Shared() = default;
  Shared(const Shared&) = delete;
  ~Shared() { cudaFreeHost(host); }

  void reserve(size_t bytes) {
    if (bytes <= size) return;
    check(cudaFreeHost(host), "free memory");
    host = nullptr;
    size = 0;
    check(cudaHostAlloc(&host, bytes, cudaHostAllocMapped), "allocate memory");
    check(cudaHostGetDevicePointer(&device, host, 0), "map memory");
    size = bytes;
  }
};

// Verifies that the plan was built by this TensorRT release for this GPU, before TensorRT reads it.
void check_engine(const Bundle& bundle) {
  const json::Value& engine = bundle.manifest["engine"];
  const std::string rebuild = "; rebuild it: fedspine-edge compile " + bundle.folder + " --out " + bundle.folder;
  if (engine.is_null()) throw std::runtime_error("the bundle has no engine" + rebuild);
  if (engine["backend"].string() != "tensorrt")
    throw std::runtime_error("the engine is for " + engine["backend"].string() + ", not TensorRT" + rebuild);
  int major = 0, minor = 0, patch = 0;
  std::sscanf(engine["version"].string().c_str(), "%d.%d.%d", &major, &minor, &patch);
  if (major * 10000 + minor * 100 + patch != getInferLibVersion())
    throw std::runtime_error("the engine was built by TensorRT " + engine["version"].string() +
                             "; the library has version " + std::to_string(getInferLibVersion()) + rebuild);
  int sm_major = 0, sm_minor = 0;
  check(cudaDeviceGetAttribute(&sm_major, cudaDevAttrComputeCapabilityMajor, 0), "query the GPU");
  check(cudaDeviceGetAttribute(&sm_minor, cudaDevAttrComputeCapabilityMinor, 0), "query the GPU");
  const std::string sm = std::to_string(sm_major) + std::to_string(sm_minor);
  for (const json::Value& known : engine["compute_capabilities"].array())
    if (known.string() == sm) return;
  throw std::runtime_error("the engine was not built for this GPU, SM " + sm + rebuild);
}

nvinfer1::Dims dims(const std::vector<int64_t>& shape) {
  nvinfer1::Dims result{};
  result.nbDims = static_cast<int32_t>(shape.size());
  for (size_t axis = 0; axis < shape.size(); ++axis) result.d[axis] = shape[axis];
  return result;
}

class Model {
 public:
  explicit Model(const Bundle& bundle) : bundle_(bundle) {
    const std::string plan = Bundle::read(bundle.folder + "/engine.plan");
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    check(runtime_ != nullptr, "start");
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    check(engine_ != nullptr, "read the plan");
    context_.reset(engine_->createExecutionContext());
    check(context_ != nullptr, "create a context");
  }

  std::vector<float> run(const std::vector<int64_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
    select_profile(tokens);
    for (const Tensor& input : bundle_.inputs) {
      const std::vector<int64_t> values = Bundle::values(input, ids);
      Shared& memory = memory_[input.name];
      memory.reserve(values.size() * sizeof(int64_t));
      std::copy(values.begin(), values.end(), static_cast<int64_t*>(memory.host));
      check(context_->setInputShape(input.name.c_str(), dims(input.sized(1, tokens))),
            "set the shape of " + input.name);
      check(context_->setTensorAddress(input.name.c_str(), memory.device), "set the address of " + input.name);
    }
    const Tensor& output = bundle_.outputs.front();
    const int64_t count = elements(output.sized(1, tokens));
    Shared& logits = memory_[output.name];
    logits.reserve(static_cast<size_t>(count) * sizeof(float));
    check(context_->setTensorAddress(output.name.c_str(), logits.device), "set the address of " + output.name);
    check(context_->enqueueV3(stream_.handle), "start the engine");
    check(cudaStreamSynchronize(stream_.handle), "run the engine");
    const auto* first = static_cast<const float*>(logits.host);
    return {first, first + count};
  }

 private:
  // Selects the first profile that covers one sequence of this length.
  void select_profile(int64_t tokens) {
    const auto& profiles = bundle_.manifest["engine"]["profiles"].array();
    for (size_t index = 0; index < profiles.size(); ++index) {
      const auto& batch = profiles[index]["batch"].array();
      const auto& length = profiles[index]["tokens"].array();
      if (batch[0].number() > 1 || tokens < length[0].number() || tokens > length[2].number()) continue;
      if (static_cast<int>(index) == profile_) return;
      profile_ = static_cast<int>(index);
      check(context_->setOptimizationProfileAsync(profile_, stream_.handle), "select a profile");
      check(cudaStreamSynchronize(stream_.handle), "select a profile");
      return;
    }
    throw std::runtime_error("the engine has no profile for one sequence of " + std::to_string(tokens) + " tokens");
  }

  const Bundle& bundle_;
  Logger logger_;  // destroyed last, because TensorRT's objects point to it
  Stream stream_;
  std::map<std::string, Shared> memory_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  int profile_ = -1;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: " << argv[0] << " BUNDLE < lines of token ids\n";
    return 2;
  }
  try {
    const Bundle bundle(argv[1]);
    check_engine(bundle);
    Model model(bundle);
    std::cout << std::setprecision(9);
    for_each_line(bundle, [&](const std::vector<int64_t>& ids) { return model.run(ids); });
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
