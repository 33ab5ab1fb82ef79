"""CUDA kernels, the TensorRT plugin classes over them, and their builder."""
