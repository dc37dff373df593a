// A small persistent pool of parked threads.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace rgfast {

namespace detail {
using Task = void (*)(void* context, std::int64_t index, int slot);
void run_tasks(std::int64_t count, int threads, Task task, void* context);
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
  using Held = std::remove_reference_t<Body>;
  detail::run_tasks(
      count, threads,
      [](void* context, std::int64_t index, int slot) { (*static_cast<Held*>(context))(index, slot); },
      const_cast<std::remove_const_t<Held>*>(&body));
}

}  // namespace rgfast
