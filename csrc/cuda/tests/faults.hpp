#pragma once

#include <string>

namespace rgfast::test {

// Runs the kernel rgfast_fault_<name>, which a sanitizer should report; what main returns.
int run_planted(const std::string& name);

}  // namespace rgfast::test
