#include "cuda/tests/faults.hpp"
#include "tests/check.hpp"

// Without a name, which is one of a planted fault, all tests run.
int main(int count, char** words) {
  return count == 2 ? rgfast::test::run_planted(words[1]) : rgfast::test::run();
}
