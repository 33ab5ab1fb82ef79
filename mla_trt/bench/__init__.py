"""What `mla-trt bench` measures."""
