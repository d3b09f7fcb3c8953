"""What people read after a run: its report, its model card, and figures with intervals.

A run's folder comes in; HTML pages and Markdown come out. Read `records` first (what the folder of
a run says), then `page` (the report) and `model_card`. `intervals` computes confidence intervals,
`charts` draws curves, and `html` writes a page that needs no other file.

May import: run, training, model, ops, data, runtime, the configuration.
"""
