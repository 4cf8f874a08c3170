// Runs a grid: blocks one after another, the threads of a block as fibers.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace machine {

Options options;
Thread* current = nullptr;
uint32_t block_epoch;
uint8_t* shared_begin = nullptr;
size_t shared_size;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kIdleRounds = 1000;  // a seeded order may leave a warp out for a while

std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<uint8_t> shared_memory_;
Context scheduler;
uint8_t* stacks = nullptr;
size_t stack_bytes;
const uint8_t* caller_stack;
uint3 block_index_;
int alive, waiting;
uint64_t progress;
bool abandoned;
void (*body_)(const void*);
const void* arguments_;
uint32_t random_;

void thread_main() {
  body_(arguments_);
  Thread& me = *current;
  if (!me.open.empty() || !me.pending.empty()) report("a thread ends with copies under way");
  if (me.warp->arrived)
    abandon("a lane ends while others of its warp wait, operation", me.lane, (int)me.warp->operation);
  me.done = true;
  --me.warp->live, --alive;
  note_progress();
  for (;;) yield();
}

void make_stacks(size_t count) {
  if (stack_bytes >= count * kStackBytes) return;
  if (stacks) munmap(stacks, stack_bytes);
  stack_bytes = count * kStackBytes;
  stacks =
      (uint8_t*)mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

// The place of a warp or lane in this round.
size_t place(size_t i, size_t count) {
  if (options.order == 0) return i;
  if (options.order == 1) return count - 1 - i;
  random_ = random_ * 1664525u + 1013904223u;
  return (random_ >> 8) % count;
}

void run_warp(size_t warp) {
  const size_t turn = options.order > 1 ? place(0, kLanes) : 0;
  for (size_t i = 0; i < kLanes && !abandoned; ++i) {
    const size_t lane = options.order == 1 ? kLanes - 1 - i : i ^ turn, index = warp * kLanes + lane;
    if (index >= threads.size() || threads[index].done || threads[index].at_block_barrier) continue;
    current = &threads[index];
    switch_context(scheduler, current->context);
    current = nullptr;
  }
}

void release_block_barrier() {
  if (alive != (int)threads.size())
    report("%d threads ended before a barrier of the block", (int)threads.size() - alive);
  ++block_epoch, waiting = 0;
  note_progress();
  for (Thread& t : threads) t.at_block_barrier = false;
}

void run_block(int count) {
  memset(shared_begin, 0xff, shared_size);  // NaN, so that what was not copied cannot pass for zero
  reset_shared_checks();
  warps.assign((count + kLanes - 1) / kLanes, Warp());
  threads.assign(count, Thread());
  block_epoch = 1, waiting = 0, alive = count;
  for (int i = 0; i < count; ++i) {
    threads[i].index = i, threads[i].lane = i % kLanes, threads[i].warp = &warps[i / kLanes];
    prepare(threads[i].context, stacks + i * kStackBytes, kStackBytes, thread_main);
  }
  for (int idle = 0; alive && !abandoned;) {
    const uint64_t before = progress;
    for (size_t i = 0; i < warps.size(); ++i) run_warp(place(i, warps.size()));
    if (alive && waiting == alive) release_block_barrier();
    idle = progress == before ? idle + 1 : 0;
    if (idle > kIdleRounds) {
      report("deadlock: %d threads are left, %d of them at a barrier of the block", alive, waiting);
      abandoned = true;
    }
  }
}

}  // namespace

void launch(uint3 grid, int count, size_t shared_bytes, void (*body)(const void*), const void* arguments) {
  make_stacks(count);
  caller_stack = (const uint8_t*)__builtin_frame_address(0);
  body_ = body, arguments_ = arguments, abandoned = false;
  random_ = options.order * 2654435761u + 1;
  shared_memory_.resize(shared_bytes + 128);
  shared_begin = (uint8_t*)(((uintptr_t)shared_memory_.data() + 127) / 128 * 128);
  shared_size = shared_bytes;
  for (uint32_t z = 0; z < grid.z; ++z)
    for (uint32_t y = 0; y < grid.y; ++y)
      for (uint32_t x = 0; x < grid.x && !abandoned; ++x) {
        block_index_ = {x, y, z};
        run_block(count);
      }
}

void yield() { switch_context(current->context, scheduler); }

void note_progress() { ++progress; }

void wait_for_block() {
  current->at_block_barrier = true;
  ++waiting;
  note_progress();
  yield();
}

void abandon(const char* what, int a, int b) {
  report("%s (%d, %d)", what, a, b);
  abandoned = true;
  for (;;) yield();
}

bool on_a_stack(const uint8_t* p) {
  return (p >= stacks && p < stacks + stack_bytes) || (p > caller_stack - (1 << 20) && p < caller_stack + (8 << 20));
}

}  // namespace machine

namespace kvtuner::cuda {

int thread_index() { return machine::current->index; }
uint3 block_index() { return machine::block_index_; }
uint8_t* shared_memory() { return machine::shared_begin; }

}  // namespace kvtuner::cuda
