// What a CUtensorMap says, as cuTensorMapEncodeTiled of `runtime.cpp` writes it into one.
#pragma once

#include <cstdint>

namespace emulator {

struct Box {
    const uint8_t* data;
    int64_t sizes[4], strides[4];  // bytes along the first axis; strides[0] is 1
    int32_t box[4];

    uint32_t bytes() const { return static_cast<uint32_t>(box[0] * box[1] * box[2] * box[3]); }
    // Rows of 128 or 64 bytes, whose 16-byte units are permuted by the row: to shared memory with zeros for what is outside of the tensor,
    // and from there what is inside.
    void copy(uint32_t target, int c0, int c1, int c2, int c3) const;
    void store(uint32_t source, int c0, int c1, int c2, int c3) const;

private:
    template <typename Each>
    void walk(uint32_t shared, int c0, int c1, int c2, int c3, Each each) const;
};

}  // namespace emulator
