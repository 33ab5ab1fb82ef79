// MlaInputProjections: two steps, whose kernels linear.h has. First what the hidden states are multiplied by: the query's latent, the
// latent, the rope key and what an indexer gets of them; then what the query's latent is. Its norm's weights are factors of the first, its
// rows' roots of the second, so that no step is between.
#include "linear.h"

#include <algorithm>

#include "device.cuh"

namespace mla {
namespace {

constexpr int norm_threads = 256;

// Divides the rows of `latent` [tokens, width] by the root of their mean square and multiplies them by the weight.
__global__ void __launch_bounds__(norm_threads)
    normalise(float* latent, const void* weight, int32_t weight_type, int64_t width, float epsilon) {
    __shared__ float scratch[warp_size];
    float* const row = latent + static_cast<int64_t>(blockIdx.x) * width;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += norm_threads) sum += row[i] * row[i];
    float const root = sqrtf(block_sum(sum, scratch) / static_cast<float>(width) + epsilon);
    for (int64_t i = threadIdx.x; i < width; i += norm_threads) row[i] = row[i] / root * load_float(weight, weight_type, i);
}

}  // namespace

int run_input_projections(Call& call) {
    namespace in = input_projections::in;
    namespace out = input_projections::out;
    Dims const& dims = call.dims;
    bool const latent_query = call.given(in::w_dq), normed = call.given(in::query_norm_weight);
    if (!latent_query && dims.Q != dims.C) {
        return fail(MLA_BAD_CALL, "MlaInputProjections: w_uq has %lld rows, but hidden has %lld columns and there is no w_dq",
                    static_cast<long long>(dims.Q), static_cast<long long>(dims.C));
    }
    auto* const latent = latent_query ? call.workspace.take<float>(dims.T * dims.Q) : nullptr;  // or bf16
    auto* const squares = normed ? call.workspace.take<float>(dims.T * square_tiles(dims.Q)) : nullptr;
    const MlaTensor& hidden = call.in[in::hidden];
    Linear first{hidden.data, hidden.type, dims.T, dims.C, {}, 0, nullptr, 0.0f, false}, second = first;
    int status = MLA_OK;  // the first that is another one
    // The product with an input whose scales, and factors of what it makes, other inputs may be.
    auto add = [&](Linear* work, int weight, int scales, int factors, const MlaTensor& result) {
        const MlaTensor& given = call.in[weight];
        if (given.rank < 0 || status != MLA_OK) return;
        status = check_codes(given, scales >= 0 && call.given(scales), ops[op::input_projections], weight);
        int64_t const outputs = given.shape[1] * (given.rank == 3 ? given.shape[2] : 1);
        if (outputs == 0) return;
        bool const scaled = factors >= 0 && call.given(factors);
        const float* const of_blocks = scales >= 0 ? call.input<float>(scales) : nullptr;
        work->add({given.data, given.type, of_blocks, scaled ? call.in[factors].data : nullptr, scaled ? call.in[factors].type : 0, result.data,
                   result.type, outputs, nullptr});
    };
    constexpr int none = -1;
    if (latent_query) {
        add(&first, in::w_dq, in::w_dq_scale, in::query_norm_weight, {latent, MLA_BFLOAT16, 2, {dims.T, dims.Q}});
        first.parts[0].squares = squares;
        second.x = latent;
        second.x_type = MLA_BFLOAT16;
        second.columns = dims.Q;
        second.squares = squares;
        second.epsilon = call.attributes.epsilon;
    }
    add(&first, in::w_dkv, in::w_dkv_scale, none, call.out[out::latent]);
    add(&first, in::w_kr, in::w_kr_scale, none, call.out[out::rope_key]);
    add(&first, in::w_index_key, in::w_index_key_scale, none, call.out[out::index_key]);
    add(&first, in::w_index_weights, none, in::index_weights_factor, call.out[out::index_weights]);
    add(&second, in::w_uq, in::w_uq_scale, none, call.out[out::query]);
    add(&second, in::w_index_query, in::w_index_query_scale, none, call.out[out::index_query]);
    if (status != MLA_OK) return status;

    bool const many = dims.T > most_coded_tokens;
    auto* const first_weights = many ? call.workspace.take<__nv_bfloat16>(coded_values(first)) : nullptr;
    auto* const second_weights = many ? call.workspace.take<__nv_bfloat16>(coded_values(second)) : nullptr;
    if (call.workspace.sizing() || dims.T == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    if (linear_takes_hopper(first, device) && linear_takes_hopper(second, device)) {
        if (many) {
            if (int status = decode_weights(first, first_weights, &first, call.stream)) return status;
            if (int status = decode_weights(second, second_weights, &second, call.stream)) return status;
        }
        Linear codes = first.of_codes(true), others = first.of_codes(false);
        if (codes.count > 0 && others.count > 0) codes.order = KernelOrder::leading, others.order = KernelOrder::beside;
        if (int status = linear_hopper_codes(codes, device, call.stream)) return status;
        if (int status = linear_hopper_split(others, device, call.stream)) return status;
        if (int status = linear_hopper(second.of_codes(false), device, call.stream)) return status;
        return linear_hopper_codes(second.of_codes(true), device, call.stream);
    }
    if (latent_query && dims.Q > 0) {  // in f32, its norm by a kernel of its own
        first.parts[0].factors = nullptr;
        first.parts[0].out_type = second.x_type = MLA_FLOAT;
    }
    if (int status = linear_plain(first, call.stream)) return status;
    if (normed && dims.Q > 0) {
        const MlaTensor& weight = call.in[in::query_norm_weight];
        normalise<<<static_cast<unsigned>(dims.T), norm_threads, 0, call.stream>>>(latent, weight.data, weight.type, dims.Q,
                                                                                   call.attributes.epsilon);
        if (int status = check_launch("norm of the query's latent")) return status;
    }
    return linear_plain(second, call.stream);
}

}  // namespace mla
