"""What is left of the training is said, and a warning where rounding outweighs it."""

import pytest

from finetune.export.comparison import gain_kept
from finetune.export.fidelity import Difference


@pytest.mark.parametrize(
    ("base", "loss", "written", "words", "warns"),
    [
        (Difference(0.5, 0.7, 3.0), 2.0, Difference(0.01, 0.98, 2.1), "keeps 90% of the loss", False),
        (Difference(0.5, 0.7, 3.0), 2.0, Difference(0.3, 0.8, 2.6), "keeps 40% of the loss", True),
        (Difference(0.5, 0.7, 3.0), 2.0, Difference(0.9, 0.6, 3.5), "keeps -50% of the loss", True),
        # As good on these rows, but further from the trained model than its base is.
        (Difference(0.01, 0.9, 2.02), 2.0, Difference(0.02, 0.8, 2.0), "keeps 100% of the loss", True),
        (Difference(0.5, 0.7, 1.9), 2.0, Difference(0.01, 0.98, 2.0), "no better than its base", False),
    ],
)
def test_what_is_left_of_the_training(base, loss, written, words, warns):
    sentence = gain_kept(base, loss, written)
    assert words in sentence
    assert ("WARNING" in sentence) == warns
    assert f"base {base.loss:.4f}, trained {loss:.4f}, written {written.loss:.4f}" in sentence
