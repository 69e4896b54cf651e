// Runs a bundle's model.onnx with ONNX Runtime's C API, with the same results as Session.load(bundle, "onnxruntime") in
// Python.
//
//     echo "101 2023 2003 102" | run_onnxruntime model.bundle

#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <functional>
#include <iomanip>
#include <memory>

#include "bundle.h"

namespace {

const OrtApi* api = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error("ONNX Runtime: " + message);
}

template <typename T>
using Owned = std::unique_ptr<T, std::function<void(T*)>>;

class Model {
 public:
  explicit Model(const Bundle& bundle) : bundle_(bundle) {
    OrtEnv* env = nullptr;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "example", &env));
    env_ = {env, api->ReleaseEnv};
    OrtSessionOptions* options = nullptr;
    check(api->CreateSessionOptions(&options));
    Owned<OrtSessionOptions> owned(options, api->ReleaseSessionOptions);
    if (const char* threads = std::getenv("OMP_NUM_THREADS"))
      check(api->SetIntraOpNumThreads(options, std::atoi(threads)));
    OrtSession* session = nullptr;
    check(api->CreateSession(env, (bundle.folder + "/model.onnx").c_str(), options, &session));
    session_ = {session, api->ReleaseSession};
    OrtMemoryInfo* memory = nullptr;
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    memory_ = {memory, api->ReleaseMemoryInfo};
  }

  std::vector<float> run(const std::vector<int64_t>& ids) const {
    std::vector<std::vector<int64_t>> data;  // must outlive the values, which point into it
    std::vector<Owned<OrtValue>> owned;
    std::vector<const OrtValue*> values;
    std::vector<const char*> names;
    for (const Tensor& input : bundle_.inputs) {
      const auto shape = input.sized(1, static_cast<int64_t>(ids.size()));
      data.push_back(Bundle::values(input, ids));
      OrtValue* value = nullptr;
      check(api->CreateTensorWithDataAsOrtValue(memory_.get(), data.back().data(), data.back().size() * sizeof(int64_t),
                                                shape.data(), shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
                                                &value));
      owned.emplace_back(value, api->ReleaseValue);
      values.push_back(value);
      names.push_back(input.name.c_str());
    }
    const Tensor& output = bundle_.outputs.front();
    const char* output_name = output.name.c_str();
    OrtValue* result = nullptr;
    check(api->Run(session_.get(), nullptr, names.data(), values.data(), values.size(), &output_name, 1, &result));
    Owned<OrtValue> held(result, api->ReleaseValue);
    void* logits = nullptr;
    check(api->GetTensorMutableData(result, &logits));
    const auto* first = static_cast<const float*>(logits);
    return {first, first + elements(output.sized(1, static_cast<int64_t>(ids.size())))};
  }

 private:
  const Bundle& bundle_;
  Owned<OrtEnv> env_;  // freed last
  Owned<OrtSession> session_;
  Owned<OrtMemoryInfo> memory_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: " << argv[0] << " BUNDLE < lines of token ids\n";
    return 2;
  }
  try {
    api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr) throw std::runtime_error("the ONNX Runtime library is older than its header");
    const Bundle bundle(argv[1]);
    const Model model(bundle);
    std::cout << std::setprecision(9);
    for_each_line(bundle, [&](const std::vector<int64_t>& ids) { return model.run(ids); });
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
