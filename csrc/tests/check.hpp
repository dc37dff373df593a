// The least that a test needs: named cases, and a check that says where it failed.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace rgfast::test {

struct Case {
  std::string name;
  std::function<void()> run;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, std::function<void()> run) { cases().push_back({name, std::move(run)}); }
};

// What main returns: all cases in turn, of which there must be one.
inline int run() {
  for (const auto& item : cases()) {
    const int before = failures();
    item.run();
    std::printf("%-50s %s\n", item.name.c_str(), failures() == before ? "ok" : "FAILED");
  }
  return failures() == 0 && !cases().empty() ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace rgfast::test

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++rgfast::test::failures();                                         \
    }                                                                     \
  } while (false)

#define TEST(name)                                                         \
  static void test_##name();                                               \
  static const rgfast::test::Register register_##name(#name, test_##name); \
  static void test_##name()
