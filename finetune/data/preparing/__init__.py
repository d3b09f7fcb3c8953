"""Many rows are prepared on all cores, and kept.

Read `chunks` (work in chunks, each in a file of its own), `chunk_files` (these files), `row_tables` (tables
of the rows that were read), `encoding` (what the processes do) and `examples` (what comes of it).

May import: the rest of data but what is read from examples, runtime, the configuration.
"""
