"""Small computations on tensors, each a fast path beside a reference path.

Tensors go in and out; no module here depends on a run. Each of `attention` (with `sequences`),
`chunked_head`, `elementwise`, `lora` and `quantized` can be read by itself. `decoder_layer` puts whole
layers together, from `projection` (layers of one input), `base_weights` and `adapter_weights`.
`plain_weights` has the quantized layers of a base that is sharded.
`token_rows` trains rows of the embedding and the head for added tokens, `trained_modules` whole layers.
`operators` is the table of the smallest computations, with their makers: `torch_makers` on any device,
`kernels`, which calls `kernels.cpp` (compiled by `compiler`), on a CPU, and `triton_makers` (with
`triton_kernels` and `triton_dropout`) on a CUDA device. `dropout` defines LoRA's noise for all of them.
`model.fast_paths` decides which of them a run uses.

May import: data (the layout of a packed sequence), runtime, the configuration.
"""
