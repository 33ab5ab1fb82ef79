/* The kernels as a plain C library: no TensorRT, no torch. `op_table.h` says what each op takes and gives.
 *
 * A call names an op by its number (`mla::op` in op_table.h) and gives its inputs and outputs in the op's order, row-major and
 * contiguous, in device memory. An absent optional tensor has data NULL and rank -1. Outputs that an op updates in place
 * (kv_cache_out, indexer_cache_out) may be the very memory of their inputs; otherwise the pool is copied first.
 *
 * Every function returns MLA_OK or an error; mla_last_error() then says, for the calling thread, what to do about it. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "op_table.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MLA_EXPORT __attribute__((visibility("default")))

/* Element types: the numbers of onnx.TensorProto. */
enum { MLA_FLOAT = 1, MLA_INT32 = 6, MLA_INT64 = 7, MLA_FLOAT16 = 10, MLA_BFLOAT16 = 16, MLA_FLOAT8E4M3FN = 17 };

enum {
    MLA_OK = 0,
    MLA_BAD_CALL = 1,    /* types, shapes or attributes that contradict the op */
    MLA_UNSUPPORTED = 2, /* a combination that no kernel of this build takes */
    MLA_CUDA = 3,        /* the CUDA runtime refused */
};

enum { MLA_MAX_RANK = 4 };

typedef struct MlaTensor {
    void* data;
    int32_t type;
    int32_t rank;
    int64_t shape[MLA_MAX_RANK];
} MlaTensor;

/* Bytes of scratch memory that mla_enqueue needs for tensors of these shapes; data is not looked at. More is needed for no
 * smaller shape. */
MLA_EXPORT int mla_workspace_bytes(int32_t op, const MlaAttributes* attributes, const MlaTensor* inputs,
                                   const MlaTensor* outputs, size_t* bytes);

/* Puts the op's work on the stream (a cudaStream_t) and returns. `workspace` is aligned to 256 bytes, its content is not
 * looked at. Nothing is allocated, nothing is copied to or from the host: safe in CUDA graphs. */
MLA_EXPORT int mla_enqueue(int32_t op, const MlaAttributes* attributes, const MlaTensor* inputs, const MlaTensor* outputs,
                           void* workspace, size_t workspace_bytes, void* stream);

/* int32 words of a page of the latent cache, and of the index cache, that these attributes describe. */
MLA_EXPORT int mla_kv_page_words(const MlaAttributes* attributes, int64_t* words);
MLA_EXPORT int mla_index_page_words(const MlaAttributes* attributes, int64_t* words);

/* What the last failed call of this thread has to say; "" before any. */
MLA_EXPORT const char* mla_last_error(void);

/* "<package version> sm_80 sm_90a": what this library was built from and for. */
MLA_EXPORT const char* mla_build(void);

#ifdef __cplusplus
}
#endif
