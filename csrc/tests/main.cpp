#include <stdexcept>

#include "rgfast/isa.hpp"
#include "tests/check.hpp"

// 77 tells the caller that this machine cannot run the set that RGFAST_ISA names.
int main() {
  try {
    std::printf("isa: %s\n", rgfast::isa_name(rgfast::active_isa()));
  } catch (const std::invalid_argument& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  return rgfast::test::run();
}
