"""Turn a trained adapter into a model that other programs can load.

The input is an adapter and its base. The output is a model folder or a GGUF file. Read `merge` first (merge
the adapter into the base), then `fidelity` (compare the merged model with the trained one), `gguf` (one file
for llama.cpp) and `modelfile` (its settings for Ollama).

May import: report, run, training, model, ops, data, runtime, the configuration.
"""
