#include "fiber.h"

#include <cstdint>

namespace machine {

#ifdef MACHINE_OWN_SWITCH

extern "C" void machine_switch(void** save, void* load);
// Saves what the System V ABI has callees keep, changes stacks, and returns on the other one.
asm(R"(
.text
.globl machine_switch
.hidden machine_switch
.type machine_switch,@function
machine_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void prepare(Context& c, void* stack, size_t bytes, void (*entry)()) {
  void** top = (void**)((char*)stack + bytes);
  *--top = nullptr;  // entry's return address: it begins as if it had been called, with an aligned stack
  *--top = (void*)entry;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}

void switch_context(Context& from, Context& to) { machine_switch(&from.stack_pointer, to.stack_pointer); }

#else

void prepare(Context& c, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace machine
