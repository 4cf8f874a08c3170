// The vectors of the body that is compiled: sixteen lanes, under the same names for every instruction set.
//
// KVTUNER_ISA is the body's namespace, KVTUNER_SIMD the header with its vectors; plain C++ where nothing is said. Every
// header of a body opens namespace kvtuner::KVTUNER_ISA and an unnamed one in it: the code of a body stays in its
// translation unit, and the linker cannot give it to a machine without the instruction set.
#pragma once

#ifndef KVTUNER_ISA
#define KVTUNER_ISA plain
#define KVTUNER_SIMD <sgl_kernel/kvtuner/cpu/simd_plain.h>
#endif

#include KVTUNER_SIMD
