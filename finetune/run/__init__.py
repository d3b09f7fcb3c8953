"""A run on disk and on screen: its folder, checkpoints, metrics and evaluations.

The state of the loop comes in; files and terminal lines come out. Read `folder` first (new,
unfinished or finished, and what lies in it), then `checkpoint` (written whole or not at all),
`token_budget` (how many tokens a micro-batch may have), `opening` and `summary` (what a run shows
at its start and end), `tracker` (metrics.jsonl, TensorBoard, the progress bar), `extra_trackers`
(MLflow and others beside it) and `evaluator` (when evaluations are due; `eval_answers` has eval rows
answered, and `answer_files` keeps what was answered). `bad_update` records an update
that is not finite, and `out_of_memory` says what to lower when memory runs out. `origin` records the
adapter that a run began from. `adapter` opens what a run has trained, and `answers` has it answer rows.
`sweep` makes several runs.

May import: training, model, ops, data, runtime, the configuration.
"""
