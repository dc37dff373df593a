// Loops over the threads of a small persistent pool, parked between calls.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace rgfast {

namespace detail {
using Task = void (*)(void* context, std::int64_t index, int slot);
void run_tasks(std::int64_t count, int threads, bool lengthy, Task task, void* context);

template <class Body>
void loop(std::int64_t count, int threads, bool lengthy, Body& body) {
  run_tasks(
      count, threads, lengthy,
      [](void* context, std::int64_t index, int slot) { (*static_cast<Body*>(context))(index, slot); },
      const_cast<std::remove_const_t<Body>*>(&body));
}
}  // namespace detail

// Calls body(index, slot) once for every index in [0, count) on up to `threads` threads, the caller's among
// them, and returns when all are done. `slot` is in [0, threads) and no two calls running at the same time
// share one: it names a workspace. Which thread takes which index is not fixed, so that a result must be a
// function of the index alone; then it does not depend on the number of threads.
//
// The first exception is rethrown here, and tasks not begun by then are dropped. A call from inside a task,
// or while another Python thread has the pool, runs on its own thread alone. A child of fork() gets a pool
// of its own on its first call.
template <class Body>
void parallel_for(std::int64_t count, int threads, Body&& body) {
  detail::loop(count, threads, false, body);
}

// The same for loops of half a millisecond and more where `lengthy`, on the threads of the OpenMP that the
// process already has, if it has one (PyTorch brings one). After every parallel loop of the library those
// spin for milliseconds on the cores that the pool needs, unless they are given this work. A short loop on
// a busy machine would wait longer for them to be scheduled than it takes.
template <class Body>
void parallel_for(std::int64_t count, int threads, bool lengthy, Body&& body) {
  detail::loop(count, threads, lengthy, body);
}

}  // namespace rgfast
