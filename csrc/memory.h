// Memory of the kernels' own: for a call, and for a thread from call to call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace lora_kernels {

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Asks for the line that `from` lies in, into the second-level cache or all. GCC 12 takes a
// function that does nothing else for one without effect and drops its calls: the empty statement
// is one.
template <int kLocality = 2>
inline void ask_for_line(const void* from) {
  __builtin_prefetch(from, 0, kLocality);
  asm volatile("");
}

// Uninitialised memory for n elements, on a cache line of its own.
template <typename T>
std::unique_ptr<T, FreeAligned> allocate(int64_t n) {
  void* memory = ::operator new(sizeof(T) * std::max<int64_t>(n, 1), std::align_val_t{64});
  return std::unique_ptr<T, FreeAligned>(static_cast<T*>(memory));
}

// Memory that a thread keeps from call to call: fresh pages would cost more than what is done in
// them.
class Scratch {
 public:
  template <typename T>
  T* of(int64_t n) {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    if (bytes > size_) {
      memory_ = allocate<char>(bytes);
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  std::unique_ptr<char, FreeAligned> memory_;
  int64_t size_ = 0;
};

// Each grows to the largest call of its thread and is freed when the thread ends, never before. The
// largest is the panel of a weight that was not packed, 64 columns of K values: 4 MiB for K = 16384
// in float32. The others depend on ranks and on blocks of fixed size and stay below 1 MiB together.
inline thread_local Scratch tile_scratch, rows_scratch, panel_scratch, tail_scratch, part_scratch;

}  // namespace lora_kernels
