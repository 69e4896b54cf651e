// The scheduler of the emulation: fibers, barriers, warp collectives, shared memory, launches.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATE_WITH_TSAN)  // this file is then compiled without -fsanitize=thread, because its own state is not
                                // under test
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulated {

Order order = {0, false};

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;

[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::abort();
}

enum class State { runnable, at_barrier, at_collective, done };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  void (*perform)(void* shared, const void* global, int bytes);
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  unsigned thread = 0;
  State state = State::done;
  int line = 0;                // line of the barrier where it waits
  const char* name = nullptr;  // name of the collective where it waits
  void* operands = nullptr;
  std::vector<Copy> open_copies;              // cp.async since the last commit
  std::deque<std::vector<Copy>> copy_groups;  // committed, the oldest first
};

std::vector<std::unique_ptr<Fiber>> fibers;  // fibers[i] is thread i of every block
Fiber scheduler;
Fiber* current = nullptr;
std::vector<unsigned> turns;  // threads of the block by falling priority
unsigned threads = 0;
const std::function<void()>* kernel = nullptr;
int or_bits = 0, or_result = 0;
std::map<const void*, void*> shared;
// Their addresses represent "happens before" relations for ThreadSanitizer.
char barrier_event, launch_event, done_event, shared_event;

void happens_before(void* event) {
#if defined(EMULATE_WITH_TSAN)
  __tsan_release(event);
#else
  (void)event;
#endif
}
void happened(void* event) {
#if defined(EMULATE_WITH_TSAN)
  __tsan_acquire(event);
#else
  (void)event;
#endif
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(current->fake_stack, nullptr, nullptr);
#endif
}

void switch_to(Fiber* next) {
  Fiber* from = current;
  if (next == from) return;
  current = next;
  if (next != &scheduler) threadIdx = {next->thread, 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  static const void* main_bottom = nullptr;
  static size_t main_size = 0;
  const void* bottom = next->stack;
  size_t size = kStack;
  if (next == &scheduler) {
    bottom = main_bottom;
    size = main_size;
  }
  if (from == &scheduler && main_bottom == nullptr) {
    pthread_attr_t attributes;
    void* base = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &base, &main_size);
    pthread_attr_destroy(&attributes);
    main_bottom = base;
  }
  __sanitizer_start_switch_fiber(&from->fake_stack, bottom, size);
#endif
#if defined(EMULATE_WITH_TSAN)
  __tsan_switch_to_fiber(next->tsan, 1);  // 1: switching fibers does not order memory accesses
#endif
  swapcontext(&from->context, &next->context);
  arrived();
}

Fiber* next_runnable() {
  for (const unsigned thread : turns) {
    if (fibers[thread]->state == State::runnable) return fibers[thread].get();
  }
  return nullptr;
}

// Switch to another thread. Returns when this thread is runnable and is selected again.
void wait() {
  Fiber* next = next_runnable();
  if (next == nullptr)
    fail("deadlock: every thread waits, this one at %s", current->name ? current->name : "a barrier");
  switch_to(next);
}

void fiber_main() {
  arrived();
  for (;;) {
    happened(&launch_event);
    (*kernel)();
    for (current->copy_groups.push_back(std::move(current->open_copies)); !current->copy_groups.empty();
         current->copy_groups.pop_front()) {
      if (!current->copy_groups.front().empty()) fail("returns with cp.async in flight");
    }
    current->open_copies.clear();
    happens_before(&done_event);
    current->state = State::done;
    Fiber* next = next_runnable();
    if (next == nullptr) {
      for (unsigned i = 0; i < threads; ++i) {
        if (fibers[i]->state != State::done) fail("thread %u ended while thread %u still waits", threadIdx.x, i);
      }
      next = &scheduler;
    }
    switch_to(next);
  }
}

void create_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->thread = static_cast<unsigned>(fibers.size());
  fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fiber->stack == MAP_FAILED) fail("no memory for the stack of a thread");
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
#if defined(EMULATE_WITH_TSAN)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  fibers.push_back(std::move(fiber));
}

std::vector<unsigned> permutation(size_t count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order.seed == 1) std::reverse(numbers.begin(), numbers.end());
  if (order.seed > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order.seed));
  return numbers;
}

}  // namespace

void* shared_memory(size_t bytes, const void* site) {
  void*& data = shared[site];
  if (data == nullptr) {
    data = std::aligned_alloc(16, bytes);
    if (data == nullptr || bytes % 16 != 0) fail("shared memory of %zu bytes; it must be a multiple of 16", bytes);
    if (bytes > 48 * 1024) fail("%zu bytes of static shared memory; a block has 49152", bytes);
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(data)[i] = 0xff;
    happens_before(&shared_event);
  }
  happened(&shared_event);
  return data;
}

void block_barrier(int line) {
  current->state = State::at_barrier;
  current->line = line;
  happens_before(&barrier_event);
  bool all = true;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::done) fail("barrier in line %d, but thread %u has returned", line, i);
    all = all && fibers[i]->state == State::at_barrier;
    if (fibers[i]->state == State::at_barrier && fibers[i]->line != line) {
      fail("barrier in line %d, but thread %u waits at that in line %d", line, i, fibers[i]->line);
    }
  }
  if (all) {
    or_result = or_bits;
    or_bits = 0;
    for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::runnable;
  }
  wait();
  happened(&barrier_event);
}

int block_or(int bits, int line) {
  or_bits |= bits;
  block_barrier(line);
  const int result = or_result;
  block_barrier(-line);  // all threads must read the result before a later barrier replaces it
  return result;
}

void warp_collective(const char* name, void* operands, void (*combine)(void* const* lanes)) {
  const unsigned first = threadIdx.x / 32 * 32;
  if (first + 32 > threads) fail("%s in a warp of %u lanes", name, threads - first);
  current->state = State::at_collective;
  current->name = name;
  current->operands = operands;
  void* lanes[32];
  bool all = true;
  for (unsigned i = 0; i < 32; ++i) {
    const Fiber& lane = *fibers[first + i];
    if (lane.state == State::done) fail("%s, but lane %u has returned", name, i);
    if (lane.state == State::at_collective && lane.name != name) fail("%s, but lane %u is at %s", name, i, lane.name);
    all = all && lane.state == State::at_collective;
    lanes[i] = lane.operands;
  }
  if (all) {
    combine(lanes);
    for (unsigned i = 0; i < 32; ++i) fibers[first + i]->state = State::runnable;
  }
  wait();
}

void warp_barrier() {
  static char events[kMaxThreads / 32];
  char* event = &events[threadIdx.x / 32];
  happens_before(event);
  warp_collective("__syncwarp", nullptr, [](void* const*) {});
  happened(event);
}

void async_copy(void* shared_address, const void* global, int bytes, void (*perform)(void*, const void*, int)) {
  if (reinterpret_cast<uintptr_t>(shared_address) % 16 != 0) fail("cp.async to an address that is no multiple of 16");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("cp.async from an address that is no multiple of 16");
  if (!order.late_async) perform(shared_address, global, bytes);
  current->open_copies.push_back({shared_address, global, bytes, perform});
}

void async_commit() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void async_wait(size_t groups) {
  while (current->copy_groups.size() > groups) {
    for (const Copy& copy : current->copy_groups.front()) {
      if (order.late_async) copy.perform(copy.shared, copy.global, copy.bytes);
    }
    current->copy_groups.pop_front();
  }
}

int lane() {
  return static_cast<int>(threadIdx.x % 32);
}

int launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  const bool fits = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 2147483647u && grid.y <= 65535u &&
                    grid.z <= 65535u && block.x >= 1 && block.x <= kMaxThreads && block.y == 1 && block.z == 1;
  if (!fits) return cudaErrorInvalidConfiguration;
  while (fibers.size() < block.x) create_fiber();
  threads = block.x;
  blockDim = block;
  gridDim = grid;
  kernel = &body;
  turns = permutation(threads);
  current = &scheduler;
#if defined(EMULATE_WITH_TSAN)
  scheduler.tsan = __tsan_get_current_fiber();
#endif
  happens_before(&launch_event);
  for (const unsigned number : permutation(size_t{grid.x} * grid.y * grid.z)) {
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::runnable;
    switch_to(next_runnable());
    happened(&done_event);
    for (const auto& [site, data] : shared) std::free(data);
    shared.clear();
  }
  return cudaSuccess;
}

}  // namespace emulated
