// Scratch memory of a whole call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rgfast::residual_mlp {

// Calls come by the thousand with the same sizes, and fresh pages cost more than the arithmetic of a small
// block: each calling thread keeps its last workspace, unless it is larger than `most_kept` bytes.
class Workspace {
 public:
  explicit Workspace(std::int64_t floats, std::size_t most_kept = std::size_t{64} << 20) {
    const std::size_t bytes = static_cast<std::size_t>(floats) * sizeof(float);
    if (bytes > most_kept) {
      own_.reset(allocate(bytes));
      memory_ = own_.get();
      return;
    }
    thread_local std::unique_ptr<float, Free> kept;
    thread_local std::size_t held = 0;
    if (held < bytes) {
      kept.reset();
      held = 0;
      kept.reset(allocate(bytes));
      held = bytes;
    }
    memory_ = kept.get();
  }
  float* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };
  static float* allocate(std::size_t bytes) { return static_cast<float*>(::operator new(bytes, kAlignment)); }
  std::unique_ptr<float, Free> own_;
  float* memory_ = nullptr;
};

// Whether the products of so many elements of x take long enough for threads that may first have to be woken.
inline bool lengthy(std::int64_t elements, std::int64_t hidden) {
  return elements * hidden >= std::int64_t{1} << 25;
}

inline std::int64_t aligned(std::int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace rgfast::residual_mlp
