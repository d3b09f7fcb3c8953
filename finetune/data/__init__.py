"""Files become rows, rows become examples, and examples become micro-batches.

Read in the order of the data. Reading: `sources` (which files), `files` (batches of rows; `json_array`
reads large arrays), `formats` (which columns make up a row; `mapping_hints` helps where none do),
`messages` (what a message may hold), `reading` (batches with their formats), `cleaning` (which rows are
dropped), `row_tables` (tables of rows) and `rows` (the sample, split). Templates: `conversations` (what
a template renders), `chat_template` and `named_templates`, `targets` (what the model has to write;
`written` checks what a template made of it) and `tokenize` (token ids and labels). Examples: `prepare`
(work in chunks on all cores), `encoding` (the work), `examples` (what comes of it), `splits` (both
splits of a run), `order` (that of an epoch), `plan` (which examples each update takes), `collate`
(their tensors) and `segments` (which of a packed sequence's tokens attend to which).

Beside that way, `duplicates` finds repeated and leaked rows (`mixing` hashes numbers for it and for
`order`), and `slices` and `by_source` group
examples for evaluation. `audit` measures rows and examples, `anatomy` their tokens, and `findings`
lists their problems. Of what a model writes, `tool_calls` reads the calls back by the template's marks, and
`answer_parts` tells its calls from what it says.

May import: runtime, the configuration.
"""
