"""The base model with its adapter: loading, the loss, fast paths and generation.

A configuration comes in; a PEFT model and sums over target tokens come out. Read `load` first (tokenizer,
quantized base, LoRA adapter), then `flat_adapter` (the adapter's weights and gradients as two flat tensors),
then `loss` (the sums that an update needs), then `fast_paths` (which fast paths run, each compared with its
reference path; `int8_matmul` chooses one by time), then `sharding` (a share of the base on each process;
`layers_on_disk` reads it a layer at a time). `target_modules` says which modules get LoRA and which are
trained whole, `first_weights` starts an adapter from the base's own weights (`safetensors_files` reads them
one by one), `given_adapter` finds and checks the adapter that a run begins from, and `added_tokens` makes
rows for tokens that the base lacks. `starter` fetches the default model. `generate` generates answers, and
`prefix_cache` keeps what was computed of a conversation. `precision` makes the model compute in fp32
temporarily. `size` counts parameters and operations, and `quiet` silences messages of libraries.

May import: ops, data, runtime, the configuration.
"""
