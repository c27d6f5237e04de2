// Fibres, one for each CUDA thread, and the random numbers that order them. A part of runtime.cpp.
#ifndef VITMAE_EMULATOR_FIBRES_H
#define VITMAE_EMULATOR_FIBRES_H

#include "../ptx.cuh"

#include <cstddef>
#include <cstdlib>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace {

#ifdef __x86_64__

using Context = void*;

// Saves the callee-saved registers and the stack pointer, and continues where `to` was saved.
extern "C" void vitmae_emulator_switch(Context* from, Context to);
asm(R"(
.text
.p2align 4
.globl vitmae_emulator_switch
.hidden vitmae_emulator_switch
.type vitmae_emulator_switch, @function
vitmae_emulator_switch:
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
.size vitmae_emulator_switch, .-vitmae_emulator_switch
)");

void switch_to(Context& from, Context& to) { vitmae_emulator_switch(&from, to); }

void start_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    // As after a call: the return address is on top of a stack that was 16-byte aligned before it.
    u64* top = reinterpret_cast<u64*>(stack + bytes);
    *--top = 0;
    *--top = reinterpret_cast<u64>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    context = top;
}

#else

using Context = ucontext_t;

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void start_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#endif

// SplitMix64: enough to draw orders from.
struct Random {
    u64 state;

    u64 next() {
        u64 z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }

    u32 below(u32 bound) { return static_cast<u32>(next() % bound); }
};

}  // namespace

#endif
