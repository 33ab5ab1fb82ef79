// Of SM90's prefill kernel: the warp that finds the block's work and orders all copies.
#pragma once

#include "prefill_hopper_block.cuh"

namespace mla::prefill_hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A unit's queries to shared memory, by one warp. What lies behind the unit's last row is another's, or zeros: nobody stores
// what comes of it.
__device__ inline void load_queries(const Plan& plan, const Maps& maps, uint8_t* memory, const Unit& unit, int32_t head, int lane) {
    uint32_t const barrier = shared_address(memory + place::queries_full), target = shared_address(memory + place::queries);
    if (maps.queries) {
        int const row = static_cast<int>(unit.token);
        if (!elect_lane()) return;
        barrier_expect(barrier, key_pieces * piece_bytes);
        copy_box(target, &maps.query_nope, barrier, 0, head, row, 0);
        copy_box(target + piece_bytes, &maps.query_nope, barrier, 128, head, row, 0);
        copy_box(target + 2 * piece_bytes, &maps.query_rope, barrier, 0, head, row, 0);
        return;
    }
    const PrefillArguments& a = plan.arguments;
    // a negative softmax scale goes into the queries, as in prefill_tensor.cuh
    uint32_t const signs = a.softmax_scale < 0.0f ? 0x80008000u : 0u;
#pragma unroll 2
    for (int i = lane; i < HopperShape::rows * key_pieces * 8; i += warp_size) {
        int const row = i / (key_pieces * 8), u = i % (key_pieces * 8);
        bool const is_nope = u < HopperShape::nope / 8;
        const HeadView<const void*>& view = is_nope ? a.query_nope : a.query_rope;
        int64_t const at = (unit.token + row) * view.token_stride + head * view.head_stride +
                           (is_nope ? u : u - HopperShape::nope / 8) * 8;
        uint4 values = make_uint4(0, 0, 0, 0);
        if (row < unit.rows) values = load_eight(view.data, view.type, at, 8, is_nope ? plan.nope_vectors : plan.rope_vectors);
        *reinterpret_cast<uint4*>(memory + place::queries + u / 8 * piece_bytes + row * 128 + ((u % 8 ^ (row & 7)) << 4)) =
            make_uint4(values.x ^ signs, values.y ^ signs, values.z ^ signs, values.w ^ signs);
    }
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
}

// The block's work of a stage, found and fed, by one warp.
__device__ inline void produce(const Plan& plan, const Maps& maps, uint8_t* memory, const Stage& stage, Progress& done) {
    int const lane = threadIdx.x % warp_size;
    uint32_t const base = shared_address(memory);
    int32_t const sequences = static_cast<int32_t>(plan.arguments.step.sequences);
    int32_t const query_end = plan.query_tiles[owner(plan.key_tiles, sequences, stage.chunk_end - 1) + 1];
    int32_t const query_count = query_end - plan.query_tiles[owner(plan.key_tiles, sequences, stage.chunk_start)];
    int32_t const units = stage.heads * query_count;
    // so many heads at a time that blocks end together: two units each, a long and a short one
    int32_t const bundle = ceil_div(2 * static_cast<int32_t>(gridDim.x), query_count);
    int32_t const down = ceil_div((stage.chunk_end - stage.chunk_start) * key_tile, keys_of_tile);
    int32_t const jobs = down * ceil_div(stage.expand_heads, job_heads);
    auto find = [&](uint32_t number) {
        wait_replaceable(memory, place::work_used, number);
        Work work{};
        while (work.kind == Kind::none) {
            int32_t const index = atomicAdd(stage.counter, 1), job = index - units;
            if (job >= jobs) break;
            if (job >= 0) {
                int32_t const head = job / down * job_heads;
                work = {Kind::expansion, job % down * keys_of_tile, head, min(job_heads, stage.expand_heads - head), {}};
            } else if (make_unit<HopperShape::rows>(plan, index, stage.heads, bundle, query_end, query_count, stage.chunk_start,
                                                    stage.chunk_end, work.unit)) {
                work.kind = Kind::attention;
            }
        }
        *reinterpret_cast<Work*>(memory + place::work + (number & 1) * place::work_bytes) = work;
        barrier_arrive(one_of_two(memory, place::work_full, number));
    };
    bool expands = false;
    if (lane == 0) find(done.work);
    while (true) {
        __syncwarp();
        Work const work = *reinterpret_cast<const Work*>(memory + place::work + (done.work & 1) * place::work_bytes);
        ++done.work;
        if (work.kind == Kind::none) return;
        if (work.kind == Kind::expansion) {
            if (!expands) {  // what attention has in the same place was used
                for (uint32_t n = done.tiles < 2 ? 0 : done.tiles - 2; n < done.tiles; ++n) {
                    wait_full(memory, place::keys_used, n);
                    wait_full(memory, place::values_used, n);
                }
                if (done.units > 0) barrier_wait(base + place::queries_used, (done.units - 1) & 1);
                expands = true;
            }
            for (int32_t i = 0; i < work.heads * latent_pieces; ++i) {
                int32_t const piece = i % latent_pieces;
                if (i < latent_pieces) {
                    uint32_t const barrier = base + place::latents_full + 8 * piece;
                    if (done.jobs > 0) barrier_wait(base + place::latents_used + 8 * piece, (done.jobs - 1) & 1);
                    if (elect_lane()) {
                        barrier_expect(barrier, piece_bytes);
                        copy_box(base + place::latents + piece * piece_bytes, &maps.latents, barrier, piece * 128, work.key, 0, 0);
                    }
                }
                uint32_t const number = done.weights + i, slot = number % weight_ring;
                uint32_t const barrier = base + place::weights_full + 8 * slot;
                uint32_t const target = base + place::weights + slot * (weight_pieces * piece_bytes);
                int32_t const row = (stage.expand_head0 + work.head + i / latent_pieces) * plan.columns();
                if (number >= weight_ring) {
                    barrier_wait(base + place::weights_used + 8 * slot, (number / weight_ring - 1) & 1);
                }
                if (elect_lane()) {
                    barrier_expect(barrier, weight_pieces * piece_bytes);
                    copy_box(target, &maps.weights, barrier, piece * 128, row, 0, 0);
                    copy_box(target + piece_bytes, &maps.weights, barrier, piece * 128, row + 128, 0, 0);
                }
                if (i == work.heads * latent_pieces - 4 && lane == 0) find(done.work);
            }
            ++done.jobs;
            done.weights += static_cast<uint32_t>(work.heads * latent_pieces);
            continue;
        }
        const Unit& unit = work.unit;
        int32_t const count = tile_count(unit), slot = stage.slot0 + unit.head;
        auto order_keys = [&](int32_t tile) {
            uint32_t const n = done.tiles + tile, barrier = one_of_two(memory, place::keys_full, n);
            uint32_t const target = base + place::keys + (n & 1) * (key_pieces * piece_bytes);
            int32_t const key = unit.key_start * key_tile + tile * keys_of_tile;
            wait_replaceable(memory, place::keys_used, n);
            if (elect_lane()) {
                barrier_expect(barrier, key_pieces * piece_bytes);
                copy_box(target, &maps.expanded, barrier, 0, key, slot, 0);
                copy_box(target + piece_bytes, &maps.expanded, barrier, 128, key, slot, 0);
                copy_box(target + 2 * piece_bytes, &maps.ropes, barrier, 0, key, 0, 0);
            }
        };
        auto order_values = [&](int32_t tile) {
            uint32_t const n = done.tiles + tile, barrier = one_of_two(memory, place::values_full, n);
            uint32_t const target = base + place::values + (n & 1) * (value_pieces * piece_bytes);
            int32_t const key = unit.key_start * key_tile + tile * keys_of_tile;
            wait_replaceable(memory, place::values_used, n);
            if (elect_lane()) {
                barrier_expect(barrier, value_pieces * piece_bytes);
                copy_box(target, &maps.expanded, barrier, 256, key, slot, 0);
                copy_box(target + piece_bytes, &maps.expanded, barrier, 384, key, slot, 0);
            }
        };
        order_keys(0);
        if (done.units > 0) barrier_wait(base + place::queries_used, (done.units - 1) & 1);
        load_queries(plan, maps, memory, unit, stage.head0 + unit.head, lane);
        for (int32_t tile = 0; tile < count; ++tile) {
            if (tile > 0) order_keys(tile);
            order_values(tile);
            if (tile == max(count - 3, 0) && lane == 0) find(done.work);  // early enough to be known in time, late enough for others to get it
        }
        ++done.units;
        done.tiles += static_cast<uint32_t>(count);
    }
}

#endif

}  // namespace mla::prefill_hopper
