// Of SM90's prefill kernel: the warp that orders all copies.
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

// The copies for the block's work of a stage, by one warp.
__device__ inline void produce(const Plan& plan, const Maps& maps, uint8_t* memory) {
    int const lane = threadIdx.x % warp_size;
    uint32_t const base = shared_address(memory);
    auto want_next = [&] {
        if (lane == 0) barrier_arrive(base + place::work_wanted);
    };
    // Expansion and attention have the same places: what one has there was used before the other takes it. The even tiles' keys have
    // those of latents 0 to 2, the odd tiles' of 3 to 5; values have the others and weights 0 and 1 of the ring, queries weights 2 to 4.
    static_assert(latent_pieces == 8 && weight_ring == 5 && key_pieces == 3 && value_pieces == 2 && tile_ring == 2);
    Kind last = Kind::none;
    uint32_t used = 0, number = 0;  // of the last work: places of its ring, counted from the first on; which of its kind it is
    auto wait_tiles = [&](int barriers) {
        for (uint32_t n = used < tile_ring ? 0 : used - tile_ring; n < used; ++n) wait_ring<tile_ring>(memory, barriers, n);
    };
    while (true) {
        uint32_t const order = work_number(memory);
        wait_ring<work_ring>(memory, place::work_full, order);
        const Work& work = work_at(memory, order);  // there until all that is ordered here has been used
        __syncwarp();
        if (lane == 0) work_number(memory) = order + 1;
        if (work.kind == Kind::none) return;
        fence_copies();  // of what other blocks expanded
        bool const changes = last != Kind::none && work.kind != last;
        last = work.kind;
        if (work.kind == Kind::expansion) {
            int32_t const count = work.heads * weight_pieces;
            uint32_t const first = work.first, of_kind = work.number;
            bool values_wait = changes;  // for the values' places, which become free last
            if (changes) {
                wait_tiles(place::keys_used);
                barrier_wait(base + place::queries_used, number & 1);
            }
            for (int32_t i = 0; i < count; ++i) {
                int32_t const piece = i % latent_pieces, head = work.head + i / weight_pieces;
                if (i < latent_pieces) {
                    uint32_t const barrier = base + place::latents_full + 8 * piece;
                    if (values_wait && (piece >= 6 || (first + i) % weight_ring < 2)) {
                        wait_tiles(place::values_used);
                        values_wait = false;
                    }
                    if (of_kind > 0) barrier_wait(base + place::latents_used + 8 * piece, (of_kind - 1) & 1);
                    if (elect_lane()) {
                        barrier_expect(barrier, piece_bytes);
                        copy_box(base + place::latents + piece * piece_bytes, &maps.latents, barrier, piece * 128, work.key, 0, 0);
                    }
                }
                uint32_t const n = first + i, barrier = ring_barrier<weight_ring>(memory, place::weights_full, n);
                uint32_t const target = base + place::weights + n % weight_ring * piece_bytes;
                wait_replaceable<weight_ring>(memory, place::weights_used, n);
                if (elect_lane()) {
                    barrier_expect(barrier, piece_bytes);
                    if (i % weight_pieces < latent_pieces) {
                        int32_t const row = head * rank + piece * 64;
                        copy_box(target, &maps.key_weights, barrier, 0, row, 0, 0);
                        copy_box(target + piece_bytes / 2, &maps.key_weights, barrier, 128, row, 0, 0);
                    } else {
                        copy_box(target, &maps.value_weights, barrier, piece * 128, head * HopperShape::width, 0, 0);
                    }
                }
                if (i == count - latent_pieces) want_next();
            }
            used = first + static_cast<uint32_t>(count);
            number = of_kind;
            continue;
        }
        const Unit& unit = work.unit;
        int32_t const count = tile_count(unit), place_of_head = work.place, first_key = unit.key_start * key_tile;
        if (changes) {
            for (int piece = 0; piece < latent_pieces; ++piece) barrier_wait(base + place::latents_used + 8 * piece, number & 1);
        }
        auto find_masks = [&](int32_t tile) {
            int32_t const first = unit.key_start + 2 * tile;
            bool const pair = first + 1 < unit.key_end;
            Masks const found{load_in_order(plan.key_masks + first), load_in_order(plan.key_masks + first + (pair ? 1 : 0))};
            return Masks{found.low, pair ? found.high : 0};
        };
        Masks masks = find_masks(0);
        auto order_keys = [&](int32_t tile) {
            uint32_t const n = work.first + tile, barrier = ring_barrier<tile_ring>(memory, place::keys_full, n);
            uint32_t const target = base + place::keys + n % tile_ring * (key_pieces * piece_bytes);
            int32_t const key = first_key + tile * keys_of_tile;
            wait_replaceable<tile_ring>(memory, place::keys_used, n);
            if (elect_lane()) {
                reinterpret_cast<Masks*>(memory + place::masks)[n % tile_ring] = masks;
                barrier_expect(barrier, key_pieces * piece_bytes);
                copy_box(target, &maps.expanded, barrier, 0, key, place_of_head, 0);
                copy_box(target + piece_bytes, &maps.expanded, barrier, 128, key, place_of_head, 0);
                copy_box(target + 2 * piece_bytes, &maps.ropes, barrier, 0, key, 0, 0);
            }
            masks = find_masks(min(tile + 1, count - 1));
        };
        auto order_values = [&](int32_t tile) {
            uint32_t const n = work.first + tile, barrier = ring_barrier<tile_ring>(memory, place::values_full, n);
            uint32_t const target = base + place::values + n % tile_ring * (value_pieces * piece_bytes);
            int32_t const key = first_key + tile * keys_of_tile;
            wait_replaceable<tile_ring>(memory, place::values_used, n);
            if (elect_lane()) {
                barrier_expect(barrier, value_pieces * piece_bytes);
                copy_box(target, &maps.expanded, barrier, 256, key, place_of_head, 0);
                copy_box(target + piece_bytes, &maps.expanded, barrier, 384, key, place_of_head, 0);
            }
        };
        order_keys(0);
        if (changes) {
            for (uint32_t n = used - weight_ring; n < used; ++n) wait_ring<weight_ring>(memory, place::weights_used, n);
        }
        number = work.number;
        used = work.first + static_cast<uint32_t>(count);
        if (number > 0) barrier_wait(base + place::queries_used, (number - 1) & 1);
        load_queries(plan, maps, memory, unit, work.head, lane);
        for (int32_t tile = 0; tile < count; ++tile) {
            if (tile > 0) order_keys(tile);
            // early enough for the next to be known in time, late enough for others to get it
            if (tile == max(count - 3, 0)) want_next();
            order_values(tile);
        }
    }
}

#endif

}  // namespace mla::prefill_hopper
