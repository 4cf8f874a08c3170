// A machine that runs device code without a GPU: every CUDA thread is a fiber, the instructions of a warp are where 32
// of them meet. docs/device_machines.md says what it sees and what not.
#pragma once

#include <cstdint>
#include <vector>

#include <sgl_kernel/kvtuner/cuda/intrinsics.h>

#include "fiber.h"

namespace machine {

constexpr int kLanes = 32;

struct Options {
  // cp.async lands as late as the waits allow, which finds missing waits; else at once, which finds overwrites.
  int late_copies = 1;
  // Tensor cores cut products to a common exponent instead of adding exactly.
  int cutting_mma = 0;
  // Of warps and lanes: 0 as they are numbered, 1 reversed, else a seed.
  int order = 0;
};
extern Options options;

enum class Operation { none, mma_f16, mma_bf16, load_matrices, shuffle, any, sync_warp };

struct Copy {
  uint8_t* to;
  const uint8_t* from;
};

struct Warp {
  int arrived = 0, live = kLanes;
  uint64_t meetings = 0;
  uint32_t epoch = 1;  // counts its barriers
  Operation operation = Operation::none;
  const void* site = nullptr;  // of the call, so that lanes at different instructions are told apart
  uint32_t in[kLanes][12], out[kLanes][4];
};

struct Thread {
  Context context;
  int index = 0, lane = 0;
  Warp* warp = nullptr;
  bool done = false, at_block_barrier = false;
  std::vector<Copy> open;                  // cp.async since the last commit
  std::vector<std::vector<Copy>> pending;  // committed groups that have not been waited for
};

// ---- launch.cpp: the threads of one block after another ----
extern Thread* current;  // null outside of a launch
extern uint32_t block_epoch;
extern uint8_t* shared_begin;
extern size_t shared_size;

void launch(uint3 grid, int threads, size_t shared_bytes, void (*body)(const void*), const void* arguments);
// Lets others run until all threads that are left stand at a barrier of the block.
void wait_for_block();
void yield();
// Something happened; a round of all threads without it is a deadlock.
void note_progress();
// For what leaves the launch in no state to go on: a finding, and the launch ends.
[[noreturn]] void abandon(const char* what, int a, int b);
bool on_a_stack(const uint8_t* p);

// ---- checks.cpp: findings, and what accesses are held against ----
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
void check_access(const uint8_t* p, size_t n, bool write);
void check_copy_start(const uint8_t* to);
void reset_shared_checks();
bool checking();  // whether the kernel was built with its accesses reported

// ---- warp_instructions.cpp ----
// Copies of the current thread land until `keep` groups are left.
void land_copies(size_t keep);

}  // namespace machine
