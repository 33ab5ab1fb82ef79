// Of SM90's prefill kernel: the warps that find the block's work and tell when it is done.
//
// A stage's work is one list, which blocks take in order: heads come in bundles, and `lead` bundles further are expanded before
// attention for one begins, E(0) E(1) A(0) E(2) A(1) .. A(last). Work waits for what it needs: attention for the expansion of its
// bundle; an expansion, where `expanded` has fewer places than there are heads, for attention with those that had the places.
// What work waits for comes before it in the list, so that the first that is not done can go on.
#pragma once

#include "prefill_hopper_block.cuh"

namespace mla::prefill_hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The list of a stage.
class List {
public:
    __device__ List(const Plan& plan, const Stage& stage) : plan(plan), stage(stage) {
        int32_t const sequences = static_cast<int32_t>(plan.arguments.step.sequences), blocks = static_cast<int32_t>(gridDim.x);
        query_end = plan.query_tiles[owner(plan.key_tiles, sequences, stage.chunk_end - 1) + 1];
        query_count = query_end - plan.query_tiles[owner(plan.key_tiles, sequences, stage.chunk_start)];
        down = ceil_div((stage.chunk_end - stage.chunk_start) * key_tile, keys_of_tile);
        // so many heads that blocks end together: two units each, a long and a short one
        bundle = min(ceil_div(2 * blocks, query_count), stage.heads);
        if (plan.places < stage.heads) bundle = min(bundle, max(plan.places / least_parts, 1));
        bundles = ceil_div(stage.heads, bundle);
        parts = min(max(plan.places / bundle, 1), bundles);
        int32_t const most = min(max(down * stage.heads / blocks, 1), most_job_heads);
        job_heads = ceil_div(bundle, ceil_div(bundle, most));
        jobs = down * ceil_div(bundle, job_heads);
        units = bundle * query_count;
        lead = min(max((blocks + jobs / 2) / jobs, 1), parts - 1);
    }

    // The next work that nobody has; its kind is `none` where there is none.
    __device__ void take(Work& work) const {
        while (true) {
            int32_t rest = atomicAdd(plan.counter, 1), number;  // of a bundle
            bool expands = rest < lead * jobs;
            if (expands) {
                number = rest / jobs;
                rest %= jobs;
            } else {
                rest -= lead * jobs;
                int32_t const both = jobs + units, mixed = bundles - lead;
                number = min(rest / both, mixed);
                rest -= number * both;
                if (number < mixed) {
                    expands = rest < jobs;
                    if (expands) {
                        number += lead;
                    } else {
                        rest -= jobs;
                    }
                } else {
                    number += rest / units;
                    rest %= units;
                    if (number >= bundles) {
                        work.kind = Kind::none;
                        return;
                    }
                }
            }
            if (expands ? make_job(number, rest, work) : make_attention(number, rest, work)) return;
        }
    }

private:
    static constexpr int least_parts = 4;  // bundles that `expanded` has places for

    __device__ int32_t heads_of(int32_t number) const { return min(bundle, stage.heads - number * bundle); }
    __device__ int32_t expanded_counter(int32_t number) const { return 1 + 2 * number; }
    __device__ int32_t attended_counter(int32_t number) const { return 2 + 2 * number; }

    __device__ bool make_job(int32_t number, int32_t rest, Work& work) const {
        int32_t const first = rest / down * job_heads, heads = min(job_heads, heads_of(number) - first);
        if (heads <= 0) return false;
        if (number >= parts) wait_for_count(plan.counter + attended_counter(number - parts), units);
        work.kind = Kind::expansion;
        work.key = rest % down * keys_of_tile;
        work.head = stage.head0 + number * bundle + first;
        work.heads = heads;
        work.place = number % parts * bundle + first;
        work.keys = min((stage.chunk_end - stage.chunk_start) * key_tile - work.key, keys_of_tile);
        work.counter = expanded_counter(number);
        return true;
    }

    __device__ bool make_attention(int32_t number, int32_t rest, Work& work) const {
        int32_t const heads = heads_of(number);
        if (rest >= heads * query_count) return false;
        if (!make_unit<HopperShape::rows>(plan, rest, heads, bundle, query_end, query_count, stage.chunk_start, stage.chunk_end,
                                          work.unit)) {
            return false;
        }
        wait_for_count(plan.counter + expanded_counter(number), down * ceil_div(heads, job_heads));
        work.kind = Kind::attention;
        work.place = number % parts * bundle + work.unit.head;
        work.unit.head += number * bundle;
        work.head = stage.head0 + work.unit.head;
        work.counter = attended_counter(number);
        return true;
    }

    const Plan& plan;
    Stage stage;
    int32_t query_end, query_count;      // query tiles that see the chunk
    int32_t bundle, bundles, parts, lead;  // heads of a bundle; bundles, those that `expanded` has places for
    int32_t down, job_heads;             // tiles of keys and heads of an expansion
    int32_t jobs, units;                 // of a bundle
};

// The block's work of a stage, by one lane of a warp: the next as soon as it is wanted.
__device__ inline void find(const Plan& plan, const Maps& maps, uint8_t* memory, const Stage& stage) {
    if (threadIdx.x % warp_size == 0) {
        List const list(plan, stage);
        Found& found = *reinterpret_cast<Found*>(memory + place::found);
        while (true) {
            uint32_t const n = work_number(memory);
            wait_replaceable<work_ring>(memory, place::work_used, n);
            Work& work = work_at(memory, n);
            list.take(work);
            if (work.kind == Kind::attention) {
                work.number = found.units++;
                work.first = found.tiles;
                found.tiles += static_cast<uint32_t>(tile_count(work.unit));
            } else if (work.kind == Kind::expansion) {
                work.number = found.expansions++;
                work.first = found.weights;
                found.weights += static_cast<uint32_t>(work.heads * weight_pieces);
            }
            barrier_arrive(ring_barrier<work_ring>(memory, place::work_full, n));
            work_number(memory) = n + 1;
            if (work.kind == Kind::none) break;
            if (work.kind == Kind::attention && maps.queries) {
                int const row = static_cast<int>(work.unit.token);
                prefetch_box(&maps.query_nope, 0, work.head, row, 0);
                prefetch_box(&maps.query_nope, 128, work.head, row, 0);
                prefetch_box(&maps.query_rope, 0, work.head, row, 0);
            }
            barrier_wait(shared_address(memory + place::work_wanted), found.wanted & 1);
            ++found.wanted;
        }
    }
    __syncwarp();
}

// What the block has done of a stage, to other blocks' `find`, by one lane of a warp: those that multiply would wait until what they
// wrote can be seen.
__device__ inline void tell(const Plan& plan, uint8_t* memory) {
    if (threadIdx.x % warp_size == 0) {
        while (true) {
            uint32_t const done = work_number(memory);
            wait_ring<work_ring>(memory, place::work_full, done);
            Kind const kind = work_at(memory, done).kind;
            int32_t const counter = work_at(memory, done).counter;
            barrier_arrive(ring_barrier<work_ring>(memory, place::work_used, done));
            wait_ring<work_ring>(memory, place::work_done, done);
            work_number(memory) = done + 1;
            if (kind == Kind::none) break;
            count_up(plan.counter + counter);
        }
    }
    __syncwarp();
}

#endif

}  // namespace mla::prefill_hopper
