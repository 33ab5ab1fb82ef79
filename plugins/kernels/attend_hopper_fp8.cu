// Attention over rows of the formats fp8 and fp8_flat on SM90, of whole sequences or of lists of tokens, with both products in e4m3
// (R 512, Dr 64, pages of 64 x 2^n).
//
// A block has up to 64 rows (heads, or tokens x heads of one sequence) and walks over tiles of 128 keys. One warpgroup makes
// the scores and the softmax; one the tables of scales that this needs, and the sums of the weights; two make the output, each 256
// of its 512 columns. Scores are Q K^T. The output is made transposed, V^T P^T: keys lie in shared memory as rows, and so V, whose
// tile is K-major only the other way round, comes through registers (`ldmatrix` with transposition gives pairs of codes of one key,
// `prmt` makes fragments of four keys); P is written in the order of keys that those fragments have (`value_fragments`).
//
// - The query is e4m3 with a scale for each row, in one term or two: the second holds what the first leaves. Where rows are at
//   most 32, both terms are rows of one product of 64, which costs nothing; else the second is a second product.
// - The scale s of a key's row multiplies its score and its value. With y = score + log2 s, P = 2^(y - m + 7) is the weight of
//   the codes, and the sum adds P / s of the rounded P: the weights that are used sum to one. m is a reference near the row's maximum.
// - Rows of fp8_flat have one scale for all, which is 1 in all this: it multiplies the query's factor and the output (parts are merged
//   first). Their rope is codes, and so is the query's.
// - The e4m3 products' sums keep 14 bits (docs/kernels.md): each tile of the output is summed from zero and then added in f32.
// - Keys come in five pieces of 128 bytes of a tile's rows into a ring; who has a piece's last values in registers orders the one
//   that takes its place. Pages outside of the pool and behind the end are outside of the tensor map: zeros. A tile's weights lie
//   where its rope was.
// - Where one sequence is cut into parts, two blocks of an item are a cluster: what both have of a row becomes one part (`merge_cluster`),
//   so that half of the bytes are left for the merge.
#include "attend_hopper_fp8_output.cuh"
#include "attend_hopper_fp8_sums.cuh"
#include "cluster.cuh"

namespace mla {
namespace {

using namespace hopper;

// Makes one part of what the blocks of a cluster have, rows of two bytes a value in shared memory, weighed by 2^(lse - largest). Half a row
// by a warp, rows in turn by the blocks.
template <typename F>
__device__ void merge_cluster(const Partials& partials, const Item& item, const uint8_t* memory) {
    constexpr int warps = threads / warp_size;
    int const lane = threadIdx.x % warp_size, own = cluster_rank();
#pragma unroll 1
    for (int unit = static_cast<int>(threadIdx.x) / warp_size; unit < 2 * F::rows / F::cluster; unit += warps) {
        int const row = unit / 2 * F::cluster + own, column = unit % 2 * (rank / 2) + 8 * lane;
        if (row >= item.count) break;
        const auto* own_lse = reinterpret_cast<const uint32_t*>(memory + Places<F>::part_lse) + row;
        const auto* own_values = reinterpret_cast<const uint4*>(memory + (row * narrow_row + column) * 2);
        float weights[F::cluster];
        uint4 values[F::cluster];
#pragma unroll
        for (int i = 0; i < F::cluster; ++i) {
            weights[i] = __uint_as_float(load_from_block(own_lse, i));
            values[i] = load_from_block(own_values, i);
        }
        float largest = weights[0], sum = 0.0f;
#pragma unroll
        for (int i = 1; i < F::cluster; ++i) largest = fmaxf(largest, weights[i]);
        float const base = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
        for (int i = 0; i < F::cluster; ++i) {
            weights[i] = exp2f(weights[i] - base);
            sum += weights[i];
        }
        float const inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        float total[8] = {};
#pragma unroll
        for (int i = 0; i < F::cluster; ++i) {
            uint32_t const words[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
            float const weight = weights[i] * inverse;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float2 const pair = NarrowPair<F>::read(words[j]);
                total[2 * j] = fmaf(weight, pair.x, total[2 * j]);
                total[2 * j + 1] = fmaf(weight, pair.y, total[2 * j + 1]);
            }
        }
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) packed[j] = NarrowPair<F>::make(total[2 * j], total[2 * j + 1]);
        int64_t const at = partials.row(item.slot, row);
        *reinterpret_cast<uint4*>(reinterpret_cast<uint16_t*>(partials.output + at * rank) + column) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
        if (column == 0) partials.lse[at] = largest == -INFINITY ? -INFINITY : largest + log2f(sum);
    }
}

template <typename F>
__global__ void __launch_bounds__(threads, 1)
    attend_hopper_fp8_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap rope_map,
                             const __grid_constant__ CUtensorMap query_map, Attend work, Partials partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using P = Places<F>;
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ Item shared_item;
    int const warp = threadIdx.x / warp_size;
    constexpr int first_warp = group / warp_size;  // that finds the item and orders what comes first
    uint32_t const queries_full = shared_address(memory + P::queries_full);
    if (threadIdx.x == 32) {
#pragma unroll 1
        for (int i = 0; i < P::barriers; ++i) {
            barrier_init(shared_address(memory + P::scales_full) + 8 * i, F::lists ? group : 1);
        }
        for (int i = 0; i < F::query_boxes; ++i) barrier_init(queries_full + 8 * i, F::orderers);
        for (int i = 0; F::halved && i < 2; ++i) barrier_init(shared_address(memory + P::scored) + 8 * i, 1);
        fence_barrier_init();
        prefetch_map(&query_map);
        if (!F::lists) prefetch_map(&map);
        if (F::apart) prefetch_map(&rope_map);
    }
    if (warp == first_warp) {
        take_item(work, partials, &shared_item);
        __syncwarp();
        // before the queries are ordered, or the answers come behind them
        if (!F::lists && shared_item.sequence >= 0) {
            Ring<F>{memory, &map, &rope_map, &shared_item, shared_item.last_tile - shared_item.first_tile}.fetch_pages(work);
        }
    }
    __syncthreads();
    const Item& item = shared_item;  // read again where it is needed: registers are scarce
    if (item.sequence < 0) {  // then there is none for the others of a cluster either
        zero_padding(work, partials, item);
        return;
    }
    if (warp >= first_warp && warp < first_warp + F::orderers && elect_lane()) {
        order_queries<F::rows, F::query_box, F::orderers>(
            work, &query_map, item, warp - first_warp, queries_full, [&](int column) { return shared_address(memory + P::raw_query(column)); });
    }
    // from a lane, so that the compiler knows the number of tiles to be uniform
    Ring<F> const ring{memory, &map, &rope_map, &item, __shfl_sync(0xffffffffu, item.last_tile - item.first_tile, 0)};
    if (threadIdx.x < group) {
        registers_decrease<score_registers>();
        make_query<F>(work, item, memory, warp);
        named_sync(queries_there, threads);
        score_group<F>(work, ring, memory);
        __syncthreads();
    } else if (threadIdx.x < 2 * group) {
        registers_decrease<sum_registers>();
        if (!F::lists && warp == first_warp) ring.begin(work);
        named_sync(queries_there, threads);
        sum_group<F>(work, partials, item, ring, memory);
        __syncthreads();
    } else {
        registers_increase<output_registers>();
        output_group<F>(work, partials, item, ring, memory);
    }
    if constexpr (F::cluster > 1) {
        cluster_barrier();
        merge_cluster<F>(partials, item, memory);
        cluster_arrive();  // nothing more is read of others
        cluster_wait();  // a block's shared memory ends with it
        return;
    }
    __syncthreads();
    if (item.slot >= 0 && partials.type != MLA_FLOAT) {
        if (!elect_lane()) return;
#pragma unroll 1
        for (int row = warp; row < item.count; row += threads / warp_size) {
            store_bytes(partials.output + partials.row(item.slot, row) * rank, shared_address(memory) + row * narrow_row * 2, rank * 2);
        }
        store_commit();
        store_wait_read<0>();  // what else there is to wait for, who waits for the kernel does
    } else {
        write_rows(work, partials, item, memory);
    }
#endif
}

template <typename F>
int launch(const Attend& work, const Partials& partials, cudaStream_t stream) {
    CUtensorMap map, rope_map, query_map;
    if (int status = make_query_map(&query_map, work, F::query_box)) return status;
    // the pool as [page][row][byte]
    auto make_row_map = [&](CUtensorMap* made, int bytes) {
        const KvLayout& layout = work.layout;
        return make_tensor_map(made, work.pool, {layout.row_bytes, layout.page_size, work.step.pages, 1},
                               {layout.row_bytes, layout.page_bytes, layout.page_bytes * work.step.pages}, {bytes, half, 1, 1});
    };
    if (int status = make_row_map(&map, 128)) return status;
    if (int status = make_row_map(&rope_map, F::apart ? rope : 128)) return status;
    return launch_blocks(attend_hopper_fp8_kernel<F>, work, partials, threads, Places<F>::total, stream, map, rope_map, query_map, work,
                         partials);
}

template <Keys keys, bool flat>
int launch_rows(const Attend& work, const Partials& partials, cudaStream_t stream) {
    auto of_rows = [&](auto count) {
        constexpr int rows = decltype(count)::value;
        return work.query_terms == 1 ? launch<Form<rows, 1, keys, flat>>(work, partials, stream)
                                     : launch<Form<rows, 2, keys, flat>>(work, partials, stream);
    };
    if constexpr (keys != Keys::of_clusters) {
        if (partials.item_rows == 16) return launch<Form<16, 2, keys, flat>>(work, partials, stream);
        if (partials.item_rows == 32) return launch<Form<32, 2, keys, flat>>(work, partials, stream);
        if (partials.item_rows == 48) return of_rows(std::integral_constant<int, 48>());
    }
    return of_rows(std::integral_constant<int, 64>());
}

template <bool flat>
int launch_keys(const Attend& work, const Partials& partials, cudaStream_t stream) {
    if (work.indices != nullptr) return launch_rows<Keys::listed, flat>(work, partials, stream);
    return partials.cluster > 1 ? launch_rows<Keys::of_clusters, flat>(work, partials, stream)
                                : launch_rows<Keys::all, flat>(work, partials, stream);
}

}  // namespace

bool attend_takes_hopper_fp8(const Attend& work, const Device& device) {
    if (device.major != 9 || work.query_terms == 0 || !tensors_fit(work) || work.step.pages <= 0) {
        return false;
    }
    const KvLayout& layout = work.layout;
    if (work.indices != nullptr && work.step.pages * layout.page_bytes / 16 >= no_row) return false;
    if ((layout.format != row_format::fp8 && layout.format != row_format::fp8_flat) || layout.rank != rank || layout.rope != rope || layout.page_size < half ||
        (layout.page_size & (layout.page_size - 1)) != 0 ||
        reinterpret_cast<uintptr_t>(work.pool) % 16 != 0) {
        return false;
    }
    return has_hopper_code();
}

int hopper_fp8_rows(const Attend& work) {
    int64_t const sequences = work.step.sequences > 0 ? work.step.sequences : 1;
    int64_t const rows = (work.indices != nullptr ? 1 : ceil_div(work.step.tokens, sequences)) * work.heads;
    if (rows <= 16) return 16;
    if (rows <= 32) return 32;
    return ceil_div<int64_t>(rows, 48) == ceil_div<int64_t>(rows, 64) ? 48 : 64;
}

int attend_hopper_fp8(const Attend& work, const Partials& partials, cudaStream_t stream) {
    return work.layout.format == row_format::fp8_flat ? launch_keys<true>(work, partials, stream) : launch_keys<false>(work, partials, stream);
}

}  // namespace mla
