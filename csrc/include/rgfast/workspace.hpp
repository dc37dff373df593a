// Scratch memory of a task.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace rgfast {

// Aligned to a cache line. The thread keeps one buffer of up to `kKept` bytes between calls: a fresh one
// of that size costs more in page faults than many a small task takes.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) {
    static thread_local Held kept;
    static thread_local std::size_t kept_bytes = 0;
    if (bytes > kKept) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    if (kept_bytes < bytes) {
      kept.reset();
      kept_bytes = 0;
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }

  void* data() const { return data_; }

 private:
  static constexpr std::size_t kKept = std::size_t{8} << 20;
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  using Held = std::unique_ptr<std::byte, Free>;

  static Held allocate(std::size_t bytes) {
    return Held(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
  }

  Held own_;
  void* data_ = nullptr;
};

}  // namespace rgfast
