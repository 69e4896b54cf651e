// A parallel-for over std::thread: threads are joined before it returns, so no pool outlives the call, nothing
// competes with torch's own OpenMP pool, and fork() stays safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace fedspine {

// Below this much work (in multiply-adds) starting a thread (about 15 µs) costs more than it saves.
constexpr double kWorkPerThread = 4e6;

// Calls body(first, last) on consecutive ranges that cover [0, count). How many ranges there are depends on
// `threads`, so body must write results that do not depend on where a range begins.
template <typename Body>
void parallel_for(int64_t count, int threads, double work, const Body& body) {
  const auto useful = static_cast<int64_t>(work / kWorkPerThread);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, useful, count}));
  std::vector<std::thread> workers;
  workers.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t first = count * part / parts, last = count * (part + 1) / parts;
    try {
      workers.emplace_back([&body, first, last] { body(first, last); });
    } catch (const std::system_error&) {  // the system is out of threads: do the work here
      body(first, last);
    }
  }
  body(0, count / parts);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace fedspine
