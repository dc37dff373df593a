#include "tests/check.hpp"

int main() { return rgfast::test::run(); }
