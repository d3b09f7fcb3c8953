"""Files become rows, rows become examples, and examples become micro-batches.

Read in the order of the data: `files` (tables), `cleaning` and `rows` (clean rows, sampled and
split), `tokenize` (token ids and labels), `splits` (both splits of a run), `plan` (which examples
each update takes), `collate` (their tensors), `segments` (which of a packed sequence's tokens attend
to which). Beside that way, `duplicates` finds repeated and leaked rows, and `slices` groups examples
for evaluation. `audit` measures rows and examples, and `findings` lists their problems.

May import: runtime, the configuration.
"""
