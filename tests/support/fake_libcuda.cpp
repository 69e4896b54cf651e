// A fake CUDA driver for tests of resource lifetimes. It is loaded as libcuda.so.1, so that the real Python packages
// and ctypes calls use it. Device memory is host memory behind invalid addresses, so that host access crashes as on a
// GPU. Work is queued on its stream until the stream is synchronized, which exposes results that are read too early and
// inputs that are overwritten too early. Calls are counted, and misuse returns the driver's error codes.
//
// Tests use the `fake_*` functions at the end: configuration, counters, and the interface for a fake TensorRT.

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if __has_include(<cuda.h>) && defined(CHECK_AGAINST_TOOLKIT)
#include <cuda.h>  // so that wrong signatures do not compile
#else
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;
using CUdevice_attribute = int;
using CUstreamCaptureMode = int;
using cuuint64_t = uint64_t;
using CUdriverProcAddressQueryResult = int;
#endif

namespace {

enum : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  ILLEGAL_ADDRESS = 700,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_WRONG_THREAD = 908,
};

using Work = std::function<int()>;

struct Stream {
  std::deque<Work> waiting;
  bool capturing = false, invalidated = false;
  std::thread::id captured_by;
  std::vector<Work> captured;
};

struct Block {  // device memory, or pinned host memory that is mapped to the device
  std::vector<uint8_t> own;
  uint8_t* bytes = nullptr;
  size_t size = 0;
};

struct State {
  std::map<std::string, long> settings, counters;
  std::map<uint64_t, Block> device, pinned, mapped;
  std::map<uint64_t, Stream> streams;
  std::map<uint64_t, std::vector<Work>> graphs, instances;
  uint64_t next = 0x700000000000;
  int retained = 0, sticky = 0;
};

State state;
std::mutex mutex;
thread_local std::vector<CUcontext> current;
const CUcontext primary = reinterpret_cast<CUcontext>(0x51);

uint64_t new_address(size_t size) {
  uint64_t address = state.next;
  state.next += (size + 4096) / 512 * 512 + 512;
  return address;
}

// Returns the block that contains [address, address + size), or null.
Block* find(std::map<uint64_t, Block>& blocks, uint64_t address, size_t size, uint64_t* offset) {
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  auto found = std::prev(after);
  *offset = address - found->first;
  return *offset + size <= found->second.size ? &found->second : nullptr;
}

uint8_t* on_device(uint64_t address, size_t size) {
  uint64_t offset = 0;
  for (auto* blocks : {&state.device, &state.mapped})
    if (Block* block = find(*blocks, address, size, &offset)) return block->bytes + offset;
  return nullptr;
}

// Counts a call and returns the error that a test requested, or that of a missing context. Requires the lock.
int enter(const char* name, bool needs_context) {
  long call = ++state.counters[name];
  auto fails = state.settings.find(std::string("fail ") + name);
  if (fails != state.settings.end() && fails->second == call) return int(state.settings["fail with"]);
  if (needs_context && current.empty()) return INVALID_CONTEXT;
  return state.sticky;
}

bool this_thread_captures() {
  for (auto& [id, stream] : state.streams)
    if (stream.capturing && stream.captured_by == std::this_thread::get_id()) {
      stream.invalidated = true;  // calls that are not allowed during capture also end it
      return true;
    }
  return false;
}

int push_work(CUstream handle, Work work) {
  auto found = state.streams.find(uint64_t(handle));
  if (found == state.streams.end()) return INVALID_HANDLE;
  if (found->second.capturing)
    found->second.captured.push_back(std::move(work));
  else
    found->second.waiting.push_back(std::move(work));
  return SUCCESS;
}

}  // namespace

#define ENTER_WITH(needs_context)           \
  std::unique_lock<std::mutex> lock(mutex); \
  if (int error = enter(__func__, needs_context); error) return CUresult(error)
#define ENTER() ENTER_WITH(true)
#define API extern "C" __attribute__((visibility("default")))
#define ANSWER(value) return CUresult(value)

API CUresult cuInit(unsigned int) {
  std::unique_lock<std::mutex> lock(mutex);
  ++state.counters[__func__];
  ANSWER(state.settings["absent"] ? NO_DEVICE : SUCCESS);
}

// The real packages look up all other functions by name, without the version suffix.
API CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t,
                                 CUdriverProcAddressQueryResult* status) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  std::string name = symbol;
  if (name == "cuGraphInstantiate") name += "WithFlags";
  if (name == "cuGetProcAddress") name += "_v2";
  *function = dlsym(self, (name + "_v2").c_str());
  if (!*function) *function = dlsym(self, name.c_str());
  if (status) *status = CUdriverProcAddressQueryResult(*function ? 0 : 1);
  ANSWER(*function ? SUCCESS : 500);  // CUDA_ERROR_NOT_FOUND
}

API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = int(error) == OUT_OF_MEMORY ? "out of memory" : "unknown error";
  ANSWER(SUCCESS);
}

API CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  ANSWER(SUCCESS);
}

API CUresult cuDeviceGet(CUdevice* device, int index) {
  ENTER_WITH(false);
  *device = index;
  ANSWER(index == 0 ? SUCCESS : INVALID_DEVICE);
}

API CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  ANSWER(SUCCESS);
}

API CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  ENTER_WITH(false);
  std::strncpy(name, "Fake Orin", size_t(size));
  ANSWER(SUCCESS);
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  ENTER_WITH(false);
  switch (int(attribute)) {
    case 18:
      *value = int(state.settings["unified"]);
      break;  // INTEGRATED
    case 19:
      *value = 1;
      break;  // CAN_MAP_HOST_MEMORY
    case 75:
      *value = 8;
      break;  // COMPUTE_CAPABILITY_MAJOR
    case 76:
      *value = 7;
      break;  // COMPUTE_CAPABILITY_MINOR
    default:
      ANSWER(INVALID_VALUE);
  }
  ANSWER(SUCCESS);
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  ENTER_WITH(false);
  ++state.retained;
  *context = primary;
  ANSWER(SUCCESS);
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
  ENTER_WITH(false);
  ANSWER(state.retained-- > 0 ? SUCCESS : INVALID_CONTEXT);
}

API CUresult cuCtxPushCurrent_v2(CUcontext context) {
  ENTER_WITH(false);
  if (context != primary || state.retained < 1) ANSWER(INVALID_CONTEXT);
  current.push_back(context);
  ANSWER(SUCCESS);
}

API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  std::unique_lock<std::mutex> lock(mutex);
  ++state.counters[__func__];
  if (current.empty()) ANSWER(INVALID_CONTEXT);
  if (context) *context = current.back();
  current.pop_back();
  ANSWER(SUCCESS);
}

API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t size) {
  ENTER();
  if (size == 0) ANSWER(INVALID_VALUE);
  if (this_thread_captures()) ANSWER(CAPTURE_UNSUPPORTED);
  long used = 0;
  for (auto& [at, block] : state.device) used += long(block.size);
  if (state.settings["memory"] && used + long(size) > state.settings["memory"]) ANSWER(OUT_OF_MEMORY);
  *address = new_address(size);
  Block& block = state.device[*address];
  block.own.assign(size, 0xCD);  // not zeros, which could hide missing initialization
  block.bytes = block.own.data();
  block.size = size;
  ANSWER(SUCCESS);
}

API CUresult cuMemFree_v2(CUdeviceptr address) {
  ENTER();
  ANSWER(state.device.erase(address) ? SUCCESS : INVALID_VALUE);
}

API CUresult cuMemHostAlloc(void** host, size_t size, unsigned int flags) {
  ENTER();
  if (size == 0) ANSWER(INVALID_VALUE);
  *host = std::malloc(size);
  std::memset(*host, 0xCD, size);
  Block block;
  block.bytes = static_cast<uint8_t*>(*host);
  block.size = size;
  state.pinned[uint64_t(*host)] = block;
  if (flags & 2) state.mapped[new_address(size)] = block;  // CU_MEMHOSTALLOC_DEVICEMAP
  ANSWER(SUCCESS);
}

API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* host, unsigned int) {
  ENTER();
  for (auto& [at, block] : state.mapped)
    if (block.bytes == host) {
      *address = at;
      ANSWER(SUCCESS);
    }
  ANSWER(INVALID_VALUE);
}

API CUresult cuMemFreeHost(void* host) {
  ENTER();
  if (!state.pinned.erase(uint64_t(host))) ANSWER(INVALID_VALUE);
  for (auto at = state.mapped.begin(); at != state.mapped.end();)
    at = at->second.bytes == host ? state.mapped.erase(at) : std::next(at);
  std::free(host);
  ANSWER(SUCCESS);
}

namespace {

int copy(const char* name, uint64_t device, uint64_t host, size_t size, CUstream stream, bool up) {
  uint64_t offset = 0;
  if (!on_device(device, size)) return INVALID_VALUE;
  if (!find(state.pinned, host, size, &offset)) ++state.counters["pageable copies"];
  state.counters[std::string("bytes ") + name] += long(size);
  return push_work(stream, [=] {
    std::unique_lock<std::mutex> lock(mutex);
    uint64_t unused = 0;
    uint8_t* place = on_device(device, size);
    if (!place || !find(state.pinned, host, size, &unused)) return int(ILLEGAL_ADDRESS);
    if (up)
      std::memcpy(place, reinterpret_cast<void*>(host), size);
    else
      std::memcpy(reinterpret_cast<void*>(host), place, size);
    ++state.counters["copies done"];
    return int(SUCCESS);
  });
}

}  // namespace

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr device, const void* host, size_t size, CUstream stream) {
  ENTER();
  ANSWER(copy("up", device, uint64_t(host), size, stream, true));
}

API CUresult cuMemcpyDtoHAsync_v2(void* host, CUdeviceptr device, size_t size, CUstream stream) {
  ENTER();
  ANSWER(copy("down", device, uint64_t(host), size, stream, false));
}

API CUresult cuStreamCreate(CUstream* stream, unsigned int) {
  ENTER();
  uint64_t id = new_address(1);
  state.streams[id];
  *stream = reinterpret_cast<CUstream>(id);
  ANSWER(SUCCESS);
}

API CUresult cuStreamDestroy_v2(CUstream stream) {
  ENTER();
  ANSWER(state.streams.erase(uint64_t(stream)) ? SUCCESS : INVALID_HANDLE);
}

API CUresult cuStreamSynchronize(CUstream handle) {
  ENTER();
  auto found = state.streams.find(uint64_t(handle));
  if (found == state.streams.end()) ANSWER(INVALID_HANDLE);
  if (found->second.capturing) {
    found->second.invalidated = true;
    ANSWER(CAPTURE_UNSUPPORTED);
  }
  std::deque<Work> waiting;
  waiting.swap(found->second.waiting);
  lock.unlock();
  for (Work& work : waiting)
    if (int error = work(); error) {
      lock.lock();
      state.sticky = error;  // as on a GPU, the context is unusable from now on
      ANSWER(error);
    }
  ANSWER(SUCCESS);
}

API CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode) {
  ENTER();
  auto found = state.streams.find(uint64_t(handle));
  if (found == state.streams.end()) ANSWER(INVALID_HANDLE);
  Stream& stream = found->second;
  if (stream.capturing) ANSWER(INVALID_VALUE);
  stream.capturing = true;
  stream.invalidated = state.settings["uncapturable"];
  stream.captured_by = std::this_thread::get_id();
  stream.captured.clear();
  ANSWER(SUCCESS);
}

API CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  std::unique_lock<std::mutex> lock(mutex);
  int error = enter(__func__, true);
  auto found = state.streams.find(uint64_t(handle));
  *graph = nullptr;
  if (found == state.streams.end() || !found->second.capturing) ANSWER(INVALID_VALUE);
  Stream& stream = found->second;
  if (stream.captured_by != std::this_thread::get_id()) ANSWER(CAPTURE_WRONG_THREAD);
  stream.capturing = false;  // also if it returns an error
  if (error) ANSWER(error);
  if (stream.invalidated) ANSWER(CAPTURE_INVALIDATED);
  uint64_t id = new_address(1);
  state.graphs[id] = std::move(stream.captured);
  stream.captured.clear();
  *graph = reinterpret_cast<CUgraph>(id);
  ANSWER(SUCCESS);
}

API CUresult cuGraphInstantiateWithFlags(CUgraphExec* instance, CUgraph graph, unsigned long long) {
  ENTER();
  auto found = state.graphs.find(uint64_t(graph));
  if (found == state.graphs.end()) ANSWER(INVALID_VALUE);
  uint64_t id = new_address(1);
  state.instances[id] = found->second;
  *instance = reinterpret_cast<CUgraphExec>(id);
  ANSWER(SUCCESS);
}

API CUresult cuGraphLaunch(CUgraphExec instance, CUstream stream) {
  ENTER();
  auto found = state.instances.find(uint64_t(instance));
  if (found == state.instances.end()) ANSWER(INVALID_VALUE);
  for (Work& work : found->second)
    if (int error = push_work(stream, work); error) ANSWER(error);
  ANSWER(SUCCESS);
}

API CUresult cuGraphExecDestroy(CUgraphExec instance) {
  ENTER();
  ANSWER(state.instances.erase(uint64_t(instance)) ? SUCCESS : INVALID_VALUE);
}

API CUresult cuGraphDestroy(CUgraph graph) {
  ENTER();
  ANSWER(state.graphs.erase(uint64_t(graph)) ? SUCCESS : INVALID_VALUE);
}

// --- interface for tests ---

API void fake_reset() {
  std::unique_lock<std::mutex> lock(mutex);
  for (auto& [at, block] : state.pinned) std::free(block.bytes);
  state = State();
  current.clear();
}

API void fake_set(const char* name, long value) {
  std::unique_lock<std::mutex> lock(mutex);
  state.settings[name] = value;
}

API long fake_count(const char* name) {
  std::unique_lock<std::mutex> lock(mutex);
  return state.counters[name];
}

// Number of live resources of `kind`: device, pinned, stream, graph, instance, retained, or context (of this thread).
API long fake_alive(const char* kind) {
  std::unique_lock<std::mutex> lock(mutex);
  std::map<std::string, long> sizes = {
      {"device", long(state.device.size())},      {"pinned", long(state.pinned.size())},
      {"stream", long(state.streams.size())},     {"graph", long(state.graphs.size())},
      {"instance", long(state.instances.size())}, {"retained", state.retained},
      {"context", long(current.size())},
  };
  return sizes.count(kind) ? sizes[kind] : -1;
}

// Enqueues work of a library such as TensorRT: `work(token)` runs when the stream reaches it, or is captured.
API int fake_enqueue(uint64_t stream, int (*work)(uint64_t), uint64_t token) {
  std::unique_lock<std::mutex> lock(mutex);
  if (current.empty()) return INVALID_CONTEXT;
  return push_work(reinterpret_cast<CUstream>(stream), [=] { return work(token); });
}

API int fake_read(uint64_t address, void* host, size_t size) {
  std::unique_lock<std::mutex> lock(mutex);
  uint8_t* place = on_device(address, size);
  if (place) std::memcpy(host, place, size);
  return place ? SUCCESS : ILLEGAL_ADDRESS;
}

API int fake_write(uint64_t address, const void* host, size_t size) {
  std::unique_lock<std::mutex> lock(mutex);
  uint8_t* place = on_device(address, size);
  if (place) std::memcpy(place, host, size);
  return place ? SUCCESS : ILLEGAL_ADDRESS;
}

API int fake_capturing(uint64_t stream) {
  std::unique_lock<std::mutex> lock(mutex);
  auto found = state.streams.find(stream);
  return found != state.streams.end() && found->second.capturing;
}
