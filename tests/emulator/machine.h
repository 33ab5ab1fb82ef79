// The emulated machine: grids, their blocks and threads, and who waits for what. scheduler.cpp runs it, waits.cpp has what threads wait for.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace emulator {

constexpr size_t window_bytes = 256 << 10, stack_bytes = 256 << 10, page = 4096;
constexpr int most_blocks = 16;  // of a kernel at a time: there are only so many places for stacks
constexpr size_t reserved_bytes = 1024;    // of a block's shared memory, by the system: no address is 0
constexpr size_t usable_bytes = 228 << 10;  // of all of it, on Hopper
constexpr uint8_t poison = 0xff;           // NaN, and -1: what nobody wrote

struct Fiber;
struct Block;
using Waiting = std::vector<Fiber*>;

struct Meeting {  // of all of a number of threads, again and again
    const char* what = nullptr;
    int arrived = 0;
    uint64_t values[2][warp_size];  // of this time and the last, which some may not have read yet
    int time = 0;
    void* given[warp_size];
    Waiting waiting;
};

struct Warp {
    Meeting meeting;
    std::deque<Fiber*> ready;
    int number = 0;  // in its block
    std::vector<std::function<void()>> open;  // products that were ordered since the last commit
    std::deque<std::vector<std::function<void()>>> committed;
    uint64_t products = 0;  // a digest of what was multiplied
};

struct Gate {  // a barrier that counts
    int arrived = 0;
    Waiting waiting;
};

struct Fiber {
    void* stack_end = nullptr;
    char* stack = nullptr;
    Place place{};
    uint3 thread{};
    Block* block = nullptr;
    int number = 0;
    const char* waits_for = "";
    uint32_t detail = 0;
    // copies of its own: how many were ordered and done, and how many there were at each commit
    std::deque<std::function<void()>> copies;
    int64_t ordered = 0, done = 0;
    std::deque<int64_t> commits;

    void copy_until(int64_t count) {
        for (; done < count; ++done) {
            copies.front()();
            copies.pop_front();
        }
    }
};

struct Cluster {
    std::vector<Block*> blocks;
    Gate gate;
};

struct Launched {  // a grid, or a copy that the stream does
    Grid grid;
    std::function<void()> thread;  // or the copy
    bool is_copy = false;
    Launched* before = nullptr;
    int64_t count = 0, begun = 0, ended = 0, let = 0;  // blocks; those that let the next grid begin, or have ended
    std::vector<Warp*> ready;  // those with threads that can run
    Waiting for_end;
    Gate gate;
    std::vector<std::unique_ptr<Cluster>> clusters;

    int64_t live() const { return begun - ended; }
    bool complete() const { return ended == count; }
};

struct Block {
    uint3 index{};
    Launched* launched = nullptr;
    Cluster* cluster = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Gate named[16];
    int live = 0, any = 0;
    int copies_under_way = 0;
    bool let = false, waited = false;
    uint32_t window = 0;
    size_t used = 0;
    std::map<const void*, void*> statics;
};

struct Given {};  // up: on the stack that begins and ends blocks

struct Job {
    std::function<void()> work;
    Block* block;
};

struct Machine {
    std::deque<std::unique_ptr<Launched>> stream;
    Fiber* running = nullptr;
    void* main_stack = nullptr;
    std::vector<Job> jobs;
    std::unordered_map<uint32_t, Waiting> barriers;
    std::unordered_map<const int32_t*, Waiting> counters;  // in global memory
    std::vector<std::unique_ptr<Block>> blocks;  // that live
    Block* ended = nullptr;
    Warp* last = nullptr;  // that ran, and its grid
    Launched* last_grid = nullptr;
    int held = 0, turns = 0;
    uint32_t random = 1;
};

extern Machine machine;

inline Warp& warp_of(Fiber* fiber) { return fiber->block->warps[static_cast<size_t>(fiber->number / warp_size)]; }
void make_ready(Fiber* fiber);
void wake(Waiting& waiting);
// Until somebody wakes those that wait. `what` is said when nobody can run.
void wait(Waiting& waiting, const char* what, uint32_t detail = 0);

}  // namespace emulator
