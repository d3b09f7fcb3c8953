"""A trained adapter as a model that other programs load.

An adapter and its base come in; a model folder or a GGUF file comes out. Read `merge` first (the
adapter in the weights of the base), then `fidelity` (how much of the model a merge
keeps), `gguf` (one file for llama.cpp) and `modelfile` (its
settings for Ollama).

May import: report, run, training, model, ops, data, runtime, the configuration.
"""
