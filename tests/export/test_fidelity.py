"""Differences of predictions are those of their distributions, and the smallest faithful merge is chosen."""

import pytest
import torch

from finetune.export.fidelity import Candidate, Difference, Predictions, choose, difference


def test_the_difference_of_predictions_is_that_of_their_distributions():
    torch.manual_seed(0)
    hidden, weights, ids = torch.randn(600, 8), torch.randn(2, 30, 8), torch.randint(30, (600,))
    p, q = ((hidden @ weight.t()).log_softmax(-1) for weight in weights)
    found = difference(Predictions(hidden, weights[0]), Predictions(hidden, weights[1]), ids)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(expected.item(), rel=1e-5)
    assert found.loss == pytest.approx(torch.nn.functional.nll_loss(q, ids).item(), rel=1e-5)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    same = difference(Predictions(hidden, weights[0]), Predictions(hidden, weights[0]), ids)
    assert (same.kl, same.agreement) == (0, 1)


def candidate(dtype: str, size: int, kl: float, agreement: float, loss: float = 2.0) -> Candidate:
    return Candidate("dequantized", dtype, size, Difference(kl, agreement, loss), 0.97)


def test_the_smallest_faithful_one_is_written_and_else_the_nearest():
    exact, half = candidate("fp32", 4, 1e-9, 1.0), candidate("bf16", 2, 1e-4, 0.995)
    assert choose([exact, half], 2.0) is half
    rough = candidate("bf16", 2, 1e-3, 0.98)
    assert choose([exact, rough], 2.0) is exact
    worse = candidate("bf16", 2, 1e-4, 0.995, loss=2.02)
    assert choose([exact, worse], 2.0) is exact
    assert choose([rough, candidate("bf16", 2, 1e-2, 0.97)], 2.0) is rough
