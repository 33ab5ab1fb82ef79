// The stages of prefill_tensor.cuh that multiply matrices, on SM90's tensor cores (Dn 128, Dr 64, Dv 128): products by wgmma,
// operands by the copy engine. A block has two warpgroups, each with 64 of its 128 rows, and one warp that finds the block's
// work and orders all copies, as soon as both have used what a copy will replace: it runs ahead of them from unit to unit.
// Where all keys are one chunk, `expanded` has two parts: while one group of heads is attended to, blocks that find no unit any
// more expand the next.
#pragma once

#include "prefill_hopper_attend.cuh"
#include "prefill_hopper_expand.cuh"
#include "prefill_hopper_feed.cuh"

namespace mla::prefill_hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The work that `produce` finds, by the warpgroups.
__device__ inline void consume(const Plan& plan, uint8_t* memory, const Stage& stage, bool vectors, Progress& done) {
    int const side = threadIdx.x / 128;
    if (side == 1) named_arrive(turn, HopperShape::threads);  // the first turn is the other group's
    while (true) {
        wait_full(memory, place::work_full, done.work);
        Work const work = *reinterpret_cast<const Work*>(memory + place::work + (done.work & 1) * place::work_bytes);
        __syncwarp();
        if (threadIdx.x % warp_size == 0) barrier_arrive(one_of_two(memory, place::work_used, done.work));
        ++done.work;
        if (work.kind == Kind::none) break;
        if (work.kind == Kind::expansion) {
            expand(plan, memory, work, stage.expand_slot0, (stage.chunk_end - stage.chunk_start) * key_tile, done);
            continue;
        }
        attend_unit(plan, memory, work.unit, stage.head0, done.units, uniform(done.tiles), vectors);
        ++done.units;
        done.tiles += static_cast<uint32_t>(tile_count(work.unit));
    }
    if (side == 0) named_sync(turn, HopperShape::threads);
}

// Through the groups of heads and the chunks of keys, by the warpgroups that multiply or by the one that feeds them.
template <bool multiplies>
__device__ inline void walk(const Plan& plan, const Maps& maps, uint8_t* memory) {
    using S = HopperShape;
    const PrefillArguments& a = plan.arguments;
    auto const grid = cooperative_groups::this_grid();
    bool const feeds = threadIdx.x / warp_size == S::warps;
    if constexpr (multiplies) {
        if (blockIdx.x == 0) {
            make_starts<S>(plan);
            if (threadIdx.x < 2) plan.counter[threadIdx.x] = 0;
        }
        if (weights_are_vectors(a)) {
            turn_weights(plan, reinterpret_cast<uint16_t*>(memory));
        } else {
            convert_weights<S>(plan, reinterpret_cast<float*>(memory));
        }
        fence_copies();
    }
    grid.sync();
    Progress done{};
    int32_t const key_tiles = plan.key_tiles[a.step.sequences];
    bool const in_one = key_tiles <= plan.chunk_tiles, two_parts = in_one && plan.group_heads >= 2;
    int32_t const group_heads = two_parts ? plan.group_heads / 2 : plan.group_heads;
    int32_t slot0 = 0, stages = 0;
    for (int32_t head0 = 0; head0 < a.heads; head0 += group_heads) {
        int32_t const heads = min(group_heads, a.heads - head0), next = head0 + heads;
        int32_t const next_slot0 = two_parts ? group_heads - slot0 : 0;
        for (int32_t start = 0; start < key_tiles; start += plan.chunk_tiles) {
            int32_t const end = min(start + plan.chunk_tiles, key_tiles);
            if (head0 == 0 || !in_one) {  // otherwise they are still there
                if constexpr (multiplies) {
                    gather<S>(plan, start, end);
                    fence_copies();
                }
                grid.sync();
            }
            bool const expanded = two_parts && head0 > 0;  // beside the attention of the heads before
            for (int step = expanded ? 1 : 0; step < 2; ++step) {
                Stage const stage =
                    step == 0 ? Stage{start, end, 0, 0, 0, head0, heads, slot0, plan.counter + stages % 2}
                              : Stage{start, end, head0, heads, slot0, next, two_parts ? min(group_heads, a.heads - next) : 0,
                                      next_slot0, plan.counter + stages % 2};
                ++stages;
                if (blockIdx.x == 0 && threadIdx.x == 0) plan.counter[stages % 2] = 0;
                fence_copies();
                if constexpr (multiplies) {
                    consume(plan, memory, stage, maps.outputs, done);
                } else if (feeds) {
                    produce(plan, maps, memory, stage, done);
                }
                fence_copies();
                grid.sync();
            }
        }
        slot0 = next_slot0;
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
