// MlaOutputProjection: what attention gives times one weight, whose kernels linear.h has.
#include "device.cuh"
#include "linear.h"

namespace mla {

int run_output_projection(Call& call) {
    namespace in = output_projection::in;
    Dims const& dims = call.dims;
    const MlaTensor &attended = call.in[in::attended], &weight = call.in[in::w_o], &hidden = call.out[output_projection::out::hidden];
    if (int status = check_codes(weight, call.given(in::w_o_scale), ops[op::output_projection], in::w_o)) return status;
    Linear work{attended.data, attended.type, dims.T, dims.H * dims.Dv, {}, 0, nullptr, 0.0f, false};
    work.add({weight.data, weight.type, call.input<float>(in::w_o_scale), nullptr, 0, hidden.data, hidden.type, dims.C, nullptr});
    bool const many = dims.T > most_coded_tokens;
    auto* const decoded = many ? call.workspace.take<__nv_bfloat16>(coded_values(work)) : nullptr;
    if (call.workspace.sizing() || dims.T == 0 || dims.C == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    if (!linear_takes_hopper(work, device)) return linear_plain(work, call.stream);
    if (many) {
        if (int status = decode_weights(work, decoded, &work, call.stream)) return status;
        return linear_hopper(work, device, call.stream);
    }
    if (int status = linear_hopper_split(work.of_codes(false), device, call.stream)) return status;
    return linear_hopper_codes(work.of_codes(true), device, call.stream);
}

}  // namespace mla
