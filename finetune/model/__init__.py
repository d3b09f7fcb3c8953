"""The base model with its adapter: loaded, with a loss inside, and asked for answers.

A configuration comes in; a PEFT model and sums over target tokens come out. Read `load` first
(tokenizer, quantized base, LoRA adapter), then `loss` (the sums an update is made of), then
`fast_paths` (which fast paths run, each tried against its reference path). `starter` fetches the
default model. `generate` writes answers. `precision` has the
model compute in fp32 for a while.

May import: ops, data, runtime, the configuration.
"""
