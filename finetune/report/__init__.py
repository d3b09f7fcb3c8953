"""What people look at after a run: reports, comparisons, evaluations, audits and model cards."""
