#include <pybind11/stl.h>

#include <cstring>

#include "bind/register.hpp"
#include "driver/driver.hpp"

namespace py = pybind11;

namespace rgfast::bind {
namespace {

using driver::Driver;

// Every kernel parameter is 8 bytes: an address or an int64 from an int, a double from a float.
std::vector<std::uint64_t> words(const py::sequence& arguments) {
  std::vector<std::uint64_t> found;
  for (const py::handle each : arguments) {
    std::uint64_t word = 0;
    if (PyFloat_CheckExact(each.ptr()) != 0) {
      const double value = PyFloat_AS_DOUBLE(each.ptr());
      std::memcpy(&word, &value, sizeof(word));
    } else if (PyLong_CheckExact(each.ptr()) != 0) {
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(each.ptr(), &overflow);
      if (overflow != 0)
        throw std::invalid_argument("arguments must be integers of 64 bits, got " +
                                    std::string(py::str(each)));
      std::memcpy(&word, &value, sizeof(word));
    } else {
      throw py::type_error("arguments must be int or float, got " +
                           std::string(py::str(py::type::of(each).attr("__name__"))));
    }
    found.push_back(word);
  }
  return found;
}

using Grid = std::array<unsigned, 3>;

driver::Launch described(const std::string& kernel, int device, const Grid& grid, unsigned block,
                         unsigned shared, unsigned cluster) {
  driver::Launch launch;
  launch.kernel = kernel;
  launch.device = device;
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared;
  launch.cluster = cluster;
  return launch;
}

}  // namespace

void register_cuda(py::module_& m) {
  using Free = py::call_guard<py::gil_scoped_release>;
  py::class_<Driver>(m, "CudaDriver",
                     "The CUDA driver and the package's kernels; failures are RuntimeErrors.")
      .def(py::init([](const std::string& path, const py::bytes& image, const std::string& holds,
                       const std::array<int, 2>& release) {
             driver::Image given{image, holds, release[0], release[1]};
             const py::gil_scoped_release free;
             return std::make_unique<Driver>(path, std::move(given));
           }),
           py::arg("path"), py::arg("image"), py::arg("holds"), py::arg("release"))
      .def("same_process", &Driver::same_process)
      .def("version", &Driver::version)
      .def("device_count", &Driver::device_count)
      .def("device_name", &Driver::device_name, py::arg("device"), Free())
      .def(
          "capability",
          [](Driver& driver, int device) {
            return std::make_tuple(driver.attribute(device, driver::kComputeCapabilityMajor),
                                   driver.attribute(device, driver::kComputeCapabilityMinor));
          },
          py::arg("device"), Free())
      .def(
          "multiprocessors",
          [](Driver& driver, int device) { return driver.attribute(device, driver::kMultiprocessorCount); },
          py::arg("device"), Free())
      .def(
          "shared_bytes",
          [](Driver& driver, int device) {
            return driver.attribute(device, driver::kMaxSharedPerBlockOptin);
          },
          py::arg("device"), Free())
      .def(
          "single_to_double",
          [](Driver& driver, int device) { return driver.attribute(device, driver::kSingleToDoubleRatio); },
          py::arg("device"), Free())
      .def("capturing", &Driver::capturing, py::arg("device"), py::arg("stream"), Free())
      .def(
          "resources",
          [](Driver& driver, int device, const std::string& kernel) {
            const driver::Resources found = driver.resources(device, kernel);
            return std::make_tuple(found.registers, found.local_bytes, found.static_shared_bytes,
                                   found.max_threads);
          },
          py::arg("device"), py::arg("kernel"), Free(),
          "Registers per thread, bytes of local memory per thread and of static shared memory, threads per "
          "block.")
      .def(
          "check",
          [](Driver& driver, const std::string& kernel, int device, const Grid& grid, unsigned block,
             unsigned shared,
             unsigned cluster) { driver.check(described(kernel, device, grid, block, shared, cluster)); },
          py::arg("kernel"), py::arg("device"), py::arg("grid"), py::arg("block"), py::arg("shared"),
          py::arg("cluster"), Free(), "Raises what launch() would, as far as it is known beforehand.")
      .def(
          "launch",
          [](Driver& driver, const std::string& kernel, int device, std::uintptr_t stream, const Grid& grid,
             unsigned block, unsigned shared, unsigned cluster, const py::sequence& arguments) {
            driver::Launch launch = described(kernel, device, grid, block, shared, cluster);
            launch.stream = stream;
            launch.words = words(arguments);
            const py::gil_scoped_release free;
            driver.launch(launch);
          },
          py::arg("kernel"), py::arg("device"), py::arg("stream"), py::arg("grid"), py::arg("block"),
          py::arg("shared"), py::arg("cluster"), py::arg("arguments"));
}

}  // namespace rgfast::bind
