// What threads wait for: barriers, their warp, copies and products.
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

void pass(Gate& gate, int threads, const char* what, uint32_t detail, bool waits) {
    if (++gate.arrived > threads) fail("%s %u: more than %d threads came", what, detail, threads);
    if (gate.arrived == threads) {
        gate.arrived = 0;
        wake(gate.waiting);
    } else if (waits) {
        wait(gate.waiting, what, detail);
    }
}

// Comes back when all have come. Whoever comes last finds the others waiting.
template <typename Last>
void meet(Meeting& meeting, const char* what, Last&& last) {
    if (meeting.arrived > 0 && meeting.what != what && std::strcmp(meeting.what, what) != 0) {
        fail("lanes of a warp part: %s and %s, block %u thread %d", meeting.what, what, blockIdx.x, machine.running->number);
    }
    meeting.what = what;
    if (++meeting.arrived < warp_size) {
        wait(meeting.waiting, what);
        return;
    }
    last();
    meeting.arrived = 0;
    ++meeting.time;
    wake(meeting.waiting);
}

// An mbarrier's eight bytes.
struct Barrier {
    uint64_t mark : 12, phase : 1, count : 10, pending : 10;
    int64_t bytes : 31;

    static constexpr uint64_t made = 0xba7;

    static Barrier& at(uint32_t address, const char* what) {
        if (address % 8 != 0) fail("%s: a barrier at address %u, no multiple of 8", what, address % window_bytes);
        Barrier& barrier = *reinterpret_cast<Barrier*>(size_t{address});
        if (barrier.mark != made) fail("%s: there is no barrier at address %u", what, static_cast<unsigned>(address % window_bytes));
        return barrier;
    }
    void check(uint32_t address) {
        if (pending > 0 || bytes != 0) return;
        phase ^= 1;
        pending = count;
        auto const found = machine.barriers.find(address);
        if (found != machine.barriers.end()) wake(found->second);
    }
};
static_assert(sizeof(Barrier) == 8);

}  // namespace

void block_sync() {
    Block& block = *machine.running->block;
    pass(block.named[0], block.live, "__syncthreads", 0, true);
}

int block_sync_or(int value) {
    Block& block = *machine.running->block;
    block.any |= value;
    block_sync();
    int const result = block.any;
    block_sync();
    block.any = 0;
    block_sync();
    return result;
}

void cluster_sync() {
    Cluster& cluster = *machine.running->block->cluster;
    size_t threads = 0;
    for (const Block* block : cluster.blocks) threads += static_cast<size_t>(block->live);
    pass(cluster.gate, static_cast<int>(threads), "the cluster's barrier", 0, true);
}

void grid_sync() {
    Launched& launched = *machine.running->block->launched;
    if (!launched.grid.all_at_once) fail("a barrier of the grid in a kernel whose blocks were not launched together");
    int threads = 0;
    for (auto const& block : machine.blocks) threads += block->launched == &launched ? block->live : 0;
    pass(launched.gate, threads, "the grid's barrier", 0, true);
}

void named_sync(int id, int threads) {
    pass(machine.running->block->named[id], threads, "named barrier", static_cast<uint32_t>(id), true);
}
void named_arrive(int id, int threads) {
    pass(machine.running->block->named[id], threads, "named barrier", static_cast<uint32_t>(id), false);
}

void count_up(int32_t* counter) {
    ++*counter;
    wake(machine.counters[counter]);
}
void wait_for_count(const int32_t* counter, int32_t least) {
    while (*counter < least) wait(machine.counters[counter], "a count of other blocks", static_cast<uint32_t>(least));
}

void yield() {
    machine.last = nullptr;  // others come first
    make_ready(machine.running);
    Waiting nobody;
    wait(nobody, "a moment");
}

const uint64_t* exchange(const char* what, uint64_t value) {
    Meeting& warp = warp_of(machine.running).meeting;
    uint64_t* values = warp.values[warp.time & 1];
    values[place->lane] = value;
    meet(warp, what, [] {});
    return values;
}

void together(const char* what, void* given, Work work) {
    Meeting& warp = warp_of(machine.running).meeting;
    warp.given[place->lane] = given;
    meet(warp, what, [&] { work(warp.given); });
}

void barrier_init(uint32_t address, uint32_t arrivals) {
    Barrier& barrier = *reinterpret_cast<Barrier*>(size_t{address});
    if (arrivals == 0 || arrivals > 1023) fail("a barrier of %u arrivals", arrivals);
    barrier.mark = Barrier::made;
    barrier.phase = 0;
    barrier.count = barrier.pending = arrivals;
    barrier.bytes = 0;
}

void barrier_arrive(uint32_t address, uint32_t bytes) {
    Barrier& barrier = Barrier::at(address, "an arrival");
    if (barrier.pending == 0) fail("an arrival too many at the barrier at address %u", static_cast<unsigned>(address % window_bytes));
    barrier.bytes += bytes;
    --barrier.pending;
    barrier.check(address);
}

void barrier_complete(uint32_t address, uint32_t bytes) {
    Barrier& barrier = Barrier::at(address, "a copy's end");
    barrier.bytes -= bytes;
    barrier.check(address);
}

void barrier_wait(uint32_t address, uint32_t parity) {
    while (Barrier::at(address, "a wait").phase == parity) {
        wait(machine.barriers[address], "the barrier at address", static_cast<uint32_t>(address % window_bytes));
    }
}

bool barrier_test(uint32_t address, uint32_t parity) { return Barrier::at(address, "a test").phase != parity; }

namespace {
void order_job(Block* block, std::function<void()> work) {
    if (settings.order == Order::early) {
        work();
        return;
    }
    ++block->copies_under_way;
    machine.jobs.push_back({std::move(work), block});
}
}  // namespace

void engine_copy(std::function<void()> copy) { order_job(machine.running->block, std::move(copy)); }

void thread_copy(std::function<void()> copy) {
    Fiber* self = machine.running;
    ++self->ordered;
    self->copies.push_back(std::move(copy));
    if (settings.order == Order::early) self->copy_until(self->ordered);
}
void thread_copies_commit() { machine.running->commits.push_back(machine.running->ordered); }
void thread_copies_wait(int pending) {
    Fiber* self = machine.running;
    if (pending < 0) {
        self->commits.clear();
        self->copy_until(self->ordered);
        return;
    }
    while (static_cast<int>(self->commits.size()) > pending) {
        self->copy_until(self->commits.front());
        self->commits.pop_front();
    }
}
void arrive_after_thread_copies(uint32_t barrier) {
    Fiber* self = machine.running;
    order_job(self->block, [self, count = self->ordered, barrier] {
        self->copy_until(count);
        barrier_arrive(barrier, 0);
    });
}

int warp_in_group() { return warp_of(machine.running).number % group_warps; }

void order_product(std::function<void()> product, uint64_t mark) {
    Warp& warp = warp_of(machine.running);
    warp.products = (warp.products ^ mark) * 0x100000001b3u;
    if (settings.order == Order::early) {
        product();
    } else {
        warp.open.push_back(std::move(product));
    }
}
void products_commit() {
    together("the products' commit", nullptr, [](void* const*) {
        Warp& warp = warp_of(machine.running);
        warp.committed.push_back(std::move(warp.open));
        warp.open.clear();
    });
}
void products_wait(int pending) {
    together("the products' wait", &pending, [](void* const* given) {
        Warp& warp = warp_of(machine.running);
        for (int const most = *static_cast<int*>(given[0]); static_cast<int>(warp.committed.size()) > most; warp.committed.pop_front()) {
            for (auto const& product : warp.committed.front()) product();
        }
    });
}

}  // namespace emulator
