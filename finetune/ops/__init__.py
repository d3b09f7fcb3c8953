"""Small computations on tensors, each a fast path beside a reference path.

Tensors go in and out; no module here knows of a run. Each of `attention`, `chunked_head`,
`elementwise`, `lora` and `quantized` can be read by itself. `kernels` compiles and calls
`kernels.cpp`, which computes on a CPU what they would otherwise leave to torch's operations.
`model.fast_paths` decides which of them a run uses.

May import: data (the layout of a packed sequence), runtime, the configuration.
"""
