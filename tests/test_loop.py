"""The loop as a whole, run in this process."""

from conftest import read_metrics


def test_a_run_leaves_what_a_run_leaves(run_train):
    run_dir = run_train()
    assert {path.name for path in run_dir.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
    }
    assert [entry["split"] for entry in read_metrics(run_dir)].count("eval") == 3
