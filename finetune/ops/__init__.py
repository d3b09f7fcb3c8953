"""Small computations on tensors, each a fast path beside a reference path.

Tensors go in and out; no module here depends on a run. Each of `attention`, `chunked_head`,
`elementwise`, `lora` and `quantized` can be read by itself. `kernels` compiles and calls
`kernels.cpp`, which replaces torch's operations on a CPU.
`model.fast_paths` decides which of them a run uses.

May import: data (the layout of a packed sequence), runtime, the configuration.
"""
