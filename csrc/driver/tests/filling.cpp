// Beside fake.cpp: runs rgfast_fill, rightly or with a mistake that a test plants.
#include <algorithm>
#include <cstring>
#include <string>

#include "driver/tests/fake.hpp"

namespace {

int mistake = 0;

void fill(const rgfast::driver::fake::Launch&, void** arguments) {
  double* out = nullptr;
  std::int64_t count = 0;
  double value = 0.0;
  std::memcpy(&out, arguments[0], sizeof(out));
  std::memcpy(&count, arguments[1], sizeof(count));
  std::memcpy(&value, arguments[2], sizeof(value));
  if (mistake == 1) value += 1e-9;
  if (mistake == 2) --count;
  if (mistake == 3) ++count;
  std::fill_n(out, count, value);
}

const rgfast::driver::fake::Emulated filling{3, fill};

}  // namespace

extern "C" {

const rgfast::driver::fake::Emulated* rgfast_emulated(const char* name) {
  return std::string(name) == "rgfast_fill" ? &filling : nullptr;
}

// 0: none, 1: another value, 2: the last element is left out, 3: one too many is written.
void filling_mistake(int which) { mistake = which; }
}
