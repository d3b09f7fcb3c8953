"""Files and data sets become rows in one form.

Read `sources` (which files), `files` (batches of raw rows; `json_array` reads large arrays), `formats`
(which columns make up a row; `mapping_hints` helps where none do), `messages` (what a message may
hold), `batches` (raw rows with their formats) and `cleaning` (which rows are dropped).

May import: data.conversations, runtime, the configuration.
"""
