// A thread of a block as a fiber: its own stack, switched by hand.
#pragma once

#include <cstddef>

// x86-64 saves six registers; elsewhere, or where a build asks for it, ucontext takes its place at a fifth of the
// speed.
#if defined(__x86_64__) && !defined(MACHINE_UCONTEXT)
#define MACHINE_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace machine {

struct Context {
#ifdef MACHINE_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Makes `c` begin with `entry`, which must never return, on the stack [stack, stack + bytes).
void prepare(Context& c, void* stack, size_t bytes, void (*entry)());

// Leaves `from` here and goes on where `to` was left.
void switch_context(Context& from, Context& to);

}  // namespace machine
