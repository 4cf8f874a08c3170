// What the loops of tiles share: unrolling, and fetching ahead.
#pragma once

#include <sgl_kernel/kvtuner/kv_codec.h>
#include <sgl_kernel/kvtuner/cpu/simd.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// Loops over accumulators must be unrolled for them to stay in registers.
#define KVTUNER_UNROLL _Pragma("GCC unroll 16")

// A tile is a function of its own; what chooses it is not, since structs that are copied on the way cost a third of a
// tile.
#define KVTUNER_INLINE __attribute__((always_inline)) inline
#define KVTUNER_TILE __attribute__((noinline))

// x, at a place of which the compiler knows nothing: its members are loaded where they are used, instead of being kept
// through a loop that needs all registers.
template <class T>
KVTUNER_INLINE const T& anew(const T& x) {
  const T* p = &x;
  asm("" : "+r"(p));
  return *p;
}

// Lines of blocks that are read later. A core waits for some two dozen lines at a time and stands still when more are
// asked for: they have to be fetched in even steps, in all that is done meanwhile.
class Fetch {
 public:
  Fetch() : Fetch(nullptr, 0, 0) {}
  // The first `lines` of each block.
  Fetch(const uint8_t* const* block, int blocks, int lines)
      : block_(block), blocks_(lines ? blocks : 0), lines_(lines) {}

  int left() const { return blocks_ * lines_ - line_; }

  // Steps will be so many, and take so many lines together.
  void pace(int lines, int steps) {
    each_ = steps ? lines / steps : 0;
    more_ = steps ? lines % steps : 0;
  }

  KVTUNER_INLINE void step() {
    for (int n = each_ + (more_-- > 0); n > 0 && blocks_; --n) {
      __builtin_prefetch(*block_ + line_ * kVectorBytes, 0, 3);
      if (++line_ < lines_) continue;
      line_ = 0;
      ++block_;
      --blocks_;
    }
  }

 private:
  const uint8_t* const* block_;
  int blocks_, lines_;
  int line_ = 0, each_ = 0, more_ = 0;
};

inline void fetch_lines(const uint8_t* from, int count) {
  for (int i = 0; i < count; ++i) __builtin_prefetch(from + i * kVectorBytes, 0, 3);
}

#define KVTUNER_INLINE_LAMBDA __attribute__((always_inline))

// Calls f(count), compiled apart for the usual page: unrolled, a loop over four vectors takes half as long.
template <class Function>
KVTUNER_INLINE void usual_count(int count, const Function& f) {
  if (count == 64)
    f(64);
  else
    f(count);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<0>) to f(Constant<COUNT - 1>).
template <int COUNT, class Function>
KVTUNER_INLINE void each_plane(const Function& f) {
  if constexpr (COUNT > 1) each_plane<COUNT - 1>(f);
  f(Constant<COUNT - 1>{});
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
