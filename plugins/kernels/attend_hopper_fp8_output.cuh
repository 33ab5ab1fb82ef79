// The warpgroups of attend_hopper_fp8.cu that make the output.
#pragma once

#include "attend_hopper_fp8_query.cuh"
#include "code_fragments.cuh"

namespace mla {
namespace hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Two values of a part that is narrow: float16 where they are of codes, which float16 holds whatever they are, else bfloat16.
template <typename F>
struct NarrowPair {
    __device__ static uint32_t make(float first, float second) {
        if constexpr (F::flat) {
            __half2 const pair = __floats2half2_rn(first, second);
            return reinterpret_cast<const uint32_t&>(pair);
        } else {
            __nv_bfloat162 const pair = __floats2bfloat162_rn(first, second);
            return reinterpret_cast<const uint32_t&>(pair);
        }
    }
    __device__ static float2 read(uint32_t word) {
        if constexpr (F::flat) {
            return __half22float2(reinterpret_cast<const __half2&>(word));
        } else {
            return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
        }
    }
};

// 64 columns x 128 keys of a piece, of which `make_code_fragments` makes those of four products; the columns of warp w are 16 w and the 15
// behind it. `line` is the address of the lane's first 16 bytes.
__device__ inline void value_fragments(uint32_t (&a)[4][4], uint32_t line) {
#pragma unroll
    for (int k = 0; k < 4; ++k) ldmatrix_x4_transposed(a[k], line + k * 4096);
}

// 256 columns of the output, which are staged in shared memory in the end. Beside that it orders keys.
template <typename F>
__device__ void output_group(const Attend& work, const Partials& partials, const Item& item, const Ring<F>& ring, uint8_t* memory) {
    using P = Places<F>;
    constexpr int values = F::rows / 2;  // of a thread, of 64 columns
    unsigned const number = F::lists ? threadIdx.x : kept_thread();
    int const warp = number / warp_size % 4, lane = number % warp_size;
    int const side = __shfl_sync(0xffffffffu, number / group - 2, 0);  // from a lane, so that the compiler knows it to be uniform
    uint32_t const place = shared_address(memory) + lane * 128 + ((warp ^ (lane & 7)) << 4);
    // what `place` says again, rather than in registers of its own
    auto own_lane = [&] { return (again(place) - shared_address(memory)) / 128 % warp_size; };
    auto own_warp = [&] { return (again(place) / 16 ^ (again(place) - shared_address(memory)) / 128) % 8; };
    auto own_thread = [&] { return static_cast<int>(own_warp() * warp_size + own_lane()); };
    ListFinder<F> finder;
    if constexpr (F::lists) {  // half of the warps find rows, and gather the first ones, while the others make codes
        if (own_thread() < half) {
            int const key = side * half + own_thread();
            finder.begin(work, item, ring, key);
            named_sync(rows_found, group);
#pragma unroll 1
            for (int i = 0; i < P::early_pieces; ++i) ring.gather(work, 0, i, key);
        } else {
            make_query<F>(work, item, memory, group / warp_size + side * 2 + static_cast<int>(own_warp()) - 2);
        }
        named_sync(queries_there, threads);
#pragma unroll 1
        for (int i = P::early_pieces + side; i < F::ring; i += 2) ring.gather(work, i / pieces, i % pieces, own_thread());
    } else {
        make_query<F>(work, item, memory, static_cast<int>(number / warp_size) - group / warp_size);
        named_sync(queries_there, threads);
        if (number / warp_size == 8) ring.fill(work);
    }
    float sums[4][values];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int i = 0; i < values; ++i) sums[m][i] = 0.0f;
    }

    auto rescale = [&](int buffer) {
        uint32_t const factors = shared_address(memory + P::rescale) + buffer * 256 + own_lane() % 4 * 8;
#pragma unroll
        for (int j = 0; j < F::rows / 8; ++j) {
            float2 const factor = load_pair(factors + 32 * j);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                sums[m][4 * j] *= factor.x;
                sums[m][4 * j + 1] *= factor.y;
                sums[m][4 * j + 2] *= factor.x;
                sums[m][4 * j + 3] *= factor.y;
            }
        }
    };
    if (ring.count > 0) named_arrive(weights_free, threads);
    if (ring.count > 1) named_arrive(weights_free + 1, threads);

#pragma unroll 1
    for (int32_t counted = 0; counted < ring.count; ++counted) {
        int32_t const n = __shfl_sync(0xffffffffu, counted, 0);  // as `side`: where pieces lie takes no registers of threads then
        int const buffer = n & 1;
        uint32_t a[4][4];
        auto fragments = [&](int m) {
            int const piece = F::halved ? m : side + m / 2 * 2;
            if (m == 0) ring.wait(n, piece);  // of the next tile; when a tile's weights are there, all of it is
            uint32_t const line = place + ring.slot(n, piece) * piece_bytes;
            value_fragments(a, (F::halved ? side : m % 2) == 0 ? line : line ^ 64);
            make_code_fragments(a);
        };
        // the piece that step m used is in registers, by now of all warps
        auto use_up = [&](int m) {
            int const id = F::halved ? piece_used + m : piece_used + 2 * side + m / 2;
            int const users = F::halved ? 2 * group : group;
            if (own_warp() == 0 && (!F::halved || side == m % 2)) {
                named_sync(id, users);
                // the first one's fragments did not wait for weights, and so not for the scores either
                if (F::halved && m == 0) barrier_wait(shared_address(memory + P::scored) + 8 * buffer, n / 2 & 1);
                ring.order_after(work, n, F::halved ? m : side + m / 2 * 2);
            } else {
                named_arrive(id, users);
            }
        };
        bool const last = n + 1 == ring.count;  // its tail is cleared only behind the barrier
        if (!last) {
            fragments(0);
            if (F::halved) {
                pin(a);
                use_up(0);
            }
        }
        named_sync(weights_ready + buffer, threads);
        if constexpr (F::lists) {  // only now: weights of the tile before the last one are added up with the table in that place until then
            if (own_thread() < half) finder.advance(work, item, ring, n, side * half + own_thread());
        }
        if (last) fragments(0);
        uint32_t const weights = tile_descriptor(ring.weights(n));
        int flags = 0;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            float part[values];
            pin(part);
            pin(a);
            product_fence();
            product_e4m3<0>(part, a[0], weights);
            product_e4m3<1>(part, a[1], weights);
            product_e4m3<2>(part, a[2], weights);
            product_e4m3<3>(part, a[3], weights);
            product_commit();
            // while the products run
            if (m == 0) {
                int4 const changed = reinterpret_cast<const int4*>(memory + P::changed)[buffer];
                flags = changed.x | changed.y | changed.z | changed.w;
                if ((flags & 1) != 0) rescale(buffer);
            }
            if (!F::lists && (F::halved ? m > 0 : m % 2 == 1)) use_up(m);
            product_wait();
            pin(part);
            if (F::lists && m % 2 == 1) {  // behind the products, for registers' sake
                named_sync(piece_used + 2 * side + m / 2, group);
                ring.gather_after(work, n, side + m / 2 * 2, own_thread());
            }
            if (m < 3) fragments(m + 1);
            if ((flags & 2) == 0) {
#pragma unroll
                for (int i = 0; i < values; ++i) sums[m][i] += part[i];
            } else {
                uint32_t const factors = shared_address(memory + P::tile_factors) + buffer * 256 + own_lane() % 4 * 8;
#pragma unroll
                for (int j = 0; j < F::rows / 8; ++j) {
                    float2 const factor = load_pair(factors + 32 * j);
                    sums[m][4 * j] = fmaf(part[4 * j], factor.x, sums[m][4 * j]);
                    sums[m][4 * j + 1] = fmaf(part[4 * j + 1], factor.y, sums[m][4 * j + 1]);
                    sums[m][4 * j + 2] = fmaf(part[4 * j + 2], factor.x, sums[m][4 * j + 2]);
                    sums[m][4 * j + 3] = fmaf(part[4 * j + 3], factor.y, sums[m][4 * j + 3]);
                }
            }
        }
        if (n + 2 < ring.count) named_arrive(weights_free + buffer, threads);
        // the weights are used, by all
        if (F::lists ? side == buffer : side == 1 && own_warp() == 1) {
            named_sync(tile_done, 3 * group);
            if constexpr (F::lists) {
                ring.gather_after(work, n, 4, own_thread());
            } else {
                ring.order_after(work, n, 4);
            }
        } else {
            named_arrive(tile_done, 3 * group);
        }
    }

    unsigned const thread = threadIdx.x % (2 * group);
    int const t = thread % 4, first_column = thread / group * (F::halved ? 64 : 256) + thread / warp_size % 4 * 16 + thread % warp_size / 4 * 2;
    auto column = [&](int m) { return first_column + (F::halved ? Ring<F>::column(m) * 128 : m * 64); };
    __syncthreads();  // the factors are there, and nobody needs keys and queries any more
    const auto* factors = reinterpret_cast<const float*>(memory + P::factors);
    auto for_pairs = [&](auto&& put) {  // of columns that follow each other
#pragma unroll
        for (int j = 0; j < F::rows / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int const row = 8 * j + 2 * t + i;
                float const factor = factors[row];
#pragma unroll
                for (int m = 0; m < 4; ++m) put(row, column(m), sums[m][4 * j + i] * factor, sums[m][4 * j + 2 + i] * factor);
            }
        }
    };
    if (F::cluster > 1 || (item.slot >= 0 && partials.type != MLA_FLOAT)) {
        for_pairs([&](int row, int column, float first, float second) {
            *reinterpret_cast<uint32_t*>(memory + (row * narrow_row + column) * 2) = NarrowPair<F>::make(first, second);
        });
        fence_async();
    } else {
        for_pairs([&](int row, int column, float first, float second) {
            *reinterpret_cast<float2*>(memory + (row * staged_row + column) * 4) = make_float2(first, second);
        });
    }
}

#endif

}  // namespace hopper
}  // namespace mla
