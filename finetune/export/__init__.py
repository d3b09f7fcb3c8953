"""Turn a trained adapter into a model that other programs can load.

The input is an adapter and its base. The output is a model folder or a GGUF file. Read `merge` first (merge
the adapter into the base), then `fidelity` (compare what was written with the trained model) and `comparison`
(print it), `gguf` (one file for llama.cpp), `quantize` and `llama_cpp` (in fewer bits), `modelfile` (its
settings for Ollama) and `vllm`.

May import: report, run, training, model, ops, data, runtime, the configuration.
"""
