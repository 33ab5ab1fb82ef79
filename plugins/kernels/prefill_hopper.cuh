// What prefill_tensor.cuh does, on SM90's tensor cores (Dn 128, Dr 64, Dv 128): products by wgmma, operands by the copy engine. A
// block has two warpgroups, each with 64 of its 128 rows, one warp that finds the block's work,
// one that tells other blocks when it is done, and one that orders all copies, as soon as both groups have used what a copy will
// replace: it runs ahead of them from unit to unit.
// Expansion and attention of a chunk are one list of work (prefill_hopper_find.cuh).
#pragma once

#include <cooperative_groups.h>

#include "prefill_hopper_attend.cuh"
#include "prefill_hopper_expand.cuh"
#include "prefill_hopper_feed.cuh"
#include "prefill_hopper_find.cuh"

namespace mla::prefill_hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The work that `find` finds, by the warpgroups.
__device__ inline void consume(const Plan& plan, const Maps& maps, uint8_t* memory) {
    int const side = threadIdx.x / 128;
    if (side == 1) named_arrive(turn, HopperShape::threads);  // the first turn is the other group's
    Kind kind;
    do {
        uint32_t const number = work_number(memory);
        wait_ring<work_ring>(memory, place::work_full, number);
        const Work& work = work_at(memory, number);
        kind = work.kind;
        if (kind == Kind::expansion) {
            expand(plan, maps, memory, work);
        } else if (kind == Kind::attention) {
            attend_unit(plan, memory, work, maps.outputs);
        } else {
            part_done(memory);
        }
        __syncwarp();
        if (threadIdx.x % warp_size == 0) {
            uint32_t const same = work_number(memory);
            barrier_arrive(ring_barrier<work_ring>(memory, place::work_used, same));
            work_number(memory) = same + 1;
        }
        __syncwarp();
    } while (kind != Kind::none);
    if (side == 0) named_sync(turn, HopperShape::threads);
}

// Through the groups of heads and the chunks of keys, by the warpgroups that multiply or by the one with the warps that find, tell and feed.
// Where all keys are one chunk, so are all heads one group.
template <bool multiplies>
__device__ inline void walk(const Plan& plan, const Maps& maps, uint8_t* memory) {
    using S = HopperShape;
    const PrefillArguments& a = plan.arguments;
    auto const grid = cooperative_groups::this_grid();
    if constexpr (multiplies) {
        if (blockIdx.x == 0) make_starts<S>(plan);
        if (!maps.weights) copy_weights(plan);
    }
    grid.sync();
    int32_t const key_tiles = plan.key_tiles[a.step.sequences];
    int32_t const group_heads = key_tiles <= plan.chunk_tiles ? a.heads : plan.group_heads;
    for (int32_t head0 = 0; head0 < a.heads; head0 += group_heads) {
        for (int32_t start = 0; start < key_tiles; start += plan.chunk_tiles) {
            Stage const stage{start, min(start + plan.chunk_tiles, key_tiles), head0, min(group_heads, a.heads - head0)};
            if constexpr (multiplies) {
                if (blockIdx.x == 0) {
                    for (int32_t i = threadIdx.x; i < 1 + 2 * a.heads; i += S::threads) plan.counter[i] = 0;
                }
                gather<S>(plan, stage.chunk_start, stage.chunk_end);
            }
            fence_copies();
            grid.sync();
            fence_copies();
            if constexpr (multiplies) {
                consume(plan, maps, memory);
            } else if (threadIdx.x / warp_size == S::warps) {
                produce(plan, maps, memory);
            } else if (threadIdx.x / warp_size == S::warps + 1) {
                find(plan, maps, memory, stage);
            } else if (threadIdx.x / warp_size == S::warps + 2) {
                tell(plan, memory);
            }
            if (stage.chunk_end < key_tiles || head0 + group_heads < a.heads) grid.sync();
        }
    }
}

#endif

__global__ void __launch_bounds__(block_threads, 1)
    prefill_hopper(const __grid_constant__ Plan plan, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    const PrefillArguments& a = plan.arguments;
    if (a.zero_padding) zero_padding<block_threads>(a);
    if (!anything_served<block_threads>(a)) return;  // every block finds the same
    if (threadIdx.x == 0) init_barriers(shared_memory);
    if (threadIdx.x < HopperShape::threads) {
        registers_increase<multiply_registers>();
        walk<true>(plan, maps, shared_memory);
    } else {
        registers_decrease<feed_registers>();
        walk<false>(plan, maps, shared_memory);
    }
#endif
}

}  // namespace mla::prefill_hopper
