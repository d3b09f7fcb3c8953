"""The parts of an update besides the model: sums, the optimizer, evaluation.

Sums over target tokens come in; metrics, learning rates and optimizer steps come out. Read
`metrics` first (sums kept on the device, and their means), then `optim` (the optimizer and its
schedule), `optim_state` (its state by parameter, for a checkpoint) and `loss_scale` (fp16), then
`evaluate` (exact sums of each eval example), `answer_scores` (what an answer is worth) and `best`
(which evaluation is the best). `setup` loads for a command what train.py loads step
by step. `memory_model` predicts and measures the memory of a run, `scale` predicts that
of each of many cards and what they send, and `comparison` compares the fast paths with the
reference paths.

May import: model, ops, data, runtime, the configuration.
"""
