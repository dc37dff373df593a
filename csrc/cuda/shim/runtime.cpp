#include "cuda/shim/runtime.hpp"

#include <cstring>

#include "cuda/shim/scheduler.hpp"

namespace rgfast::shim {
namespace {

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string hexadecimal(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

void wait_at(const char* what, Site site) {
  self().what = what;
  self().site = site;
  runner->suspend();
}

// What threads that meet wrote before is what all of them see after: who comes last has seen it and tells the
// others. For TSan; a place per thread, since at a barrier's own the fast threads would tell the slow ones of
// what they write after it.
void arrives([[maybe_unused]] Thread& me) { RGFAST_TSAN_ONLY(__tsan_release(&me.arrival);) }
void comes_last([[maybe_unused]] const std::vector<Thread*>& others) {
  RGFAST_TSAN_ONLY(for (Thread* other : others) __tsan_acquire(&other->arrival);
                   for (Thread* other : others) __tsan_release(&other->departure);)
}
void goes_on([[maybe_unused]] Thread& me) { RGFAST_TSAN_ONLY(__tsan_acquire(&me.departure);) }

// Waits until all lanes of the mask are here; true in the one that comes last, which has left the others
// asleep.
bool meet(const char* what, Site site, unsigned mask) {
  Thread& me = self();
  Warp& warp = me.block->warps[me.linear / kLanes];
  const unsigned mine = 1U << (me.linear % kLanes);
  const auto refuse = [&](const std::string& reason) {
    fail(std::string(what) + " at " + text(site) + ", " + place(me) + ": " + reason);
  };
  if ((mask & mine) == 0) refuse("the mask " + hexadecimal(mask) + " does not name the lane that calls");
  if (warp.lanes.size() < kLanes && mask >> warp.lanes.size() != 0)
    refuse("the mask " + hexadecimal(mask) + " names lanes that this warp of " +
           std::to_string(warp.lanes.size()) + " threads does not have");
  for (const Thread* other : warp.lanes) {
    const unsigned bit = 1U << (other->linear % kLanes);
    if ((warp.waiting & bit) == 0 || ((mask & bit) == 0 && (other->mask & mine) == 0)) continue;
    if (other->mask != mask || other->what != what || !same(other->site, site))
      refuse("lane " + std::to_string(me.linear % kLanes) + " comes with mask " + hexadecimal(mask) +
             ", while lane " + std::to_string(other->linear % kLanes) + " waits in " + other->what + " at " +
             text(other->site) + " with mask " + hexadecimal(other->mask));
  }
  me.what = what;
  me.site = site;
  me.mask = mask;
  warp.waiting |= mine;
  if ((warp.waiting & mask) == mask) return true;
  runner->suspend();
  return false;
}

template <class Function>
void for_other_lanes(unsigned mask, Function&& function) {
  Thread& me = self();
  for (Thread* other : me.block->warps[me.linear / kLanes].lanes)
    if (other != &me && (mask >> (other->linear % kLanes) & 1U) != 0) function(other);
}

void part(unsigned mask) {
  self().block->warps[self().linear / kLanes].waiting &= ~mask;
  for_other_lanes(mask, [](Thread* other) { runner->wake(other); });
}

}  // namespace

// Caught where the thread began: what it has on its stack is released.
void fail(const std::string& sentence) { throw Error(sentence); }

void fail_shuffle(int lane, int source) {
  fail(std::string(self().what) + " at " + text(self().site) + ", block " + text(blockIdx) + ": lane " +
       std::to_string(lane) + " asks for the value of lane " + std::to_string(source) + ", which the mask " +
       hexadecimal(self().mask) + " does not name");
}

int lane() { return static_cast<int>(self().linear % kLanes); }

// Orders no memory, as on a GPU.
void warp_collective(const char* what, Site site, unsigned mask, const void* in, void* out, Combine combine) {
  const Unseen shim;
  Thread& me = self();
  me.in = in;
  me.out = out;
  if (!meet(what, site, mask)) return;
  const void* all_in[kLanes] = {};
  void* all_out[kLanes] = {};
  for (Thread* lane : me.block->warps[me.linear / kLanes].lanes) {
    all_in[lane->linear % kLanes] = lane->in;
    all_out[lane->linear % kLanes] = lane->out;
  }
  combine(mask, all_in, all_out);
  part(mask);
}

void warp_barrier(const char* what, Site site, unsigned mask) {
  const Unseen shim;
  arrives(self());
  if (!meet(what, site, mask)) {
    goes_on(self());
    return;
  }
  RGFAST_TSAN_ONLY(std::vector<Thread*> others;
                   for_other_lanes(mask, [&](Thread* other) { others.push_back(other); });
                   comes_last(others);)
  part(mask);
}

Votes block_barrier(const char* what, Site site, unsigned id, unsigned threads, bool vote) {
  const Unseen shim;
  Thread& me = self();
  Block& block = *me.block;
  if (id >= kBarriers)
    fail(std::string(what) + " at " + text(site) + ": there are 16 barriers, this is " + std::to_string(id));
  Barrier& barrier = block.barriers[id];
  const auto in_block = static_cast<unsigned>(block.warps.size() - 1) * kLanes +
                        static_cast<unsigned>(block.warps.back().lanes.size());
  if (threads == 0) threads = in_block;
  if (id != 0 && (threads % kLanes != 0 || threads > in_block))
    fail(std::string(what) + " at " + text(site) + ": the threads must be whole warps of the block, not " +
         std::to_string(threads) + " of " + std::to_string(in_block));
  if (barrier.waiting.empty()) {
    barrier.threads = threads;
    barrier.votes = {0, 0};
    barrier.first.assign(block.warps.size(), Site{"", 0});
  }
  Site& first = barrier.first[me.linear / kLanes];
  if (first.line == 0) first = site;
  if (barrier.threads != threads)
    fail(std::string(what) + " at " + text(site) + ", " + place(me) + ": barrier " + std::to_string(id) +
         " awaits " + std::to_string(barrier.threads) + " threads, this one says " + std::to_string(threads));
  if (!same(first, site))
    fail(std::string(what) + ", " + place(me) +
         ": the threads of one warp diverge: some came to the barrier at " + text(first) + ", this one at " +
         text(site));
  ++barrier.votes.threads;
  barrier.votes.nonzero += vote ? 1U : 0U;
  if (barrier.votes.threads == threads) {
    me.votes = barrier.votes;
    for (Thread* other : barrier.waiting) other->votes = barrier.votes;
    comes_last(barrier.waiting);
    runner->wake_all(barrier.waiting);
  } else {
    arrives(me);
    barrier.waiting.push_back(&me);
    wait_at(what, site);
    goes_on(me);
  }
  return me.votes;
}

void cluster_arrive(Site site) {
  const Unseen shim;
  Thread& me = self();
  if (me.arrived_at_cluster)
    fail("cluster_arrive at " + text(site) + ", " + place(me) +
         ": it has arrived already and must wait first");
  me.arrived_at_cluster = true;
  me.cluster_phase = runner->cluster_phase_;
  RGFAST_TSAN_ONLY(__tsan_release(&runner->cluster_arrivals_[me.cluster_phase % 2]);)
  std::size_t total = 0;
  for (const auto& block : runner->blocks_)
    for (const auto& warp : block->warps) total += warp.lanes.size();
  if (++runner->cluster_.votes.threads < total) return;
  runner->cluster_.votes.threads = 0;
  ++runner->cluster_phase_;
  runner->wake_all(runner->cluster_.waiting);
}

void cluster_wait(Site site) {
  const Unseen shim;
  Thread& me = self();
  if (!me.arrived_at_cluster)
    fail("cluster_wait at " + text(site) + ", " + place(me) + ": it has not arrived");
  me.arrived_at_cluster = false;
  if (me.cluster_phase == runner->cluster_phase_) {
    runner->cluster_.waiting.push_back(&me);
    wait_at("cluster_wait", site);
  }
  RGFAST_TSAN_ONLY(__tsan_acquire(&runner->cluster_arrivals_[me.cluster_phase % 2]);)
}

unsigned cluster_rank() { return self().block->rank; }

unsigned cluster_size() { return runner->launch_.cluster; }

std::byte* shared_memory() { return self().block->shared; }

std::byte* peer_memory(void* mine, unsigned rank, Site site) {
  const std::ptrdiff_t offset = static_cast<std::byte*>(mine) - self().block->shared;
  const std::string where = "cluster_map at " + text(site) + ", " + place(self()) + ": ";
  if (rank >= runner->launch_.cluster)
    fail(where + "there is no block of rank " + std::to_string(rank) + " in a cluster of " +
         std::to_string(runner->launch_.cluster));
  if (offset < 0 || static_cast<std::size_t>(offset) > runner->launch_.shared)
    fail(where + "the pointer is outside the block's shared memory");
  return runner->blocks_[rank]->shared + offset;
}

void publish(int* flag, int value) {
  const Unseen shim;
  RGFAST_TSAN_ONLY(__tsan_release(flag);)
  *flag = value;
  runner->wake_all(runner->watching_);
}

void wait_for(const int* flag, int at_least, Site site) {
  const Unseen shim;
  while (*flag < at_least) {
    runner->watching_.push_back(&self());
    wait_at("wait_for", site);
  }
  RGFAST_TSAN_ONLY(__tsan_acquire(const_cast<int*>(flag));)
}

void copy_async(void* to, const void* from, std::size_t bytes, std::size_t filled) {
  const auto misaligned = [&](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % bytes != 0;
  };
  if (filled > bytes || misaligned(to) || misaligned(from))
    fail(place(self()) + ": an asynchronous copy of " + std::to_string(filled) + " of " +
         std::to_string(bytes) + " bytes, whose addresses must be multiples of " + std::to_string(bytes));
  // Until the copy is waited for its target is NaN, so that a read that comes too early shows. TSan sees
  // these writes and the copy as the thread's.
  std::memset(to, 0xff, bytes);
  if (filled < bytes) std::memset(static_cast<std::byte*>(to) + filled, 0, bytes - filled);
  self().copies.back().push_back({static_cast<std::byte*>(to), static_cast<const std::byte*>(from), filled});
}

void copy_async_commit() { self().copies.emplace_back(); }

void copy_async_wait(std::size_t newest) {
  auto& copies = self().copies;
  while (copies.size() > newest + 1) {
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.filled);
    copies.erase(copies.begin());
  }
}

}  // namespace rgfast::shim
