"""mla-trt: lowers multi-head latent attention in ONNX models to fused ops over a paged latent cache."""

__version__ = "0.1.0"
