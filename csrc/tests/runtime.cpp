#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "rgfast/isa.hpp"
#include "rgfast/parallel.hpp"
#include "rgfast/view.hpp"
#include "tests/check.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

using rgfast::parallel_for;

bool covers(std::int64_t count, int threads, bool lengthy = false) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
  std::vector<std::atomic<int>> busy(static_cast<std::size_t>(threads));
  std::atomic<bool> good{true};
  parallel_for(count, threads, lengthy, [&](std::int64_t index, int slot) {
    if (slot < 0 || slot >= threads) good = false;
    auto& mine = busy[static_cast<std::size_t>(slot)];
    if (mine.fetch_add(1) != 0) good = false;
    ++seen[static_cast<std::size_t>(index)];
    mine.fetch_sub(1);
  });
  for (const auto& times : seen)
    if (times != 1) good = false;
  return good;
}

TEST(every_index_runs_once_and_slots_are_exclusive) {
  for (const int threads : {1, 2, 3, 8})
    for (const std::int64_t count : {0, 1, 2, 7, 1000})
      for (const bool lengthy : {false, true}) CHECK(covers(count, threads, lengthy));
}

TEST(an_exception_reaches_the_caller_and_the_pool_goes_on) {
  for (const int threads : {1, 4}) {
    std::string told;
    try {
      parallel_for(100, threads, [](std::int64_t index, int) {
        if (index == 13) throw std::runtime_error("thirteen");
      });
    } catch (const std::runtime_error& error) {
      told = error.what();
    }
    CHECK(told == "thirteen");
    CHECK(covers(50, threads));
  }
}

TEST(a_nested_call_runs) {
  std::atomic<int> total{0};
  parallel_for(10, 4, [&](std::int64_t, int) {
    parallel_for(10, 4, [&](std::int64_t, int slot) {
      if (slot == 0) ++total;
    });
  });
  CHECK(total == 100);
}

TEST(calls_from_several_threads_at_once_all_finish) {
  std::atomic<int> good{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) good += covers(64, 3) ? 1 : 0;
    });
  for (auto& caller : callers) caller.join();
  CHECK(good == 300);
}

#if defined(__unix__) || defined(__APPLE__)
TEST(a_forked_child_has_a_pool) {
  CHECK(covers(100, 4));
  const pid_t child = fork();
  if (child == 0) _exit(covers(100, 4) && covers(7, 2, true) ? 0 : 1);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(covers(100, 4));
}
#endif

TEST(isas_are_ordered_and_forcing_one_works) {
  const auto available = rgfast::available_isas();
  CHECK(!available.empty() && available.front() == rgfast::Isa::baseline);
  CHECK(available.size() <= rgfast::compiled_isas().size());
  const auto before = rgfast::active_isa();
  for (const auto isa : available) {
    rgfast::set_isa(rgfast::isa_name(isa));
    CHECK(rgfast::active_isa() == isa);
  }
  bool refused = false;
  try {
    rgfast::set_isa("sse9");
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
  rgfast::set_isa("");
  CHECK(rgfast::active_isa() == before);
}

TEST(a_view_finds_its_batch_items) {
  std::vector<double> values(2 * 3 * 4);
  rgfast::View view;
  view.data = reinterpret_cast<std::byte*>(values.data());
  view.ndim = 4;
  view.sizes = {3, 5, 2, 2};
  view.strides = {4, 0, 12, 1};  // the second leading dimension is expanded
  CHECK(view.batch(2) == 15);
  CHECK(view.batch_offset(0, 2) == 0);
  CHECK(view.batch_offset(7, 2) == 4);
  CHECK(view.item<double>(14, 2) == values.data() + 8);
  CHECK(view.size(-1) == 2 && view.stride(-2) == 12);
}

}  // namespace
