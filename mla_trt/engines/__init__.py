"""What runs a lowered model's steps: TensorRT engines, how they are built, and ONNX Runtime."""
