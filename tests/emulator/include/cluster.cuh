// Blocks of a cluster, as plugins/kernels/cluster.cuh has them.
#pragma once

#include "emulator.h"

namespace mla {

inline int cluster_rank() { return emulator::place->cluster_rank; }
inline int cluster_size() { return emulator::place->cluster_size; }
inline void cluster_barrier() { emulator::cluster_sync(); }
inline void cluster_arrive() {}
inline void cluster_wait() { emulator::cluster_sync(); }

template <typename T>
T load_from_block(const T* shared, int rank) {
    auto const address = static_cast<uint32_t>(reinterpret_cast<size_t>(shared)) - emulator::shared_base() + emulator::shared_base_of(rank);
    return *reinterpret_cast<const T*>(static_cast<size_t>(address));
}

}  // namespace mla
