// The fourth warpgroup of attend_hopper_bf16.cu, which brings keys that the copy engine cannot: listed rows are gathered, codes (fp8, fp8_ds_mla)
// decoded.
#pragma once

#include <type_traits>

#include "attend_hopper_bf16_rows.cuh"

namespace mla {
namespace hopper_bf16 {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Listed keys, by a group of its own: 72 KB of a tile in 36 copies a thread, which took the output groups a quarter of their time.
// Of the rows' finding each of the first 64 threads has one key of every tile.
struct TileGatherer {
    static constexpr int step = group / 8;  // rows that all threads copy at once, a unit of each piece

    const Attend& work;
    const Item& item;
    const Span& span;
    int thread;
    uint32_t found[tile / step];  // offsets of the thread's rows
    uint32_t present;  // a bit for each of the warp's 32 keys, in two warps

    // All tiles one after the other.
    __device__ void run(uint8_t* memory) {
        thread = threadIdx.x % group;
        RowOffsets<true, tile> rows;
        if (thread < tile) rows.begin(work, item, span, thread);
#pragma unroll 1
        for (int32_t n = 0; n < span.count; ++n) {
            auto* offsets = reinterpret_cast<uint32_t*>(memory + FedPlaces::offsets) + (n & 1) * tile;
            if (thread < tile) {
                uint32_t const offset = rows.next(work, item, span);
                offsets[thread] = offset;
                present = __ballot_sync(0xffffffffu, offset != no_row);
            }
            named_sync(rows_found, group);
#pragma unroll
            for (int k = 0; k < tile / step; ++k) found[k] = offsets[thread / 8 + step * k];
            bring<0>(memory, n);
            bring<1>(memory, n);
        }
    }

private:
    template <int side>
    __device__ void bring(uint8_t* memory, int32_t n) const {
        wait_for_place(memory, n, side);
        bool const tells = thread < tile && thread % warp_size == 0;
        if (side == 0 && tells) reinterpret_cast<uint32_t*>(memory + FedPlaces::there)[(n & 1) * 2 + thread / warp_size] = present;
        int const unit = thread % 8, first_row = thread / 8;
        uint32_t const target = shared_address(memory + FedPlaces::tiles) + (n & 1) * tile_bytes + first_piece(side) * piece_bytes +
                                first_row * 128 + ((unit ^ (first_row & 7)) << 4);
#pragma unroll
        for (int k = 0; k < tile / step; ++k) {
            bool const there = found[k] != no_row;
            const uint8_t* source = work.pool + (there ? static_cast<uint64_t>(found[k]) * 16 : 0) + first_piece(side) * 128 + unit * 16;
#pragma unroll
            for (int i = 0; i < side_pieces(side); ++i) copy_async_16(target + k * (step * 128) + i * piece_bytes, source + i * 128, there);
        }
        barrier_arrive_after_copies(barrier_of(memory, FedPlaces::full, n, side));
        if (tells) barrier_arrive(barrier_of(memory, FedPlaces::full, n, side));
    }
};

__device__ const uint4 missing_row[(rank + rank / scale_group * 4 + rope * 2) / 16] = {};

// Codes of the latent as bf16 values, of whole sequences or of lists, by a group of its own. A scale of a whole row (fp8) is given to
// the scores' group, and what the codes become is exact; else they are rounded with their scales, which are two bf16 numbers each. These
// have the 2^120 of `decode_pair` in them, unless one of the scales is too large for that.
// Rows are fetched half a tile at a time, eight by a warp, each part while that of the rows before is decoded. Four lanes have a row:
// 16 of its columns of each piece, and two units of its rope, which go to their places without a register: what is stored from registers
// keeps these until shared memory has taken it, behind all that the products read. Where there are no more than two tiles all of the
// block's warps decode them at once, for nobody has anything else to do.
template <bool lists, int format>
struct TileDecoder {
    static constexpr int half = tile / 2, rows = half / 4, tile_warps = tile / rows;
    static constexpr int few_tiles = fed_threads / warp_size / tile_warps;
    static_assert(few_tiles == 2);  // as many as there are places
    static constexpr bool page_scales = format == row_format::fp8;
    static constexpr int rope_offset = rank + (page_scales ? 0 : rank / scale_group * 4), row_bytes = rope_offset + 2 * rope;

    const Attend& work;
    const Item& item;
    const Span& span;
    int quarter;
    std::conditional_t<lists, StagedRows<page_scales>, RowOffsets<lists, half, page_scales>> offsets;
    const uint8_t *row, *rope_row;  // to be fetched; and whose codes are there, but for its rope
    bool present;
    uint4 codes[value_pieces];
    uint4 scales;  // f32

    // Two scales in a unit as pairs of bf16 numbers whose sums they are, to 2^-16; and one of them, twice.
    struct Scales {
        uint32_t high, low;
        __device__ Scales(uint32_t first, uint32_t second, float unit) {
            float2 const both = make_float2(__uint_as_float(first) * unit, __uint_as_float(second) * unit);
            __nv_bfloat162 const rounded = __float22bfloat162_rn(both);
            float2 const back = __bfloat1622float2(rounded);
            __nv_bfloat162 const rest = __floats2bfloat162_rn(both.x - back.x, both.y - back.y);
            high = reinterpret_cast<const uint32_t&>(rounded);
            low = reinterpret_cast<const uint32_t&>(rest);
        }
    };
    struct Factor {
        uint32_t high, low;
    };

    // All tiles at once where they are few, by all threads.
    __device__ void run_few(uint8_t* memory) {
        if (span.count > few_tiles) return;
        int const warp = threadIdx.x / warp_size % tile_warps, lane = threadIdx.x % warp_size, own_row = lane / 4;
        int const n = threadIdx.x / warp_size / tile_warps, line = warp * rows + own_row;
        if (n >= span.count) return;
        quarter = lane % 4;
        RowOffsets<lists, half, page_scales> first;
        first.begin(work, item, span, n * tile + line);
        take_row(first.next(work, item, span));
        if constexpr (page_scales) {
            scales.x = __float_as_uint(first.scale);
        } else {
            scales = load_in_order(row - quarter * 16 + rank);
        }
#pragma unroll
        for (int i = 0; i < value_pieces; ++i) fetch(i);
        uint32_t const bits = rows_of(__ballot_sync(0xffffffffu, present));
        if (lane == 0) memory[FedPlaces::there + n * 8 + warp] = static_cast<uint8_t>(bits);
        if (page_scales) put_scale(memory, n, line);
        rope_row = row;
        decode_row<false>(memory, n, line, own_row);
        copy_async_wait_all();
        fence_async();
        __syncwarp();
        static_assert(code_arrivals % tile_warps == 0);
        if (lane < code_arrivals / tile_warps) barrier_arrive(barrier_of(memory, FedPlaces::full, n, 0));
    }

    // All tiles one after the other where they are more, by a group.
    __device__ void run(uint8_t* memory) {
        if (span.count <= few_tiles) return;
        int const warp = threadIdx.x % group / warp_size, lane = threadIdx.x % warp_size, own_row = lane / 4;
        quarter = lane % 4;
        if constexpr (lists) {
            offsets.begin(work, item, span, memory, warp * rows + own_row);
        } else {
            offsets.begin(work, item, span, warp * rows + own_row);
        }
        find_row();
        scales = ask_scales();
#pragma unroll
        for (int i = 0; i < value_pieces; ++i) fetch(i);
        bool fetched = present;
        rope_row = row;
        find_row();
#pragma unroll 1
        for (int32_t m = 0; m < 2 * span.count; ++m) {
            int32_t const n = m / 2;
            if (m % 2 == 0) wait_for_place(memory, n, 1);
            int const line = m % 2 * half + warp * rows + own_row;
            uint32_t const bits = rows_of(__ballot_sync(0xffffffffu, fetched));
            if (lane == 0) memory[FedPlaces::there + (n & 1) * 8 + m % 2 * 4 + warp] = static_cast<uint8_t>(bits);
            fetched = present;
            if (page_scales && !lists) put_scale(memory, n, line);
            decode_row<true>(memory, n, line, own_row);
            if (m % 2 == 1) {  // without a fence, which would wait for the next rows: those who use the tile have one
                barrier_arrive_after_copies(barrier_of(memory, FedPlaces::full, n, 0));
                __syncwarp();
                if (lane < 2) barrier_arrive(barrier_of(memory, FedPlaces::full, n, 0));
            }
            rope_row = row;
            find_row();
        }
    }

private:
    static constexpr uint32_t large_scale = 0x43000000;  // 2^7 as bits
    __device__ static uint32_t most(uint32_t a, uint32_t b) { return a > b ? a : b; }

    // The row's only scale, where it is in a register.
    __device__ void put_scale(uint8_t* memory, int32_t n, int line) const {
        if (quarter == 0) *reinterpret_cast<uint32_t*>(memory + FedPlaces::scale_of(n, line)) = scales.x;
    }

    // The lane's codes to their places; `more`: while those of the row after are fetched.
    template <bool more>
    __device__ void decode_row(uint8_t* memory, int32_t n, int line, int own_row) {
        uint32_t const target = shared_address(memory) + FedPlaces::tiles + (n & 1) * tile_bytes + line * 128;
        if (!page_scales && __any_sync(0xffffffffu, most(most(scales.x, scales.y), most(scales.z, scales.w)) >= large_scale)) {
            decode_codes<more, true>(target, own_row);
        } else {
            decode_codes<more, false>(target, own_row);
        }
    }

    template <bool more, bool large>
    __device__ void decode_codes(uint32_t target, int own_row) {
        constexpr float unit_of_codes = large || page_scales ? 1.0f : 0x1p120f;
        Scales const pairs[2] = {{scales.x, scales.y, unit_of_codes}, {scales.z, scales.w, unit_of_codes}};
        if (more) scales = ask_scales();
        uint32_t const unit = (2 * quarter ^ own_row) * 16, rope_target = target + value_pieces * piece_bytes;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            copy_async_16(rope_target + ((quarter + i) * 16 ^ own_row * 16), rope_row + rope_offset + i * 16, true);
        }
#pragma unroll
        for (int i = 0; i < value_pieces; ++i) {
            uint32_t const which = i % 4 < 2 ? 0x1010 : 0x3232;
            Factor const factor{__byte_perm(pairs[i / 4].high, 0, which), __byte_perm(pairs[i / 4].low, 0, which)};
            store_in_order(target + i * piece_bytes + unit, decode<large>(codes[i].x, codes[i].y, factor));
            store_in_order(target + i * piece_bytes + (unit ^ 16), decode<large>(codes[i].z, codes[i].w, factor));
            if (more) fetch(i);
        }
    }

    __device__ void take_row(uint32_t offset) {
        present = offset != no_row;
        row = (present ? work.pool + static_cast<uint64_t>(offset) * 16 : reinterpret_cast<const uint8_t*>(missing_row)) + quarter * 16;
    }
    __device__ void find_row() {
        take_row(offsets.next(work, item, span));
        // to L2 before they are asked for: what is on its way to registers is too little to cover the latency of DRAM
        prefetch(row + quarter * 112);
        if (quarter * 128 + 512 < row_bytes) prefetch(row + quarter * 112 + 512);
        if (quarter == 3) prefetch(row - quarter * 16 + row_bytes - 1);
    }

    // Of 32 lanes' bits those of the eight rows.
    __device__ static uint32_t rows_of(uint32_t bits) {
        bits &= 0x11111111u;
        bits = (bits | bits >> 3) & 0x03030303u;
        bits = (bits | bits >> 6) & 0x000f000fu;
        return (bits | bits >> 12) & 0xffu;
    }

    // The row's four scales, or its only one; that of a listed row is not here.
    __device__ uint4 ask_scales() const {
        if constexpr (!page_scales) {
            return load_in_order(row - quarter * 16 + rank);
        } else if constexpr (!lists) {
            return make_uint4(__float_as_uint(offsets.scale), 0, 0, 0);
        } else {
            return {};
        }
    }
    // Asks for what the lane has of piece i.
    __device__ void fetch(int i) { codes[i] = load_in_order(row + i * 64); }

    // Eight codes.
    template <bool large>
    __device__ static uint4 decode(uint32_t low, uint32_t high, Factor factor) {
        auto value = [&](uint32_t pair) {
            if (large || page_scales) pair = decode_pair(pair);
            if (page_scales) return pair;
            const auto &codes = reinterpret_cast<const __nv_bfloat162&>(pair), &low = reinterpret_cast<const __nv_bfloat162&>(factor.low);
            __nv_bfloat162 const values = __hfma2(codes, reinterpret_cast<const __nv_bfloat162&>(factor.high), __hmul2(codes, low));
            return reinterpret_cast<const uint32_t&>(values);
        };
        return make_uint4(value(code_pair<codes_01>(low)), value(code_pair<codes_23>(low)), value(code_pair<codes_01>(high)),
                          value(code_pair<codes_23>(high)));
    }
};

#endif

}  // namespace hopper_bf16
}  // namespace mla
