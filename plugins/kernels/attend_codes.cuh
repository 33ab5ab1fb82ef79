// Keys of attend_tensor_cores.cu that stay e4m3 codes in shared memory and become bf16 fragments when they are used.
//
// A code's bits are moved to where bf16 has them and nothing else: what that gives is the value times 2^-120, and a subnormal
// bf16 for a subnormal code, which tensor cores take as it is. Other operands have powers of two in them instead, which keep
// all sums far from f32's ends: queries 2^48, or 2^-72 where they meet bf16 (rope), so that scores are 2^-72 of their value;
// weights 2^60, so that outputs are 2^-60 of theirs. NaN codes become 480.
//
// The order of k in a product is free as long as both operands have the same, so a lane reads 16 bytes of a row at a time. Of
// the 64 columns of a latent group lane 4 g + t holds 16 t to 16 t + 15, four in each of four products; of the rope's 64
// columns, in two halves of 32, 8 t to 8 t + 7 of each, four in each of two products.
#pragma once

#include "attend_block.cuh"

namespace mla {

constexpr float code_query_factor = 0x1p48f, code_rope_query_factor = 0x1p-72f, code_scale_factor = 0x1p60f;
constexpr float code_score_factor = 0x1p12f;  // of scores times a row's scale, which has code_scale_factor in it
constexpr float code_output_factor = 0x1p60f;

// Whether rows may stay codes: they come in 16-byte pieces of one kind each.
inline bool keeps_codes(const KvLayout& layout) {
    return layout.format != row_format::bf16 && layout.rank % 16 == 0 && layout.rope_offset % 16 == 0 &&
           layout.rope % (layout.format == row_format::fp8_flat ? 16 : 8) == 0;
}

constexpr int code_groups = 4;  // scales of a row of fp8_ds_mla that keeps codes
constexpr int code_scales_bytes = 4 * code_groups;

// A row's bytes in shared memory: latent codes, then rope (codes or bf16) from column rank_padded on.
template <int rank_padded>
constexpr int code_row_bytes = rank_padded + 2 * rope_padded;

// How 16-byte units of 128 bytes of a row are permuted: eight rows have their unit of one column in different banks, and so
// have two rows that follow each other their units of four columns.
__device__ inline int code_key(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

// The rows' queries to shared memory as fragments A, zero where there is no row and in the padding: of 16 rows, for each of
// `width` / 16 products, 16 bytes of each lane. A warp makes the four products of a group of 64 columns at a time.
constexpr int fragment_bytes = warp_size * 16;

template <int rows, int rank_padded, int warps>
__device__ void load_code_queries(const Attend& work, const Item& item, uint8_t* query, bool aligned) {
    constexpr int groups = (rank_padded + rope_padded) / 64, count = rows / 16 * groups;
    bool const flat = work.layout.format == row_format::fp8_flat;
    int const lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    // two times eight columns of rows g and g + 8
    auto load = [&](int i, auto load_eight_of, uint4 (&units)[2][2]) {
        bool const is_rope = i % groups == rank_padded / 64;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            int const column = is_rope ? (4 * k + t) * 8 : i % groups * 64 + (2 * t + k) * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) units[k][half] = load_eight_of(i / groups * 16 + half * 8 + g, column, is_rope);
        }
    };
    auto store = [&](int i, const uint4 (&units)[2][2]) {
        bool const is_rope = i % groups == rank_padded / 64;
        __nv_bfloat162 const factor = __float2bfloat162_rn(is_rope && !flat ? code_rope_query_factor : code_query_factor);
        auto scaled = [&](uint32_t word) {
            __nv_bfloat162 const pair = __hmul2(reinterpret_cast<const __nv_bfloat162&>(word), factor);
            return reinterpret_cast<const uint32_t&>(pair);
        };
        auto* const to = reinterpret_cast<uint4*>(query + i * 4 * fragment_bytes) + lane;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            uint4 const low = units[k][0], high = units[k][1];
            to[2 * k * warp_size] = make_uint4(scaled(low.x), scaled(high.x), scaled(low.y), scaled(high.y));
            to[(2 * k + 1) * warp_size] = make_uint4(scaled(low.z), scaled(high.z), scaled(low.w), scaled(high.w));
        }
    };
    int const warp = threadIdx.x / warp_size;
    if (aligned && work.query.type == MLA_BFLOAT16) {  // all are read first
        constexpr int each = ceil_div(count, warps);
        uint4 units[each][2][2];
        auto load_whole = [&](int row, int column, bool is_rope) {
            int const pair = item.first_head + row;
            int64_t const at = (item.first_token + pair / work.heads) * work.query.token_stride +
                               (pair % work.heads) * work.query.head_stride + (is_rope ? work.layout.rank : 0) + column;
            bool const there = row < item.count && column < (is_rope ? work.layout.rope : work.layout.rank);
            return there ? *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(work.query.data) + at)
                         : make_uint4(0, 0, 0, 0);
        };
#pragma unroll
        for (int i = 0; i < each; ++i) {
            if (warp + i * warps < count) load(warp + i * warps, load_whole, units[i]);
        }
#pragma unroll
        for (int i = 0; i < each; ++i) {
            if (warp + i * warps < count) store(warp + i * warps, units[i]);
        }
    } else {
#pragma unroll 1
        for (int i = warp; i < count; i += warps) {
            uint4 units[2][2];
            load(i, [&](int row, int column, bool is_rope) {
                return load_query_eight(work, item, row, column, is_rope, aligned);
            }, units);
            store(i, units);
        }
    }
}

// The scores of `m_tiles` x 16 rows and `n_tiles` x 8 keys: the products over columns of part `part` of `parts`.
// `queries`: the lane's fragments of each 16 rows. `keys`: key g of the first eight.
// `grouped`: products with the latent are multiplied by the scales of their 128 columns, four f32 a key at `group_scales`
// (of the first of the lane's keys of C, 2 t).
template <int rank_padded, int m_tiles, int n_tiles, int parts, bool grouped>
__device__ inline void code_scores(float (&scores)[m_tiles][n_tiles][4], const uint8_t* const (&queries)[m_tiles],
                                   const uint8_t* keys, const float* group_scales, bool rope_codes, int part, int g, int t) {
    constexpr int key_bytes = code_row_bytes<rank_padded>;
    constexpr int chains = m_tiles * n_tiles < 4 ? 4 : 1;  // sums of each tile, so that products need not wait for each other
    int const key = code_key(g);
    float sums[chains][m_tiles][n_tiles][4] = {};
    // Sums stand for what they hold times the scale of the group at work: from one to the next they are multiplied by the
    // scales' ratio, which takes fewer registers than sums of each group. A scale below the least counts as the least: no score
    // can tell.
    constexpr float least_scale = 0x1p-60f;
    auto scale_of = [&](int n, int i, int group) {
        return fmaxf(group_scales[(n * 8 + i) * code_groups + group], least_scale);
    };
    auto to_group = [&](int group) {
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float const ratio = __fdividef(group == 0 ? 1.0f : scale_of(n, i, group - 1), scale_of(n, i, group));
#pragma unroll
                for (int chain = 0; chain < chains; ++chain) {
#pragma unroll
                    for (int m = 0; m < m_tiles; ++m) {
                        sums[chain][m][n][i] *= ratio;
                        sums[chain][m][n][i + 2] *= ratio;
                    }
                }
            }
        }
    };
    auto load_a = [&](int product, uint32_t (&a)[m_tiles][4]) {  // of all the columns' products
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) {
            uint4 const bits = *reinterpret_cast<const uint4*>(queries[m] + product * fragment_bytes);
            a[m][0] = bits.x, a[m][1] = bits.y, a[m][2] = bits.z, a[m][3] = bits.w;
        }
    };
    auto multiply = [&](int chain, int n, uint32_t const (&a)[m_tiles][4], uint32_t b0, uint32_t b1) {
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) mma_bf16(sums[chain % chains][m][n], a[m], b0, b1);
    };

#pragma unroll
    for (int half = 0; half < 2 / parts; ++half) {
        int const which = parts == 2 ? part : half;
        uint32_t a[2][m_tiles][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) load_a(rank_padded / 16 + 2 * which + j, a[j]);
        if (rope_codes) {
#pragma unroll
            for (int n = 0; n < n_tiles; ++n) {
                uint2 const words = *reinterpret_cast<const uint2*>(
                    keys + n * 8 * key_bytes + rank_padded + ((2 * which + t / 2) ^ key) * 16 + t % 2 * 8);
                multiply(2 * half, n, a[0], code_pair<codes_01>(words.x), code_pair<codes_23>(words.x));
                multiply(2 * half + 1, n, a[1], code_pair<codes_01>(words.y), code_pair<codes_23>(words.y));
            }
        } else {
#pragma unroll
            for (int n = 0; n < n_tiles; ++n) {
                uint4 const words =
                    *reinterpret_cast<const uint4*>(keys + n * 8 * key_bytes + rank_padded + ((4 * which + t) ^ key) * 16);
                multiply(2 * half, n, a[0], words.x, words.y);
                multiply(2 * half + 1, n, a[1], words.z, words.w);
            }
        }
    }

    // 128 columns: a group of 64 for each part, and one scale
#pragma unroll(grouped ? 1 : rank_padded / 128)
    for (int pair = 0; pair < rank_padded / 128; ++pair) {
        if constexpr (grouped) to_group(pair);
#pragma unroll
        for (int half = 0; half < 2 / parts; ++half) {
            int const which = parts == 2 ? part : half;
            uint4 codes[n_tiles];
#pragma unroll
            for (int n = 0; n < n_tiles; ++n) {
                codes[n] = *reinterpret_cast<const uint4*>(keys + n * 8 * key_bytes + pair * 128 + ((4 * which + t) ^ key) * 16);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t a[m_tiles][4];
                load_a(pair * 8 + which * 4 + j, a);
#pragma unroll
                for (int n = 0; n < n_tiles; ++n) {
                    uint32_t const word = j == 0 ? codes[n].x : j == 1 ? codes[n].y : j == 2 ? codes[n].z : codes[n].w;
                    multiply(j, n, a, code_pair<codes_01>(word), code_pair<codes_23>(word));
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float sum = sums[0][m][n][i];
#pragma unroll
                for (int chain = 1; chain < chains; ++chain) sum += sums[chain][m][n][i];
                scores[m][n][i] = grouped ? sum * scale_of(n, i % 2, rank_padded / 128 - 1) : sum;
            }
        }
    }
}

// Adds weights x values to a warp's outputs of all rows and an eighth of the latent. Of 16 columns, a pair of products of n = 8
// has the even and the odd ones. `weights`: of the warp's columns, `by_halves` where a lane's ldmatrix finds 16 keys of a row.
template <int rank_padded, int tile, int m_tiles, int n_tiles>
__device__ inline void add_code_output(float (&sums)[m_tiles][n_tiles][4], uint32_t weights, uint32_t const (&by_halves)[4],
                                       uint32_t keys, int warp, int lane) {
    constexpr int row_bytes = code_row_bytes<rank_padded>, units = n_tiles / 2;
    constexpr int together = units == 1 ? 2 : 1;  // steps of 16 keys that an ldmatrix has
    constexpr int loads = units == 1 ? 1 : units / 2;  // for so many steps
    uint32_t const a_row = weights + lane % 16 * tile * 2;
    uint32_t const b_row = keys + (together == 2 ? lane : lane % 16) * row_bytes;
    uint32_t columns[loads];
#pragma unroll
    for (int load = 0; load < loads; ++load) {
        int const unit = warp * units + load * 2 + (together == 2 ? 0 : lane / 16);
        columns[load] = (unit ^ code_key(lane & 7)) * 16;
    }
    constexpr int steps = tile / 16 / together * loads, ahead = 2 < steps ? 2 : 1;
    uint32_t a[m_tiles][4], words[ahead + 1][4];
    auto load = [&](int step) {
        ldmatrix_x4_transposed(words[step % (ahead + 1)],
                               b_row + columns[step % loads] + step / loads * together * 16 * row_bytes);
    };
#pragma unroll
    for (int step = 0; step < ahead; ++step) load(step);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
        if (step + ahead < steps) load(step + ahead);
        const uint32_t(&word)[4] = words[step % (ahead + 1)];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const k = together == 2 ? 2 * step + i : step / loads, unit = together == 2 ? 0 : step % loads * 2 + i;
            if (together == 2 || (step % loads == 0 && i == 0)) {
#pragma unroll
                for (int m = 0; m < m_tiles; ++m) ldmatrix_x4(a[m], a_row + by_halves[k] + m * 16 * tile * 2);
            }
            uint32_t const even[2] = {code_pair<codes_02>(word[2 * i]), code_pair<codes_02>(word[2 * i + 1])};
            uint32_t const odd[2] = {code_pair<codes_13>(word[2 * i]), code_pair<codes_13>(word[2 * i + 1])};
#pragma unroll
            for (int m = 0; m < m_tiles; ++m) {
                mma_bf16(sums[m][2 * unit], a[m], even[0], even[1]);
                mma_bf16(sums[m][2 * unit + 1], a[m], odd[0], odd[1]);
            }
        }
    }
}

}  // namespace mla
