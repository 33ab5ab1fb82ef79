// The stages of prefill_tensor.cuh that multiply matrices, on SM90's tensor cores (Dn 128, Dr 64, Dv 128): products by wgmma,
// operands by the copy engine. A block has two warpgroups, each with 64 of its 128 rows, and one warp that finds the block's
// work and orders all copies, as soon as both have used what a copy will replace: it runs ahead of them from unit to unit.
// Where all keys are one chunk, `expanded` has two parts: while one group of heads is attended to, blocks that find no unit any
// more expand the next.
#pragma once

#include <type_traits>

#include "hopper.cuh"
#include "prefill_tensor.cuh"
#include "tensor_map.h"

namespace mla::prefill_hopper {

using namespace prefill_tensor;
using namespace hopper;

// Tensors, and boxes of 128 rows of 128 bytes of each.
struct Maps {
    bool queries;             // whether the engine can copy them: bf16, whole vectors, nothing to change
    bool outputs;             // whether outputs are bf16 and can be written four at once
    CUtensorMap query_nope;   // [T, H, Dn]
    CUtensorMap query_rope;   // [T, H, Dr]
    CUtensorMap latents;   // [chunk keys, R]
    CUtensorMap weights;   // [H x (Dn + Dv), R]
    CUtensorMap expanded;  // [group heads, chunk keys, Dn + Dv]
    CUtensorMap ropes;     // [chunk keys, Dr]
};

enum : int { turn = 1, stage = 3 };  // named barriers: `turn` of each warpgroup, which may order products then

// What multiplies; the block has a warpgroup more, of which one warp works.
struct HopperShape {
    static constexpr int rows = 128, warps = 8, threads = 256;
    static constexpr int nope = 128, rope = 64, width = 128;
    __device__ static void sync() { named_sync(stage, threads); }
};
constexpr int block_threads = HopperShape::threads + 128;  // registers change hands among warpgroups
constexpr int launch_registers = 168, multiply_registers = 232, feed_registers = 40;
static_assert(2 * multiply_registers + feed_registers <= 3 * launch_registers, "registers that nobody gives up are waited for for ever");

constexpr int piece_bytes = 128 * 128;  // 128 rows of 64 values
constexpr int keys_of_tile = 128;
constexpr int key_pieces = 3, value_pieces = 2;
constexpr int latent_pieces = 512 / 64, weight_pieces = 2;
constexpr int weight_ring = 3;
constexpr int job_heads = 3;  // that are expanded from one tile of latents

// What a block does next. `attention`: `unit`. `expansion`: key and value of `heads` heads from `head` on, for 128 keys.
enum class Kind : int32_t { none, attention, expansion };
struct Work {
    Kind kind;
    int32_t key, head, heads;
    Unit unit;
};

// Where things lie in shared memory, in bytes.
namespace place {
constexpr int keys = 0;  // [2]
constexpr int values = keys + 2 * key_pieces * piece_bytes;  // [2]
constexpr int queries = values + 2 * value_pieces * piece_bytes;
constexpr int latents = 0;  // of the expansion, instead of these
constexpr int weights = latents + latent_pieces * piece_bytes;  // [weight_ring]
constexpr int work = weights + weight_ring * weight_pieces * piece_bytes;  // [2]
constexpr int work_bytes = 96;
constexpr int barriers = work + 2 * work_bytes;
constexpr int keys_full = barriers, keys_used = keys_full + 16, values_full = keys_used + 16, values_used = values_full + 16;
constexpr int work_full = values_used + 16, work_used = work_full + 16;
constexpr int queries_full = work_used + 16, queries_used = queries_full + 8;
constexpr int latents_full = queries_used + 8, latents_used = latents_full + 8 * latent_pieces;
constexpr int weights_full = latents_used + 8 * latent_pieces, weights_used = weights_full + 8 * weight_ring;
constexpr int total = weights_used + 8 * weight_ring;
}  // namespace place
static_assert(place::queries + key_pieces * piece_bytes <= place::work && sizeof(Work) <= place::work_bytes);

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Before the copy engine reads what threads have written to global memory.
__device__ inline void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ inline void init_barriers(uint8_t* memory) {
    auto init = [&](int full, int used, int count) {
        for (int i = 0; i < count; ++i) {
            barrier_init(shared_address(memory + full) + 8 * i, 1);
            barrier_init(shared_address(memory + used) + 8 * i, HopperShape::warps);
        }
    };
    init(place::keys_full, place::keys_used, 2);
    init(place::values_full, place::values_used, 2);
    init(place::work_full, place::work_used, 2);
    init(place::queries_full, place::queries_used, 1);
    init(place::latents_full, place::latents_used, latent_pieces);
    init(place::weights_full, place::weights_used, weight_ring);
    fence_barrier_init();
}

// Waits of a barrier that is one of two, for what is numbered n: until it is there, and until what is replaced was used.
__device__ inline uint32_t one_of_two(uint8_t* memory, int barriers, uint32_t n) {
    return shared_address(memory + barriers) + 8 * (n & 1);
}
__device__ inline void wait_full(uint8_t* memory, int barriers, uint32_t n) {
    barrier_wait(one_of_two(memory, barriers, n), n / 2 & 1);
}
__device__ inline void wait_replaceable(uint8_t* memory, int barriers, uint32_t n) {
    if (n >= 2) barrier_wait(one_of_two(memory, barriers, n), (n / 2 - 1) & 1);
}

// prefill_tensor::convert_weights for bf16 weights, eight at once: W_UV as it is, W_UK's parts of 64 x 64 turned round.
__device__ inline bool weights_are_vectors(const PrefillArguments& a) {
    auto const fits = [](const BlockScaledWeight& weight) {
        return weight.type == MLA_BFLOAT16 && weight.scale == nullptr && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
    };
    return fits(a.w_uk) && fits(a.w_uv);
}
__device__ inline void turn_weights(const Plan& plan, uint16_t* tile) {
    using S = HopperShape;
    constexpr int rank = 512, side = 64, stride = side + 2, vectors = side * side / 8;
    const PrefillArguments& a = plan.arguments;
    auto* const weights = reinterpret_cast<uint4*>(plan.weights);
    int const of_head = (S::nope + S::width) * rank / 8, values_of_head = S::width * rank / 8;
    const auto* const values = static_cast<const uint4*>(a.w_uv.data);
    int64_t const count = static_cast<int64_t>(a.heads) * values_of_head;
#pragma unroll 4
    for (int64_t i = blockIdx.x * S::threads + threadIdx.x; i < count; i += gridDim.x * S::threads) {
        weights[i / values_of_head * of_head + S::nope * rank / 8 + i % values_of_head] = values[i];
    }
    constexpr int jobs_of_head = rank / side * (S::nope / side);
    for (int32_t job = blockIdx.x; job < a.heads * jobs_of_head; job += gridDim.x) {
        int32_t const head = job / jobs_of_head, r0 = job % jobs_of_head / (S::nope / side) * side;
        int32_t const n0 = job % (S::nope / side) * side;
        const auto* const source = static_cast<const uint4*>(a.w_uk.data) + (static_cast<int64_t>(head) * rank + r0) * (S::nope / 8) + n0 / 8;
        S::sync();
#pragma unroll
        for (int i = threadIdx.x; i < vectors; i += S::threads) {
            int const row = i / (side / 8), unit = i % (side / 8);
            uint4 const found = source[row * (S::nope / 8) + unit];
            auto* const target = reinterpret_cast<uint32_t*>(tile + row * stride + unit * 8);
            target[0] = found.x;
            target[1] = found.y;
            target[2] = found.z;
            target[3] = found.w;
        }
        S::sync();
#pragma unroll
        for (int i = threadIdx.x; i < vectors; i += S::threads) {
            int const column = i / (side / 8), unit = i % (side / 8);
            const uint16_t* const from = tile + unit * 8 * stride + column;
            auto const pair = [&](int k) { return from[2 * k * stride] | static_cast<uint32_t>(from[(2 * k + 1) * stride]) << 16; };
            weights[static_cast<int64_t>(head) * of_head + ((n0 + column) * rank + r0) / 8 + unit] =
                make_uint4(pair(0), pair(1), pair(2), pair(3));
        }
    }
}

// What a block has done so far; the barriers' phases follow from it.
struct Progress {
    uint32_t work;     // places of the ring
    uint32_t units;    // of attention
    uint32_t tiles;    // of keys
    uint32_t jobs;     // of expansion
    uint32_t weights;  // places of their ring
};

// What all blocks do between two barriers of the grid: attention for one group of heads, expansion for another.
struct Stage {
    int32_t chunk_start, chunk_end;                // key tiles
    int32_t head0, heads, slot0;                   // attention: heads, and where `expanded` has the first; heads 0: none
    int32_t expand_head0, expand_heads, expand_slot0;  // the same of the expansion
    int32_t* counter;
};

// The same for all lanes, which the compiler then knows.
template <typename T>
__device__ inline T uniform(T value) {
    return __shfl_sync(0xffffffffu, value, 0);
}

// A load where it is written, not where its value is first used.
__device__ inline uint64_t load_now(const uint64_t* place) {
    uint64_t value;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(place));
    return value;
}

__device__ inline int32_t tile_count(const Unit& unit) { return ceil_div(unit.key_end - unit.key_start, 2); }

// A unit's queries to shared memory, by one warp. What lies behind the unit's last row is another's, or zeros: nobody stores
// what comes of it.
__device__ inline void load_queries(const Plan& plan, const Maps& maps, uint8_t* memory, const Unit& unit, int32_t head, int lane) {
    uint32_t const barrier = shared_address(memory + place::queries_full), target = shared_address(memory + place::queries);
    if (maps.queries) {
        if (lane != 0) return;
        int const row = static_cast<int>(unit.token);
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
            for (int32_t i = 0; i < work.heads * latent_pieces && lane == 0; ++i) {
                int32_t const piece = i % latent_pieces;
                if (i < latent_pieces) {
                    uint32_t const barrier = base + place::latents_full + 8 * piece;
                    if (done.jobs > 0) barrier_wait(base + place::latents_used + 8 * piece, (done.jobs - 1) & 1);
                    barrier_expect(barrier, piece_bytes);
                    copy_box(base + place::latents + piece * piece_bytes, &maps.latents, barrier, piece * 128, work.key, 0, 0);
                }
                uint32_t const number = done.weights + i, slot = number % weight_ring;
                uint32_t const barrier = base + place::weights_full + 8 * slot;
                uint32_t const target = base + place::weights + slot * (weight_pieces * piece_bytes);
                int32_t const row = (stage.expand_head0 + work.head + i / latent_pieces) * plan.columns();
                if (number >= weight_ring) {
                    barrier_wait(base + place::weights_used + 8 * slot, (number / weight_ring - 1) & 1);
                }
                barrier_expect(barrier, weight_pieces * piece_bytes);
                copy_box(target, &maps.weights, barrier, piece * 128, row, 0, 0);
                copy_box(target + piece_bytes, &maps.weights, barrier, piece * 128, row + 128, 0, 0);
                if (i == work.heads * latent_pieces - 4) find(done.work);
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
            barrier_expect(barrier, key_pieces * piece_bytes);
            copy_box(target, &maps.expanded, barrier, 0, key, slot, 0);
            copy_box(target + piece_bytes, &maps.expanded, barrier, 128, key, slot, 0);
            copy_box(target + 2 * piece_bytes, &maps.ropes, barrier, 0, key, 0, 0);
        };
        auto order_values = [&](int32_t tile) {
            uint32_t const n = done.tiles + tile, barrier = one_of_two(memory, place::values_full, n);
            uint32_t const target = base + place::values + (n & 1) * (value_pieces * piece_bytes);
            int32_t const key = unit.key_start * key_tile + tile * keys_of_tile;
            wait_replaceable(memory, place::values_used, n);
            barrier_expect(barrier, value_pieces * piece_bytes);
            copy_box(target, &maps.expanded, barrier, 256, key, slot, 0);
            copy_box(target + piece_bytes, &maps.expanded, barrier, 384, key, slot, 0);
        };
        if (lane == 0) order_keys(0);
        __syncwarp();
        if (done.units > 0) barrier_wait(base + place::queries_used, (done.units - 1) & 1);
        load_queries(plan, maps, memory, unit, stage.head0 + unit.head, lane);
        for (int32_t tile = 0; tile < count && lane == 0; ++tile) {
            if (tile > 0) order_keys(tile);
            order_values(tile);
            if (tile == max(count - 3, 0)) find(done.work);  // early enough to be known in time, late enough for others to get it
        }
        ++done.units;
        done.tiles += static_cast<uint32_t>(count);
    }
}

// expanded = row scale x latents x weights^T for one job, by the warpgroups. `slot`: where `expanded` has its first head.
__device__ inline void expand(const Plan& plan, uint8_t* memory, const Work& job, int32_t slot, int32_t keys, Progress& done) {
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, odd = t % 2, side = uniform(warp / 4);
    uint32_t const base = shared_address(memory);
    uint32_t const latents = tile_descriptor(base + place::latents + side * (piece_bytes / 2));
    int32_t const heads = uniform(job.heads), row0 = job.key + warp * 16 + g;
    uint32_t number = uniform(done.weights);
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = row0 + half * 8 < keys ? plan.row_scales[row0 + half * 8] : 0.0f;
    for (int32_t head = 0; head < heads; ++head) {
        float sums[128];
        pin(sums);
#pragma unroll
        for (int i = 0; i < latent_pieces; ++i) {
            uint32_t const ring_slot = (number + i) % weight_ring;
            uint32_t const x = latents + i * (piece_bytes >> 4);
            uint32_t const w = tile_descriptor(base + place::weights + ring_slot * (weight_pieces * piece_bytes));
            if (head == 0) barrier_wait(base + place::latents_full + 8 * i, done.jobs & 1);
            barrier_wait(base + place::weights_full + 8 * ring_slot, (number + i) / weight_ring & 1);
            product_fence();
            if (i == 0) {
                product_bf16<0, true>(sums, x, w);
            } else {
                product_bf16<0, false>(sums, x, w);
            }
            product_bf16<1, false>(sums, x, w);
            product_bf16<2, false>(sums, x, w);
            product_bf16<3, false>(sums, x, w);
            product_commit();
            auto used = [&](int piece) {
                if (lane != 0) return;
                barrier_arrive(base + place::weights_used + 8 * ((number + piece) % weight_ring));
                if (head == heads - 1) barrier_arrive(base + place::latents_used + 8 * piece);
            };
            if (i > 0) {
                product_wait<1>();
                used(i - 1);
            }
            if (i == latent_pieces - 1) {
                product_wait();
                used(i);
            }
        }
        pin(sums);
        number += latent_pieces;

        // Lanes 2 i and 2 i + 1 exchange, so that each stores four neighbouring columns of one of two groups of eight.
        __nv_bfloat16* const target =
            plan.expanded + (static_cast<int64_t>(slot + job.head + head) * plan.chunk_keys() + row0) * plan.columns() + odd * 8 + t / 2 * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool const there = row0 + half * 8 < keys;
#pragma unroll
            for (int j = 0; j < 32; j += 2) {
                uint32_t const left = pack(sums[4 * j + 2 * half] * scale[half], sums[4 * j + 2 * half + 1] * scale[half]);
                uint32_t const right = pack(sums[4 * j + 4 + 2 * half] * scale[half], sums[4 * j + 5 + 2 * half] * scale[half]);
                uint32_t const other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
                if (!there) continue;
                *reinterpret_cast<uint2*>(target + half * 8 * plan.columns() + j * 8) =
                    odd ? make_uint2(other, right) : make_uint2(left, other);
            }
        }
    }
    ++done.jobs;
    done.weights = number;
}

// Attention of one unit over its key tiles of this chunk, two of them at a time, by the warpgroups. `vectors`: see Maps::outputs.
__device__ inline void attend_unit(const Plan& plan, uint8_t* memory, const Unit& unit, int32_t head0, uint32_t unit_number,
                                   uint32_t tiles, bool vectors) {
    const PrefillArguments& a = plan.arguments;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * 16 + g;
    int const side = uniform(warp / 4), group_row = side * 64;
    int const head = head0 + unit.head;
    int32_t const count = uniform(tile_count(unit));
    float const factor = fmaxf(fabsf(a.softmax_scale) * log2e, 1e-30f);

    float sums[64], scores[64], largest[2], total[2];  // total: this lane's part
    uint32_t weights[8][4];
    int64_t const state_row = static_cast<int64_t>(unit.head) * a.step.tokens + unit.token + first_row;
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        largest[half] = -INFINITY;
        total[half] = 0.0f;
        if (unit.starts || first_row + 8 * half >= unit.rows) continue;
        float2 const state = plan.state_sums[state_row + 8 * half];
        largest[half] = state.x;
        total[half] = t == 0 ? state.y : 0.0f;
        const float* const row = plan.states + (state_row + 8 * half) * HopperShape::width + 2 * t;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            float2 const pair = *reinterpret_cast<const float2*>(row + j * 8);
            sums[4 * j + 2 * half] = pair.x;
            sums[4 * j + 2 * half + 1] = pair.y;
        }
    }

    auto arrive = [&](uint32_t barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    };
    auto keys_used = [&](int32_t tile) { arrive(one_of_two(memory, place::keys_used, tiles + tile)); };
    auto values_used = [&](int32_t tile) { arrive(one_of_two(memory, place::values_used, tiles + tile)); };
    // The warpgroups take turns: one orders products, the keys of a tile and the values of the one before, which the tensor
    // cores do while the other one makes weights.
    auto take_turn = [&] { named_sync(turn + side, HopperShape::threads); };
    auto pass_turn = [&] { named_arrive(turn + 1 - side, HopperShape::threads); };
    uint32_t const queries = tile_descriptor(shared_address(memory + place::queries) + group_row * 128);
    auto multiply_keys = [&](int32_t tile) {
        uint32_t const keys =
            tile_descriptor(shared_address(memory + place::keys) + ((tiles + tile) & 1) * (key_pieces * piece_bytes));
        auto piece = [&](auto index) {
            constexpr int i = decltype(index)::value;
            uint32_t const q = queries + i * (piece_bytes >> 4), k = keys + i * (piece_bytes >> 4);
            product_bf16<0, i == 0>(scores, q, k);
            product_bf16<1, false>(scores, q, k);
            product_bf16<2, false>(scores, q, k);
            product_bf16<3, false>(scores, q, k);
        };
        piece(std::integral_constant<int, 0>());
        piece(std::integral_constant<int, 1>());
        piece(std::integral_constant<int, 2>());
        product_commit();
    };
    auto multiply_values = [&](int32_t tile, auto all) {
        uint32_t const values =
            tile_descriptor(shared_address(memory + place::values) + ((tiles + tile) & 1) * (value_pieces * piece_bytes));
        product_bf16_values<0, piece_bytes>(sums, weights[0], values);
        product_bf16_values<1, piece_bytes>(sums, weights[1], values);
        product_bf16_values<2, piece_bytes>(sums, weights[2], values);
        product_bf16_values<3, piece_bytes>(sums, weights[3], values);
        if constexpr (decltype(all)::value) {
            product_bf16_values<4, piece_bytes>(sums, weights[4], values);
            product_bf16_values<5, piece_bytes>(sums, weights[5], values);
            product_bf16_values<6, piece_bytes>(sums, weights[6], values);
            product_bf16_values<7, piece_bytes>(sums, weights[7], values);
        }
        product_commit();
    };
    auto pin_weights = [&] {
#pragma unroll
        for (int i = 0; i < 32; ++i) asm volatile("" : "+r"(weights[i / 4][i % 4])::"memory");
    };
    // Which of a tile's keys exist, and whether all do and all rows see them.
    struct Masks {
        uint64_t low, high;
    };
    auto load_masks = [&](int32_t tile) {
        int32_t const first = unit.key_start + 2 * tile;
        bool const pair = first + 1 < unit.key_end;
        Masks const found{load_now(plan.key_masks + first), load_now(plan.key_masks + first + (pair ? 1 : 0))};
        return Masks{found.low, pair ? found.high : 0};
    };
    auto all_seen = [&](int32_t tile, const Masks& masks) {
        int32_t const key0 = (unit.key_start + 2 * tile - unit.first_key) * key_tile;
        return (masks.low & masks.high) == ~uint64_t{0} && key0 + keys_of_tile - 1 <= unit.position + group_row;
    };
    auto mask_scores = [&](int32_t tile, const Masks& masks) {
        int32_t const key0 = (unit.key_start + 2 * tile - unit.first_key) * key_tile;
        int32_t const last = unit.position + first_row - key0 - 2 * t;
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            int const key = i / 4 * 8 + i % 2;  // counted from the lane's first
            bool const present = ((i < 32 ? masks.low : masks.high) >> (2 * t + key % 64) & 1) != 0;
            if (!present || key > last + i / 2 % 2 * 8) scores[i] = -INFINITY;
        }
    };
    // Scores to weights. Products use sums and weights until `values_done`, half of the way.
    auto make_weights = [&](auto values_done) {
        float top[2][4];  // four at a time, so that one does not wait for the other
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            float& own_top = top[i / 2 % 2][i / 4 % 4];
            own_top = i / 16 == 0 && i % 2 == 0 ? scores[i] : fmaxf(own_top, scores[i]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* const four = top[half];
            four[0] = fmaxf(fmaxf(four[0], four[1]), fmaxf(fmaxf(four[2], four[3]), largest[half]));
        }
#pragma unroll
        for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[half][0] = fmaxf(top[half][0], __shfl_xor_sync(0xffffffffu, top[half][0], lanes));
            }
        }
        float base[2], scale[2], sum[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            base[half] = top[half][0] == -INFINITY ? 0.0f : top[half][0] * factor;
            scale[half] = power_of_two(fmaf(largest[half], factor, -base[half]));
            largest[half] = top[half][0];
            sum[half][0] = sum[half][1] = 0.0f;
        }
        auto powers = [&](int begin, int end) {
#pragma unroll
            for (int i = begin; i < end; ++i) {
                scores[i] = power_of_two(fmaf(scores[i], factor, -base[i / 2 % 2]));
                sum[i / 2 % 2][i % 2] += scores[i];
            }
        };
        powers(0, 32);
        // Never so, but the assembler does not know: it would move the wait up, before all of this.
        if (fminf(sum[0][0], sum[1][0]) < 0.0f) __nanosleep(1);
        values_done();
        if (__any_sync(0xffffffffu, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < 64; ++i) sums[i] *= scale[i / 2 % 2];
        }
        powers(32, 64);
#pragma unroll
        for (int i = 0; i < 32; ++i) weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) total[half] = fmaf(total[half], scale[half], sum[half][0] + sum[half][1]);
    };

    // Tiles with keys that rows of this group see; those behind them are passed over.
    int32_t const seen = unit.position + group_row + 63 - (unit.key_start - unit.first_key) * key_tile;
    int32_t const own = uniform(group_row >= unit.rows || seen < 0 ? 0 : min(seen / keys_of_tile + 1, count));
    auto queries_used = [&] { arrive(shared_address(memory + place::queries_used)); };
    barrier_wait(shared_address(memory + place::queries_full), unit_number & 1);
    wait_full(memory, place::keys_full, tiles);
    take_turn();
    if (own > 0) {
        Masks masks = load_masks(0);
        pin(scores);
        product_fence();
        multiply_keys(0);
        pass_turn();
        product_wait();
        pin(scores);
        keys_used(0);
        if (own == 1) queries_used();
        if (!all_seen(0, masks)) mask_scores(0, masks);
        masks = load_masks(min(1, own - 1));
        make_weights([] {});
        for (int32_t tile = 1; tile < own; ++tile) {
            bool const whole = all_seen(tile, masks);
            wait_full(memory, place::keys_full, tiles + tile);
            take_turn();
            pin(scores);
            pin(sums);
            pin_weights();
            product_fence();
            multiply_keys(tile);
            wait_full(memory, place::values_full, tiles + tile - 1);
            multiply_values(tile - 1, std::true_type());
            pass_turn();
            Masks const next = load_masks(min(tile + 1, own - 1));
            product_wait<1>();
            pin(scores);
            keys_used(tile);
            if (tile == own - 1) queries_used();
            if (!whole) mask_scores(tile, masks);
            masks = next;
            make_weights([&] {
                product_wait();
                pin(sums);
                pin_weights();
                values_used(tile - 1);
            });
        }
        if (own < count) wait_full(memory, place::keys_full, tiles + own);
        wait_full(memory, place::values_full, tiles + own - 1);
        take_turn();
        auto last_values = [&](auto all) {
            pin(sums);
            pin_weights();
            product_fence();
            multiply_values(own - 1, all);
            pass_turn();
            product_wait();
            pin(sums);
            pin_weights();
        };
        // what lies behind the unit's last key tile is another sequence's, or was never written
        if (own == count && unit.key_start + 2 * count > unit.key_end) {
            last_values(std::false_type());
        } else {
            last_values(std::true_type());
        }
        values_used(own - 1);
        if (own < count) keys_used(own);
    } else {
        pass_turn();
        keys_used(0);
        queries_used();
    }
    for (int32_t tile = own + (own > 0); tile <= count; ++tile) {
        if (tile == 0) continue;
        if (tile < count) wait_full(memory, place::keys_full, tiles + tile);
        wait_full(memory, place::values_full, tiles + tile - 1);
        take_turn();
        pass_turn();
        if (tile < count) keys_used(tile);
        values_used(tile - 1);
    }

    int const odd = t % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        int const row = first_row + 8 * half;
        bool const there = row < unit.rows;
        if (!unit.ends) {
            if (there && t == 0) plan.state_sums[state_row + 8 * half] = make_float2(largest[half], sum);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                if (!there) continue;
                *reinterpret_cast<float2*>(plan.states + (state_row + 8 * half) * HopperShape::width + j * 8 + 2 * t) =
                    make_float2(sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
            }
            continue;
        }
        int64_t const token = unit.token + row;
        float const top = largest[half] * factor;
        float denominator = sum;
        if (a.sinks != nullptr) denominator += exp2f(a.sinks[head] * log2e - top);
        float const share = sum > 0.0f ? 1.0f / denominator : 0.0f;
        if (a.lse != nullptr && there && t == 0) a.lse[token * a.heads + head] = logf(sum) + top * ln2;
        int64_t const start = token * a.output.token_stride + head * a.output.head_stride;
        if (vectors) {
            // lanes 2 i and 2 i + 1 exchange, so that each stores four neighbouring columns of one of two groups of eight
            auto* const target = static_cast<__nv_bfloat16*>(a.output.data) + start + odd * 8 + t / 2 * 4;
#pragma unroll
            for (int j = 0; j < 16; j += 2) {
                uint32_t const left = pack(sums[4 * j + 2 * half] * share, sums[4 * j + 2 * half + 1] * share);
                uint32_t const right = pack(sums[4 * j + 4 + 2 * half] * share, sums[4 * j + 5 + 2 * half] * share);
                uint32_t const other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
                if (!there) continue;
                *reinterpret_cast<uint2*>(target + j * 8) = odd ? make_uint2(other, right) : make_uint2(left, other);
            }
            continue;
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            if (!there) continue;
            int const column = j * 8 + 2 * t;
            store_float(a.output.data, a.output.type, start + column, sums[4 * j + 2 * half] * share);
            store_float(a.output.data, a.output.type, start + column + 1, sums[4 * j + 2 * half + 1] * share);
        }
    }
}

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
