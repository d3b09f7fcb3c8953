"""Files become rows, rows become examples, and examples become micro-batches.

Read in the order of the data: reading/ (files become rows), `conversations` (the forms of a row),
`rows` (the sample, split), templates/ (conversations become token ids and labels), preparing/ (many rows
on all cores), `splits` (both splits of a run), `order` (that of an epoch), `plan` (which examples each
update takes), `collate` (their tensors) and `segments` (which of a packed sequence's tokens attend to
which).

Beside that way, `duplicates` finds repeated and leaked rows (`mixing` hashes numbers for it and for
`order`), and `slices` and `by_source` group examples for evaluation. `audit` measures rows and examples,
and `findings` lists their problems.

May import: runtime, the configuration.
"""
