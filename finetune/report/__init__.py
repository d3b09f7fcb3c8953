"""What people look at after a run: a report, a comparison, an evaluation, a model card, an audit of rows.

Read `records` first: it reads a run's folder. `statements` writes the sentences of a report, `published` has
the seed notebooks' figures, `intervals` and `charts` compute what it shows, and `page` writes it.
`comparison`, `evaluation`, `audit` (its rows in `audited_rows`) and `model_card` are the other documents;
`html` renders the templates in templates/.

May import from config, runtime, data, ops, model, training and run.
"""
