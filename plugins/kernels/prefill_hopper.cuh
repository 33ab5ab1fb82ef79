// The stages of prefill_tensor.cuh that multiply matrices, on SM90's tensor cores (Dn 128, Dr 64, Dv 128): products by wgmma,
// operands by the copy engine. A block has two warpgroups, each with 64 of its 128 rows. Their thread 0 orders copies, each
// time when both have used what the copy will replace.
#pragma once

#include <type_traits>

#include "hopper.cuh"
#include "prefill_tensor.cuh"
#include "tensor_map.h"

namespace mla::prefill_hopper {

using namespace prefill_tensor;
using namespace hopper;

// Tensors of the scratch memory, and boxes of 128 rows of 128 bytes of each.
struct Maps {
    CUtensorMap latents;   // [chunk keys, R]
    CUtensorMap weights;   // [H x (Dn + Dv), R]
    CUtensorMap expanded;  // [group heads, chunk keys, Dn + Dv]
    CUtensorMap ropes;     // [chunk keys, Dr]
};

struct HopperShape {
    static constexpr int rows = 128, warps = 8, threads = 256;
    static constexpr int nope = 128, rope = 64, width = 128;
};

constexpr int piece_bytes = 128 * 128;  // 128 rows of 64 values
constexpr int keys_of_tile = 128;
constexpr int key_pieces = 3, value_pieces = 2;
enum : int { turn = 1 };  // named barriers, of each warpgroup: it may multiply
constexpr int expand_ring = 4, expand_pieces = 2;  // in flight; of latents and weights

// Where things lie in shared memory, in bytes. What is expanded has the place of keys and values.
namespace place {
constexpr int keys = 0;  // [2]
constexpr int values = keys + 2 * key_pieces * piece_bytes;  // [2]
constexpr int queries = values + 2 * value_pieces * piece_bytes;
constexpr int barriers = queries + key_pieces * piece_bytes;
constexpr int keys_full = barriers, keys_used = keys_full + 16, values_full = keys_used + 16, values_used = values_full + 16;
constexpr int expand_full = values_used + 16, expand_used = expand_full + 8 * expand_ring;
constexpr int total = expand_used + 8 * expand_ring;
}  // namespace place
static_assert(expand_ring * expand_pieces * piece_bytes <= place::queries);

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Before the copy engine reads what threads have written to global memory.
__device__ inline void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ inline void init_barriers(uint8_t* memory) {
    for (int i = 0; i < 2; ++i) {
        barrier_init(shared_address(memory + place::keys_full) + 8 * i, 1);
        barrier_init(shared_address(memory + place::values_full) + 8 * i, 1);
        barrier_init(shared_address(memory + place::keys_used) + 8 * i, HopperShape::warps);
        barrier_init(shared_address(memory + place::values_used) + 8 * i, HopperShape::warps);
    }
    for (int i = 0; i < expand_ring; ++i) {
        barrier_init(shared_address(memory + place::expand_full) + 8 * i, 1);
        barrier_init(shared_address(memory + place::expand_used) + 8 * i, HopperShape::warps);
    }
    fence_barrier_init();
}

// expanded = row scale x latents x weights^T for heads head0.. and the first `tiles` key tiles of the chunk. `steps`: of this
// kind that the block has done before.
__device__ inline void expand(const Plan& plan, const Maps& maps, uint8_t* memory, int32_t head0, int32_t heads, int32_t tiles,
                       uint32_t& steps) {
    constexpr int depth = 512 / 64;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, odd = t % 2;
    int32_t const keys = tiles * key_tile, columns = heads * plan.columns();
    int32_t const down = ceil_div(keys, keys_of_tile), across = columns / 128;
    int64_t const jobs = static_cast<int64_t>(down) * across;
    int64_t const own_jobs = jobs > blockIdx.x ? (jobs - 1 - blockIdx.x) / gridDim.x + 1 : 0;
    int64_t const own_steps = own_jobs * depth;
    auto job_of = [&](int64_t step) { return blockIdx.x + step / depth * gridDim.x; };
    auto order = [&](int64_t step) {  // by one thread
        if (step >= own_steps) return;
        uint32_t const number = steps + static_cast<uint32_t>(step), slot = number % expand_ring;
        if (number >= expand_ring) {
            barrier_wait(shared_address(memory + place::expand_used) + 8 * slot, (number / expand_ring - 1) & 1);
        }
        int64_t const job = job_of(step);
        uint32_t const barrier = shared_address(memory + place::expand_full) + 8 * slot;
        uint32_t const target = shared_address(memory) + slot * (expand_pieces * piece_bytes);
        int const column = static_cast<int>(step % depth) * 128;
        barrier_expect(barrier, expand_pieces * piece_bytes);
        copy_box(target, &maps.latents, barrier, column, static_cast<int>(job % down) * keys_of_tile, 0, 0);
        copy_box(target + piece_bytes, &maps.weights, barrier, column,
                 head0 * plan.columns() + static_cast<int>(job / down) * 128, 0, 0);
    };
    if (threadIdx.x == 0) {
        for (int step = 0; step < expand_ring - 1; ++step) order(step);
    }
    for (int64_t first = 0; first < own_steps; first += depth) {
        float sums[64];
        pin(sums);
#pragma unroll
        for (int i = 0; i < depth; ++i) {
            uint32_t const number = steps + static_cast<uint32_t>(first) + i, slot = number % expand_ring;
            uint32_t const base = shared_address(memory) + slot * (expand_pieces * piece_bytes);
            uint32_t const x = tile_descriptor(base + warp / 4 * (piece_bytes / 2)), w = tile_descriptor(base + piece_bytes);
            barrier_wait(shared_address(memory + place::expand_full) + 8 * slot, number / expand_ring & 1);
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
            if (i > 0) {  // the products before are done
                product_wait<1>();
                if (lane == 0) barrier_arrive(shared_address(memory + place::expand_used) + 8 * ((number - 1) % expand_ring));
            }
            if (threadIdx.x == 0) order(first + i + expand_ring - 1);
            __syncwarp();
        }
        product_wait();
        pin(sums);
        if (lane == 0) {
            barrier_arrive(shared_address(memory + place::expand_used) +
                           8 * ((steps + static_cast<uint32_t>(first) + depth - 1) % expand_ring));
        }

        // Lanes 2 i and 2 i + 1 exchange, so that each stores four neighbouring columns of one of two groups of eight.
        int64_t const job = job_of(first);
        int32_t const m0 = static_cast<int32_t>(job % down) * keys_of_tile, n0 = static_cast<int32_t>(job / down) * 128;
        int32_t const head = n0 / plan.columns();
        __nv_bfloat16* const target = plan.expanded +
                                      static_cast<int64_t>(head) * plan.chunk_keys() * plan.columns() +
                                      (n0 - head * plan.columns()) + odd * 8 + t / 2 * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int32_t const key = m0 + warp * 16 + half * 8 + g;
            float const scale = key < keys ? plan.row_scales[key] : 0.0f;
#pragma unroll
            for (int j = 0; j < 16; j += 2) {
                uint32_t const left = pack(sums[4 * j + 2 * half] * scale, sums[4 * j + 2 * half + 1] * scale);
                uint32_t const right = pack(sums[4 * j + 4 + 2 * half] * scale, sums[4 * j + 5 + 2 * half] * scale);
                uint32_t const other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
                if (key < keys) {
                    *reinterpret_cast<uint2*>(target + static_cast<int64_t>(key) * plan.columns() + j * 8) =
                        odd ? make_uint2(other, right) : make_uint2(left, other);
                }
            }
        }
    }
    steps += static_cast<uint32_t>(own_steps);
}

// Attention of one unit over its key tiles of this chunk, two of them at a time. `tiles`: of these pairs that the block has
// done before.
__device__ inline void attend_unit(const Plan& plan, const Maps& maps, uint8_t* memory, const Unit& unit, int32_t head0,
                            uint32_t& tiles) {
    const PrefillArguments& a = plan.arguments;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * 16 + g;
    int const head = head0 + unit.head;
    int32_t const count = ceil_div(unit.key_end - unit.key_start, 2);
    auto barrier_of = [&](int barriers, uint32_t number) { return shared_address(memory + barriers) + 8 * (number & 1); };
    auto order = [&](int full, int used, int start, int bytes, uint32_t number, auto copy) {  // by one thread
        if (number >= 2) barrier_wait(barrier_of(used, number), (number / 2 - 1) & 1);
        uint32_t const barrier = barrier_of(full, number);
        barrier_expect(barrier, bytes);
        copy(shared_address(memory + start) + (number & 1) * bytes, barrier);
    };
    auto order_keys = [&](int32_t tile) {
        if (tile >= count) return;
        int32_t const key = unit.key_start * key_tile + tile * keys_of_tile;
        order(place::keys_full, place::keys_used, place::keys, key_pieces * piece_bytes, tiles + tile,
              [&](uint32_t target, uint32_t barrier) {
                  copy_box(target, &maps.expanded, barrier, 0, key, unit.head, 0);
                  copy_box(target + piece_bytes, &maps.expanded, barrier, 128, key, unit.head, 0);
                  copy_box(target + 2 * piece_bytes, &maps.ropes, barrier, 0, key, 0, 0);
              });
    };
    auto order_values = [&](int32_t tile) {
        if (tile >= count) return;
        int32_t const key = unit.key_start * key_tile + tile * keys_of_tile;
        order(place::values_full, place::values_used, place::values, value_pieces * piece_bytes, tiles + tile,
              [&](uint32_t target, uint32_t barrier) {
                  copy_box(target, &maps.expanded, barrier, 256, key, unit.head, 0);
                  copy_box(target + piece_bytes, &maps.expanded, barrier, 384, key, unit.head, 0);
              });
    };
    if (threadIdx.x == 0) {
        for (int tile = 0; tile < 2; ++tile) {
            order_keys(tile);
            order_values(tile);
        }
    }

    // a negative softmax scale goes into the queries, as in prefill_tensor.cuh
    uint32_t const signs = a.softmax_scale < 0.0f ? 0x80008000u : 0u;
    float const factor = fmaxf(fabsf(a.softmax_scale) * log2e, 1e-30f);
    bool const copies = plan.nope_vectors && plan.rope_vectors && a.query_nope.type == MLA_BFLOAT16 &&
                        a.query_rope.type == MLA_BFLOAT16 && signs == 0;
    for (int i = threadIdx.x; i < HopperShape::rows * key_pieces * 8; i += HopperShape::threads) {
        int const row = i / (key_pieces * 8), u = i % (key_pieces * 8);
        bool const there = row < unit.rows, is_nope = u < HopperShape::nope / 8;
        const HeadView<const void*>& view = is_nope ? a.query_nope : a.query_rope;
        int64_t const at = (unit.token + row) * view.token_stride + head * view.head_stride +
                           (is_nope ? u : u - HopperShape::nope / 8) * 8;
        uint8_t* const target = memory + place::queries + u / 8 * piece_bytes + row * 128 + ((u % 8 ^ (row & 7)) << 4);
        if (copies) {
            copy_async_16(shared_address(target), static_cast<const __nv_bfloat16*>(view.data) + (there ? at : 0), there);
            continue;
        }
        uint4 values = make_uint4(0, 0, 0, 0);
        if (there) values = load_eight(view.data, view.type, at, 8, is_nope ? plan.nope_vectors : plan.rope_vectors);
        *reinterpret_cast<uint4*>(target) =
            make_uint4(values.x ^ signs, values.y ^ signs, values.z ^ signs, values.w ^ signs);
    }
    copy_async_wait_all();
    fence_async();

    float sums[64], largest[2], total[2];  // total: this lane's part
    int64_t const state_row = static_cast<int64_t>(unit.head) * a.step.tokens + unit.token + first_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        bool const stored = !unit.starts && first_row + 8 * half < unit.rows;
        float2 state = make_float2(-INFINITY, 0.0f);
        if (stored) state = plan.state_sums[state_row + 8 * half];
        largest[half] = state.x;
        total[half] = t == 0 ? state.y : 0.0f;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            float2 pair = make_float2(0.0f, 0.0f);
            if (stored) {
                const float* row = plan.states + (state_row + 8 * half) * HopperShape::width;
                pair = *reinterpret_cast<const float2*>(row + j * 8 + 2 * t);
            }
            sums[4 * j + 2 * half] = pair.x;
            sums[4 * j + 2 * half + 1] = pair.y;
        }
    }
    __syncthreads();  // the queries are there

    // The warpgroups take turns: one multiplies, values of a tile and keys of the next, while the other makes weights.
    int const side = warp / 4, group_row = side * 64;
    auto take_turn = [&] { named_sync(turn + side, HopperShape::threads); };
    auto pass_turn = [&] { named_arrive(turn + 1 - side, HopperShape::threads); };
    if (side == 1) pass_turn();
    bool const idle = group_row >= unit.rows;
    uint32_t const queries = tile_descriptor(shared_address(memory + place::queries) + group_row * 128);
    for (int32_t tile = 0; tile < count; ++tile) {
        uint32_t const number = tiles + tile;
        int32_t const first_tile = unit.key_start + 2 * tile;
        bool const whole = first_tile + 1 < unit.key_end;
        int32_t const key0 = (first_tile - unit.first_key) * key_tile;
        bool const skip = idle || key0 > unit.position + group_row + 63;
        uint64_t const masks[2] = {plan.key_masks[first_tile], whole ? plan.key_masks[first_tile + 1] : 0};
        float scores[64];
        barrier_wait(barrier_of(place::keys_full, number), number / 2 & 1);
        if (tile == 0) take_turn();
        if (!skip) {
            uint32_t const keys =
                tile_descriptor(shared_address(memory + place::keys) + (number & 1) * (key_pieces * piece_bytes));
            pin(scores);
            product_fence();
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
            pass_turn();  // what the other one multiplies comes behind these products
            product_wait();
            pin(scores);
        } else {
            pass_turn();
        }
        if (lane == 0) barrier_arrive(barrier_of(place::keys_used, number));

        uint32_t weights[8][4];
        if (!skip) {
            bool const masked = (masks[0] & masks[1]) != ~uint64_t{0} || key0 + keys_of_tile - 1 > unit.position + group_row;
            if (masked) {
                int32_t const last = unit.position + first_row - key0 - 2 * t;
#pragma unroll
                for (int i = 0; i < 64; ++i) {
                    int const key = i / 4 * 8 + i % 2;  // counted from the lane's first
                    bool const present = (masks[i / 32] >> (2 * t + key % 64) & 1) != 0;
                    if (!present || key > last + i / 2 % 2 * 8) scores[i] = -INFINITY;
                }
            }
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = largest[half];
#pragma unroll
                for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                float const base = top == -INFINITY ? 0.0f : top * factor;
                scale[half] = power_of_two(fmaf(largest[half], factor, -base));
                largest[half] = top;
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    float const left = power_of_two(fmaf(scores[4 * j + 2 * half], factor, -base));
                    float const right = power_of_two(fmaf(scores[4 * j + 2 * half + 1], factor, -base));
                    sum += left + right;
                    weights[j / 2][j % 2 * 2 + half] = pack(left, right);
                }
                total[half] = fmaf(total[half], scale[half], sum);
            }
            if (__any_sync(0xffffffffu, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
                for (int i = 0; i < 64; ++i) sums[i] *= scale[i / 2 % 2];
            }
        }
        if (threadIdx.x == 0) {
            order_keys(tile + 2);
            if (tile >= 1) order_values(tile + 1);
        }
        __syncwarp();
        barrier_wait(barrier_of(place::values_full, number), number / 2 & 1);
        take_turn();
        if (!skip) {
            uint32_t const values =
                tile_descriptor(shared_address(memory + place::values) + (number & 1) * (value_pieces * piece_bytes));
            auto multiply = [&](auto all) {
                pin(sums);
#pragma unroll
                for (int i = 0; i < 32; ++i) asm volatile("" : "+r"(weights[i / 4][i % 4])::"memory");
                product_fence();
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
                product_wait();
                pin(sums);
            };
            // what lies behind the unit's last key tile is another sequence's, or was never written
            if (whole) {
                multiply(std::true_type());
            } else {
                multiply(std::false_type());
            }
        }
        if (lane == 0) barrier_arrive(barrier_of(place::values_used, number));
    }
    if (side == 0) pass_turn();
    tiles += static_cast<uint32_t>(count);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        int const row = first_row + 8 * half;
        if (row >= unit.rows) continue;
        if (!unit.ends) {
            if (t == 0) plan.state_sums[state_row + 8 * half] = make_float2(largest[half], sum);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
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
        if (a.lse != nullptr && t == 0) a.lse[token * a.heads + head] = logf(sum) + top * ln2;
        int64_t const start = token * a.output.token_stride + head * a.output.head_stride;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            int const column = j * 8 + 2 * t;
            store_pair(a.output, plan.output_pairs, start + column, sums[4 * j + 2 * half] * share,
                       sums[4 * j + 2 * half + 1] * share, a.value - column);
        }
    }
}

#endif

__global__ void __launch_bounds__(HopperShape::threads, 1)
    prefill_hopper(const __grid_constant__ Plan plan, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = HopperShape;
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    const PrefillArguments& a = plan.arguments;
    auto const grid = cooperative_groups::this_grid();
    if (a.zero_padding) zero_padding<S::threads>(a);
    if (!anything_served<S::threads>(a)) return;  // every block finds the same
    if (threadIdx.x == 0) init_barriers(shared_memory);
    if (blockIdx.x == 0) make_starts<S>(plan);
    convert_weights<S::threads>(plan, reinterpret_cast<float*>(shared_memory));
    fence_copies();
    grid.sync();
    uint32_t expand_steps = 0, attend_tiles = 0;
    int32_t const key_tiles = plan.key_tiles[a.step.sequences];
    for (int32_t head0 = 0; head0 < a.heads; head0 += plan.group_heads) {
        int32_t const heads = min(plan.group_heads, a.heads - head0);
        for (int32_t start = 0; start < key_tiles; start += plan.chunk_tiles) {
            int32_t const end = min(start + plan.chunk_tiles, key_tiles);
            if (head0 == 0 || key_tiles > plan.chunk_tiles) {  // otherwise they are still there
                gather<S::threads>(plan, start, end);
                fence_copies();
                grid.sync();
            }
            if (blockIdx.x == 0 && threadIdx.x == 0) *plan.counter = 0;
            fence_copies();
            expand(plan, maps, shared_memory, head0, heads, end - start, expand_steps);
            fence_copies();
            grid.sync();
            fence_copies();
            attend<S>(plan, heads, start, end, [&](const Unit& unit) {
                attend_unit(plan, maps, shared_memory, unit, head0, attend_tiles);
            });
            grid.sync();
        }
    }
#endif
}

}  // namespace mla::prefill_hopper
