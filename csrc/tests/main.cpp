#include <cstdlib>
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
  for (const auto& item : rgfast::test::cases()) {
    const int before = rgfast::test::failures();
    item.run();
    std::printf("%-50s %s\n", item.name.c_str(), rgfast::test::failures() == before ? "ok" : "FAILED");
  }
  return rgfast::test::failures() == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
