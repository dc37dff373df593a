// What a kernel sees of a tensor: a pointer, sizes, element strides and a dtype code.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace rgfast {

// The codes are part of the binding: rgfast/native.py holds the same table.
enum class DType : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

inline std::size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
  }
  throw std::invalid_argument("unknown dtype code");
}

inline constexpr int kMaxDims = 16;

// Strides count elements, may be 0 or negative, and mean nothing in a dimension of size 1.
struct View {
  std::byte* data = nullptr;
  DType dtype = DType::f64;
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> sizes{};
  std::array<std::int64_t, kMaxDims> strides{};

  std::int64_t size(int dim) const { return sizes[static_cast<std::size_t>(dim < 0 ? dim + ndim : dim)]; }
  std::int64_t stride(int dim) const { return strides[static_cast<std::size_t>(dim < 0 ? dim + ndim : dim)]; }

  // How many items the leading dimensions hold when the last `kept` belong to one item.
  std::int64_t batch(int kept) const {
    std::int64_t count = 1;
    for (int dim = 0; dim < ndim - kept; ++dim) count *= size(dim);
    return count;
  }

  // Element offset of batch item `index`, the leading dimensions taken in row-major order.
  std::int64_t batch_offset(std::int64_t index, int kept) const {
    std::int64_t offset = 0;
    for (int dim = ndim - kept - 1; dim >= 0; --dim) {
      offset += index % size(dim) * stride(dim);
      index /= size(dim);
    }
    return offset;
  }

  template <class T>
  T* item(std::int64_t index, int kept) const {
    return reinterpret_cast<T*>(data) + batch_offset(index, kept);
  }
};

}  // namespace rgfast
