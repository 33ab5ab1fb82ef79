// Runs the machine: a fiber for each thread, blocks that begin and end, and who comes next.
#include <cstdarg>
#include <cstdio>
#include <map>

#include <sys/mman.h>

#include "machine.h"

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

// Saves the registers that a call keeps on the running stack, whose end goes to *save, and takes up those of another.
extern "C" void emulator_switch(void** save, void* stack);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
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

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

const Place* place = nullptr;
Machine machine;

namespace {

std::vector<uint32_t> free_windows;
std::vector<char*> free_stacks;
std::string error;

uint32_t random_number() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 17;
    machine.random ^= machine.random << 5;
    return machine.random;
}

uint32_t take_window() {
    if (free_windows.empty()) {
        constexpr int count = 16;
        void* memory = mmap(nullptr, (count + 1) * window_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        if (memory == MAP_FAILED) fail("there is no memory below 4 GiB for shared memory");
        auto const start = (reinterpret_cast<size_t>(memory) + window_bytes - 1) / window_bytes * window_bytes;
        for (int i = 0; i < count; ++i) free_windows.push_back(static_cast<uint32_t>(start + i * window_bytes));
    }
    uint32_t const window = free_windows.back();
    free_windows.pop_back();
    std::memset(reinterpret_cast<void*>(size_t{window}), poison, usable_bytes);
    return window;
}

char* take_stack() {
    if (free_stacks.empty()) {
        void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("there is no memory for the threads' stacks");
        mprotect(memory, page, PROT_NONE);
        free_stacks.push_back(static_cast<char*>(memory));
    }
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
}

void resume(Fiber* fiber, void** save) {
    machine.running = fiber;
    place = &fiber->place;
    threadIdx = fiber->thread;
    blockIdx = fiber->block->index;
    blockDim = fiber->block->launched->grid.threads;
    gridDim = fiber->block->launched->grid.blocks;
    emulator_switch(save, fiber->stack_end);
}

}  // namespace

void make_ready(Fiber* fiber) {
    Warp& warp = warp_of(fiber);
    if (warp.ready.empty()) fiber->block->launched->ready.push_back(&warp);
    warp.ready.push_back(fiber);
}

void wake(Waiting& waiting) {
    for (Fiber* fiber : waiting) make_ready(fiber);
    waiting.clear();
}

namespace {

[[noreturn]] void leave() {
    void* nowhere;
    emulator_switch(&nowhere, machine.main_stack);
    __builtin_unreachable();
}

void say_who_waits() {
    std::map<std::string, int> reasons;
    for (auto const& block : machine.blocks) {
        for (const Fiber& fiber : block->fibers) {
            if (fiber.waits_for == nullptr) continue;
            char text[160];
            snprintf(text, sizeof text, "block %u: %s %u", block->index.x, fiber.waits_for, fiber.detail);
            ++reasons[text];
        }
    }
    std::string all;
    for (auto const& [reason, count] : reasons) all += "; " + std::to_string(count) + " of " + reason;
    fail("nobody can run%s", all.c_str());
}

// The grid whose threads run next: the last on the stream, which may have begun too early, or the first.
Launched* find_ready() {
    auto const has_ready = [](auto const& launched) { return !launched->ready.empty(); };
    auto& stream = machine.stream;
    if (settings.order == Order::late) {
        auto const found = std::find_if(stream.rbegin(), stream.rend(), has_ready);
        return found == stream.rend() ? nullptr : found->get();
    }
    auto const found = std::find_if(stream.begin(), stream.end(), has_ready);
    return found == stream.end() ? nullptr : found->get();
}

// A warp runs as far as it can. Who comes then is chance, but for four warps of each block that are held back as long as others can run;
// which four, changes now and then.
Warp* choose(Launched& launched) {
    constexpr int period = 2048, groups = 8;
    if (machine.last != nullptr && !machine.last->ready.empty()) return machine.last;
    if (settings.order == Order::early) return launched.ready.front();
    if (++machine.turns % period == 0) machine.held = static_cast<int>(random_number() % groups);
    size_t const count = launched.ready.size(), start = random_number() % count;
    for (size_t i = 0; i < count; ++i) {
        Warp* warp = launched.ready[(start + i) % count];
        if (warp->number / 4 % groups != machine.held) return warp;
    }
    return launched.ready[start];
}

// Who runs next; what the machine does beside its threads goes on when none of them can.
Fiber* take_next() {
    Launched* launched;
    while ((launched = find_ready()) == nullptr) {
        if (machine.jobs.empty()) say_who_waits();
        size_t const number = random_number() % machine.jobs.size();
        Job const job = std::move(machine.jobs[number]);
        machine.jobs.erase(machine.jobs.begin() + static_cast<int64_t>(number));
        --job.block->copies_under_way;
        job.work();
    }
    if (machine.last != nullptr && (machine.last->ready.empty() || machine.last_grid != launched)) machine.last = nullptr;
    Warp* warp = choose(*launched);
    machine.last = warp;
    machine.last_grid = launched;
    Fiber* next = warp->ready.front();
    warp->ready.pop_front();
    if (warp->ready.empty()) launched->ready.erase(std::find(launched->ready.begin(), launched->ready.end(), warp));
    return next;
}

}  // namespace

void wait(Waiting& waiting, const char* what, uint32_t detail) {
    Fiber* self = machine.running;
    self->waits_for = what;
    self->detail = detail;
    waiting.push_back(self);
    Fiber* next = take_next();
    if (next != self) resume(next, &self->stack_end);
    self->waits_for = "running";
}

namespace {

void thread_main();

void start_block(Launched* launched, Cluster* cluster, int64_t number, int rank) {
    auto block = std::make_unique<Block>();
    const Grid& grid = launched->grid;
    auto const threads = static_cast<int>(grid.threads.x * grid.threads.y * grid.threads.z);
    auto const rest = static_cast<unsigned>(number / grid.blocks.x);
    block->index = {static_cast<unsigned>(number % grid.blocks.x), rest % grid.blocks.y, rest / grid.blocks.y};
    block->launched = launched;
    block->cluster = cluster;
    block->window = take_window();
    block->used = reserved_bytes + grid.shared_bytes;
    if (block->used > usable_bytes) fail("a block has %zu bytes of shared memory, more than there are", block->used);
    block->fibers.resize(static_cast<size_t>(threads));
    block->warps.resize(static_cast<size_t>((threads + warp_size - 1) / warp_size));
    for (size_t i = 0; i < block->warps.size(); ++i) block->warps[i].number = static_cast<int>(i);
    block->live = threads;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = block->fibers[static_cast<size_t>(i)];
        auto const n = static_cast<unsigned>(i);
        fiber.thread = {n % grid.threads.x, n / grid.threads.x % grid.threads.y, n / grid.threads.x / grid.threads.y};
        fiber.place.lane = i % warp_size;
        fiber.place.cluster_rank = rank;
        fiber.place.cluster_size = grid.cluster;
        fiber.block = block.get();
        fiber.number = i;
        fiber.stack = take_stack();
        // as if thread_main had been called, and the six registers saved
        auto** top = reinterpret_cast<void**>(fiber.stack + stack_bytes) - 2;
        *top = reinterpret_cast<void*>(thread_main);
        fiber.stack_end = top - 6;
        make_ready(&fiber);
    }
    cluster->blocks.push_back(block.get());
    machine.blocks.push_back(std::move(block));
}

// A kernel that is not early waits for the one before alone, which must wait for those before it.
bool may_begin(const Launched& launched) {
    const Launched* before = launched.before;
    return before == nullptr || launched.begun > 0 || before->complete() || (launched.grid.early && before->let == before->count);
}

void start_blocks() {
    for (auto& launched : machine.stream) {
        if (launched->complete() || !may_begin(*launched)) continue;
        if (launched->is_copy) {
            launched->thread();
            launched->begun = launched->ended = launched->let = 1;
            continue;
        }
        const Grid& grid = launched->grid;
        while (launched->begun < launched->count &&
               (grid.all_at_once || launched->live() + grid.cluster <= std::max(std::min(settings.multiprocessors, most_blocks), grid.cluster))) {
            launched->clusters.push_back(std::make_unique<Cluster>());
            for (int rank = 0; rank < grid.cluster; ++rank) start_block(launched.get(), launched->clusters.back().get(), launched->begun++, rank);
        }
    }
}

void end_block(Block* block) {
    if (block->copies_under_way > 0) fail("block %u ends while copies to its shared memory are under way", block->index.x);
    if (block->launched->grid.early && !block->waited) {
        fail("block %u of a kernel that was launched early ends, and did not wait for the kernel before", block->index.x);
    }
    for (const Warp& warp : block->warps) {
        const Warp& first = block->warps[static_cast<size_t>(warp.number / group_warps * group_warps)];
        if (warp.products != first.products) fail("block %u: warps %d and %d multiply different tiles", block->index.x, first.number, warp.number);
    }
    for (Fiber& fiber : block->fibers) free_stacks.push_back(fiber.stack);
    free_windows.push_back(block->window);
    for (auto entry = machine.barriers.begin(); entry != machine.barriers.end();) {
        bool const own = entry->first / window_bytes == block->window / window_bytes;
        entry = own ? machine.barriers.erase(entry) : std::next(entry);
    }
    Launched& launched = *block->launched;
    launched.let += block->let ? 0 : 1;
    if (++launched.ended == launched.count) wake(launched.for_end);
    machine.last = nullptr;
    Cluster* cluster = block->cluster;
    cluster->blocks.erase(std::find(cluster->blocks.begin(), cluster->blocks.end(), block));
    auto const same = [&](auto const& known) { return known.get() == block; };
    machine.blocks.erase(std::find_if(machine.blocks.begin(), machine.blocks.end(), same));
}

// The last act of a thread. Its stack may be another's as soon as the block has ended, which `run` sees to on a stack of its own.
void thread_end() {
    Fiber* self = machine.running;
    Block* block = self->block;
    self->copy_until(self->ordered);
    self->waits_for = nullptr;
    --block->live;
    Gate& all = block->named[0];
    if (block->live > 0 && all.arrived == block->live && all.arrived > 0) {  // those that ended are not waited for
        all.arrived = 0;
        wake(all.waiting);
    }
    if (block->live == 0) {
        machine.ended = block;
        leave();
    }
    void* nowhere;
    resume(take_next(), &nowhere);
}

void thread_main() {
    machine.running->block->launched->thread();
    thread_end();
}


}  // namespace

Settings settings;

void fail(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error = text;
    if (machine.running == nullptr) throw Given{};
    leave();
}

std::string take_error() { return std::exchange(error, std::string()); }

void enqueue(const Grid& grid, std::function<void()> thread) {
    auto launched = std::make_unique<Launched>();
    launched->grid = grid;
    launched->thread = std::move(thread);
    launched->count = int64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
    if (grid.threads.x * grid.threads.y * grid.threads.z > 1024 || launched->count == 0 || launched->count % grid.cluster != 0) {
        error = "a launch of " + std::to_string(launched->count) + " blocks in clusters of " + std::to_string(grid.cluster);
    }
    launched->before = machine.stream.empty() ? nullptr : machine.stream.back().get();
    machine.stream.push_back(std::move(launched));
}

void enqueue_copy(std::function<void()> copy) {
    enqueue(Grid{dim3(1), dim3(1)}, std::move(copy));
    machine.stream.back()->is_copy = true;
}

void synchronize() {
    try {
        if (error.empty()) start_blocks();
        while (!machine.blocks.empty() && error.empty()) {
            machine.ended = nullptr;
            resume(take_next(), &machine.main_stack);
            machine.running = nullptr;
            if (machine.ended != nullptr) end_block(machine.ended);
            if (error.empty()) start_blocks();
        }
    } catch (const Given&) {
    }
    place = nullptr;
    if (!error.empty()) {  // what was under way is given up, and stacks and windows with it
        machine.jobs.clear();
        machine.barriers.clear();
        machine.counters.clear();
        machine.last = nullptr;
        for (auto& block : machine.blocks) static_cast<void>(block.release());
        machine.blocks.clear();
    }
    machine.stream.clear();
}

void let_next_begin() {
    Fiber* self = machine.running;
    Block* block = self->block;
    if (block->let) return;
    block->let = true;
    if (++block->launched->let < block->launched->count) return;
    make_ready(self);
    emulator_switch(&self->stack_end, machine.main_stack);
}

void wait_for_before() {
    machine.running->block->waited = true;
    Launched* before = machine.running->block->launched->before;
    if (before != nullptr && !before->complete()) wait(before->for_end, "the kernel before");
}

void end_after_before() {
    machine.running->block->waited = true;
    uint3 const& index = machine.running->block->index;
    if (index.x == 0 && index.y == 0 && index.z == 0) wait_for_before();
}

void* dynamic_shared() { return reinterpret_cast<void*>(size_t{machine.running->block->window} + reserved_bytes); }

void* static_shared(const void* declaration, size_t bytes, size_t alignment) {
    Block& block = *machine.running->block;
    void*& found = block.statics[declaration];
    if (found == nullptr) {
        size_t const start = (block.used + std::max<size_t>(alignment, 16) - 1) / std::max<size_t>(alignment, 16) * std::max<size_t>(alignment, 16);
        block.used = start + bytes;
        if (block.used > usable_bytes) fail("a block has %zu bytes of shared memory, more than there are", block.used);
        found = reinterpret_cast<void*>(block.window + start);
    }
    return found;
}

uint32_t shared_base() { return machine.running->block->window; }
uint32_t shared_base_of(int rank) {
    const Cluster& cluster = *machine.running->block->cluster;
    if (static_cast<int>(cluster.blocks.size()) != place->cluster_size) fail("a block reads from one of its cluster that has ended");
    return cluster.blocks[static_cast<size_t>(rank)]->window;
}

}  // namespace emulator
