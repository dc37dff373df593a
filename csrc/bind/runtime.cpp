#include <pybind11/stl.h>

#include "bind/register.hpp"
#include "rgfast/isa.hpp"
#include "rgfast/parallel.hpp"

namespace py = pybind11;

namespace rgfast::bind {
namespace {

std::vector<std::string> names(const std::vector<Isa>& isas) {
  std::vector<std::string> found;
  for (const Isa isa : isas) found.emplace_back(isa_name(isa));
  return found;
}

}  // namespace

void register_runtime(py::module_& m) {
  m.def(
      "compiled_isas", [] { return names(compiled_isas()); },
      "Instruction sets that the kernels were compiled for, least first.");
  m.def(
      "available_isas", [] { return names(available_isas()); },
      "Those of them that this machine can run, least first.");
  m.def(
      "active_isa", [] { return std::string(isa_name(active_isa())); },
      "The instruction set that kernels use: the forced one, else RGFAST_ISA, else the best available.");
  m.def("forced_isa", [] { return forced_isa(); }, "What set_isa was last given.");
  m.def(
      "set_isa", [](const std::string& name) { set_isa(name); }, py::arg("name"),
      "Force an instruction set for the process; an empty name undoes it.");
  m.def(
      "pool_squares",
      [](std::int64_t count, int threads, std::int64_t fail_at, bool lengthy) {
        std::vector<std::int64_t> squares(static_cast<std::size_t>(std::max<std::int64_t>(count, 0)));
        checked_threads(threads);
        {
          const py::gil_scoped_release release;
          parallel_for(count, threads, lengthy, [&](std::int64_t index, int) {
            if (index == fail_at) throw std::runtime_error("task " + std::to_string(index) + " failed");
            squares[static_cast<std::size_t>(index)] = index * index;
          });
        }
        return squares;
      },
      py::arg("count"), py::arg("threads"), py::arg("fail_at") = -1, py::arg("lengthy") = false,
      "Squares of 0..count-1 from the thread pool; task `fail_at` throws. For tests of the pool, or "
      "where\n`lengthy` of the threads of OpenMP.");
}

}  // namespace rgfast::bind
