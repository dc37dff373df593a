// Runs the planted faults, each in a process of its own that shim.cmake looks at.
#include "cuda/tests/faults.hpp"

#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cuda/common/device.cuh"

extern "C" {
void rgfast_fault_none(const double* x, double* out);
void rgfast_fault_missing_barrier(const double* x, double* out);
void rgfast_fault_missing_warp_barrier(const double* x, double* out);
void rgfast_fault_late_barrier(const double* x, double* out);
void rgfast_fault_early_read(const double* x, double* out);
void rgfast_fault_race(double* sum);
void rgfast_fault_out_of_bounds(double* out);
}

namespace rgfast::test {

int run_planted(const std::string& name) {
  constexpr unsigned kThreads = 64;
  const std::vector<double> x(kThreads, 1.0);
  std::vector<double> out(kThreads);
  shim::Launch how;
  how.grid = {3};
  how.block = {kThreads};
  how.shared = kThreads * sizeof(double);
  const auto shift = [&](void (*kernel)(const double*, double*)) {
    how.grid = {1};
    shim::launch(how, kernel, x.data(), out.data());
  };
  if (name == "none")
    shift(rgfast_fault_none);
  else if (name == "missing_barrier")
    shift(rgfast_fault_missing_barrier);
  else if (name == "missing_warp_barrier")
    shift(rgfast_fault_missing_warp_barrier);
  else if (name == "late_barrier")
    shift(rgfast_fault_late_barrier);
  else if (name == "early_read")
    shift(rgfast_fault_early_read);
  else if (name == "race")
    shim::launch(how, rgfast_fault_race, out.data());
  else if (name == "out_of_bounds")
    shim::launch(how, rgfast_fault_out_of_bounds, out.data());
  else
    throw std::invalid_argument("there is no planted fault " + name);
  return EXIT_SUCCESS;
}

}  // namespace rgfast::test
