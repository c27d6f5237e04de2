// A block at work: its threads, barriers, warp collectives and asynchronous copies. A part of runtime.cpp.
#ifndef VITMAE_EMULATOR_BLOCK_H
#define VITMAE_EMULATOR_BLOCK_H

#include "checks.h"

namespace {

void thread_main() {
    Emulator& emulator = *running;
    emulator.entry->call(emulator.arguments);
    emulator.threads[emulator.current].state = State::DONE;
    emulator.yield();
}

void Emulator::yield() {
    const u64* canary = reinterpret_cast<const u64*>(stacks + current * STACK_BYTES);
    if (*canary != CANARY) fault("its stack overflowed (%zu bytes)", STACK_BYTES);
    switch_to(threads[current].context, scheduler);
}

// Seed 0: as they are; 1: reversed; else shuffled.
void Emulator::order(std::vector<u32>& items) {
    if (seed == 1) std::reverse(items.begin(), items.end());
    if (seed < 2) return;
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(static_cast<u32>(i))]);
}

void Emulator::run_block() {
    block_epoch = 1;
    shared_shadow.assign(shared_bytes, SharedByte{});
    std::memset(shared, POISON, shared_bytes);
    warps.assign((thread_count + WARP - 1) / WARP, Warp{0, 1});
    ready.clear();
    for (u32 i = 0; i < thread_count; ++i) {
        char* stack = stacks + i * STACK_BYTES;
        std::memcpy(stack, &CANARY, sizeof CANARY);
        threads[i].state = State::READY;
        threads[i].copies.clear();
        threads[i].groups = 0;
        start_at(threads[i].context, stack, STACK_BYTES, thread_main);
        ready.push_back(i);
    }
    do {
        order(ready);
        // Threads that a collective releases on the way are appended and run in this round too.
        for (std::size_t i = 0; i < ready.size() && !failed; ++i) {
            current = ready[i];
            switch_to(scheduler, threads[current].context);
        }
        ready.clear();
    } while (!failed && release_waiting());
}

// Passes the block barrier if every thread that is left waits at it. False: nothing is left to run.
bool Emulator::release_waiting() {
    bool stuck = false;
    u32 waiting = thread_count;
    for (u32 i = thread_count; i-- > 0;) {
        if (threads[i].state == State::AT_BLOCK_BARRIER) waiting = i;
        stuck |= threads[i].state == State::AT_COLLECTIVE;
    }
    if (stuck) report_deadlock();
    if (stuck || waiting == thread_count) return false;
    for (u32 i = waiting; i < thread_count; ++i) {
        if (threads[i].state != State::AT_BLOCK_BARRIER || same(threads[i].at, threads[waiting].at)) continue;
        message = text_of("kernel %s, block %u, thread %u: it waits at the block barrier in %s while thread %u waits at "
                          "the one in %s",
                          entry->symbol, block, i, text_of(threads[i].at).c_str(), waiting,
                          text_of(threads[waiting].at).c_str());
        failed = true;
        return false;
    }
    ++block_epoch;
    for (u32 i = 0; i < thread_count; ++i) {
        if (threads[i].state != State::AT_BLOCK_BARRIER) continue;
        threads[i].state = State::READY;
        ready.push_back(i);
    }
    return true;
}

// Some lane waits at a warp collective that not all of its warp will reach.
void Emulator::report_deadlock() {
    u32 waiting = 0;
    while (threads[waiting].state != State::AT_COLLECTIVE) ++waiting;
    const u32 first = waiting / WARP * WARP;
    u32 missing = first;
    while (missing < first + WARP && missing < thread_count && threads[missing].state == State::AT_COLLECTIVE) ++missing;
    const char* where = "the block is too small to have it";
    if (missing < thread_count && missing < first + WARP) {
        where = threads[missing].state == State::DONE ? "it has returned" : "it waits at a block barrier";
    }
    message = text_of("kernel %s, block %u, thread %u: lane %u waits at %s, and lane %u never arrives: %s", entry->symbol,
                      block, waiting, waiting % WARP, name_of(threads[waiting].collective), missing % WARP, where);
    failed = true;
}

float of_bf16(u32 bits) {
    const u32 wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Fragments to matrices, the product, and back. A GPU adds the sixteen products of an element in an order and with a
// rounding of its own; here they are added in f64 and rounded once.
void multiply(Thread* lanes) {
    float a[16][16], b[16][8];
    for (u32 lane = 0; lane < WARP; ++lane) {
        const u32 row = lane / 4, column = 2 * (lane % 4);
        const u32 left[4] = {lanes[lane].a.x, lanes[lane].a.y, lanes[lane].a.z, lanes[lane].a.w};
        for (u32 half = 0; half < 2; ++half) {
            const u32 shift = 16 * half;
            for (u32 i = 0; i < 4; ++i) {
                a[row + 8 * (i % 2)][column + half + 8 * (i / 2)] = of_bf16(left[i] >> shift & 0xffff);
            }
            for (u32 i = 0; i < 2; ++i) b[column + half + 8 * i][row] = of_bf16(lanes[lane].b[i] >> shift & 0xffff);
        }
    }
    for (u32 lane = 0; lane < WARP; ++lane) {
        const u32 row = lane / 4, column = 2 * (lane % 4);
        const auto add = [&](float& sum, u32 i, u32 j) {
            double value = sum;
            for (u32 k = 0; k < 16; ++k) value += static_cast<double>(a[i][k]) * b[k][j];
            sum = static_cast<float>(value);
        };
        f32x4& sum = lanes[lane].sum;
        add(sum.x, row, column);
        add(sum.y, row, column + 1);
        add(sum.z, row + 8, column);
        add(sum.w, row + 8, column + 1);
    }
}

// Each row is read on behalf of the lane that gave its address and, as all lanes get some of it, of one more; then it counts
// as read by several.
void Emulator::ldmatrix_x4(u32 warp, bool transposed) {
    Thread* lanes = &threads[warp * WARP];
    u16 elements[4][8][8];
    const u32 last = current;
    for (u32 lane = 0; lane < WARP; ++lane) {
        current = warp * WARP + lane;
        const u64 address = reinterpret_cast<u64>(lanes[lane].row);
        const u64 start = reinterpret_cast<u64>(shared);
        if (address % 16 != 0) fault("a matrix row at an address that is not a multiple of 16");
        if (!is_shared(address)) {
            fault("a matrix row at an address outside shared memory");
        }
        check(address, 16, false);
        current ^= 1;
        check(address, 2, false);
        for (u64 i = address - start; i < address - start + 16; ++i) shared_shadow[i].reader = SharedByte::MANY;
        std::memcpy(elements[lane / 8][lane % 8], lanes[lane].row, 16);
    }
    current = last;
    for (u32 lane = 0; lane < WARP; ++lane) {
        u32 words[4];
        for (u32 matrix = 0; matrix < 4; ++matrix) {
            const auto& m = elements[matrix];
            const u32 row = lane / 4, column = 2 * (lane % 4);
            const u32 low = transposed ? m[column][row] : m[row][column];
            const u32 high = transposed ? m[column + 1][row] : m[row][column + 1];
            words[matrix] = low | high << 16;
        }
        lanes[lane].loaded = {words[0], words[1], words[2], words[3]};
    }
}

u32 Emulator::collective(Collective kind, u32 operand, u32 selector, const Place& at) {
    Thread& thread = threads[current];
    thread.at = at;
    thread.collective = kind;
    thread.operand = operand;
    thread.selector = selector;
    thread.state = State::AT_COLLECTIVE;
    Warp& warp = warps[current / WARP];
    if (++warp.arrived == WARP) complete(current / WARP);
    if (thread.state == State::AT_COLLECTIVE) yield();
    return thread.result;
}

// All lanes have arrived: compute for all of them. The last one simply goes on.
void Emulator::complete(u32 warp) {
    Thread* lanes = &threads[warp * WARP];
    const Collective kind = threads[current].collective;
    u32 votes = 0;
    for (u32 lane = 0; lane < WARP; ++lane) {
        if (lanes[lane].collective != kind) {
            fault("lane %u is at %s while lane %u is at %s", current % WARP, name_of(kind), lane,
                  name_of(lanes[lane].collective));
        }
        if (!same(lanes[lane].at, threads[current].at)) {
            fault("lane %u is at %s in %s while lane %u is at another one in %s", current % WARP, name_of(kind),
                  text_of(threads[current].at).c_str(), lane, text_of(lanes[lane].at).c_str());
        }
        votes |= (lanes[lane].operand != 0 ? 1u : 0u) << lane;
    }
    for (u32 lane = 0; lane < WARP; ++lane) {
        const u32 selector = lanes[lane].selector;
        switch (kind) {
            case Collective::WARP_BARRIER: lanes[lane].result = 0; break;
            case Collective::SHUFFLE: lanes[lane].result = lanes[selector % WARP].operand; break;
            case Collective::SHUFFLE_XOR: lanes[lane].result = lanes[(lane ^ selector) % WARP].operand; break;
            case Collective::BALLOT: lanes[lane].result = votes; break;
            default: break;
        }
    }
    if (kind == Collective::MMA_M16N8K16) multiply(lanes);
    if (kind == Collective::LDMATRIX_X4) ldmatrix_x4(warp, false);
    if (kind == Collective::LDMATRIX_X4_TRANSPOSED) ldmatrix_x4(warp, true);
    if (kind == Collective::WARP_BARRIER) ++warps[warp].epoch;
    warps[warp].arrived = 0;
    std::vector<u32> released;
    for (u32 lane = 0; lane < WARP; ++lane) {
        lanes[lane].state = State::READY;
        if (warp * WARP + lane != current) released.push_back(warp * WARP + lane);
    }
    order(released);
    ready.insert(ready.end(), released.begin(), released.end());
}

// The bytes arrive at a moment that nobody knows: read now or at the wait, and not to be touched in between.
void Emulator::issue_copy(void* target, const void* source, bool valid) {
    const u64 to = reinterpret_cast<u64>(target), from = reinterpret_cast<u64>(source);
    const u64 start = reinterpret_cast<u64>(shared);
    if (to % 16 != 0 || from % 16 != 0) fault("copy_async_16 between addresses that are not multiples of 16");
    if (to < start || to + 16 > start + shared_bytes) fault("copy_async_16 to an address outside shared memory");
    if (!is_global(from)) fault("copy_async_16 from an address outside global memory");
    if (valid) check(from, 16, false);
    check(to, 16, true);
    Thread& thread = threads[current];
    AsyncCopy copy{static_cast<u8*>(target), static_cast<const u8*>(source), random.below(2) == 0, !valid, thread.groups, {}};
    if (valid) std::memcpy(copy.bytes, source, 16);
    std::memset(target, POISON, 16);
    for (u64 i = 0; i < 16; ++i) shared_shadow[to - start + i].in_flight = true;
    thread.copies.push_back(copy);
}

// Lands this thread's copies, except those of the `pending` newest groups.
void Emulator::land_copies(u32 pending) {
    Thread& thread = threads[current];
    const auto lands = [&](const AsyncCopy& copy) { return copy.group + pending < thread.groups; };
    for (const AsyncCopy& copy : thread.copies) {
        if (!lands(copy)) continue;
        const u64 to = reinterpret_cast<u64>(copy.target);
        std::memcpy(copy.target, copy.early || copy.zero ? copy.bytes : copy.source, 16);
        for (u64 i = 0; i < 16; ++i) shared_shadow[to - reinterpret_cast<u64>(shared) + i].in_flight = false;
        check(to, 16, true);
    }
    std::erase_if(thread.copies, lands);
}

}  // namespace

#endif
