// A parallel for loop over std::thread. It joins its threads before it returns, so no thread pool outlives the call,
// nothing competes with torch's OpenMP pool, and fork() stays safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace fedspine {

// Work in multiply-adds below which starting a thread (about 15 µs) costs more than it saves.
constexpr double kWorkPerThread = 4e6;

// Call body(first, last) on consecutive ranges that cover [0, count). The number of ranges depends on threads, so the
// results of body must not depend on where a range begins.
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
    } catch (const std::system_error&) {  // the system has no more threads: run the range on this one
      body(first, last);
    }
  }
  body(0, count / parts);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace fedspine
