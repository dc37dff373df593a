#include "bind/register.hpp"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of rgfast, and the way to those that run on a GPU.";
  rgfast::bind::register_runtime(m);
  rgfast::bind::register_residual_mlp(m);
  rgfast::bind::register_spectrum(m);
  rgfast::bind::register_cka(m);
  rgfast::bind::register_moments(m);
  rgfast::bind::register_cuda(m);
}
