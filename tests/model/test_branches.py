"""Examples with branches: packed, padded, and each sequence computed by itself give the same numbers."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from branching import Comb, lists_of_combs, sums_by_hand
from conftest import require_compiler
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from tiny import LAYOUTS, VOCABULARY, adapter_gradients, built, with_adapter
from torch import Tensor

from finetune.data.collate import collate
from finetune.data.plan import Plan, plan_evaluation
from finetune.data.preparing.examples import Examples
from finetune.data.templates.tokenize import IGNORE
from finetune.model.fast_paths import use_reference_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.loss import TokenLoss
from finetune.ops import decoder_layer, elementwise, kernels, lora
from finetune.ops.attention import PACKED
from finetune.training.evaluate import evaluate

any_examples = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# With a mask over the packed sequence; with each of a CPU's ways to attend; with whole layers fused.
PATHS = ["padded", "mask", "by example", "compiled", "fused", "fused, compiled"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Any:
    """The name of a path, whose kernels are enabled."""
    if "compiled" in request.param:
        require_compiler()
        kernels.enable()
    yield request.param
    kernels.disable()


def token_loss_on(path: str, model: Any) -> TokenLoss:
    use_reference_paths(token_loss := TokenLoss(model))
    if path not in ("padded", "mask"):
        token_loss.base.set_attn_implementation(PACKED)
        token_loss.masks_packed_sequences = False
        token_loss.head_mib = 1
    if path.startswith("fused"):
        lora.enable(model)
        elementwise.enable(model)
        assert decoder_layer.enable(model) == (2, 2)
    return token_loss


def outcome(token_loss: TokenLoss, batch: Any) -> list[Tensor]:
    """nll, entropy and correct; then the gradient of each tensor of the adapter."""
    for gradient in adapter_gradients(token_loss.model).values():
        if gradient is not None:
            gradient.zero_()
    sums = token_loss(batch)
    sums.nll.backward()
    return [
        sums.nll.detach(),
        sums.entropy,
        sums.correct,
        *(gradient.clone() for gradient in adapter_gradients(token_loss.model).values()),
    ]


def model_of(path: str) -> Any:
    model = with_adapter(built("qwen2"))
    if path.startswith("fused"):
        FlatAdapter(model)
    return model


def assert_near(got: list[Tensor], expected: list[Tensor]) -> None:
    """The sums to 1e-6, or to the rounding of a few logits, and each gradient to 5e-5."""
    assert len(got) == len(expected)
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-6, abs=1e-5)
    largest = max(float(gradient.norm()) for gradient in expected[3:])
    for one, other in zip(got[3:], expected[3:], strict=True):
        assert float((one - other).norm()) < 5e-5 * max(float(other.norm()), 0.1 * largest)


@any_examples
@given(examples=lists_of_combs())
def test_sums_and_gradients_are_those_of_each_sequence_by_itself(path, examples):
    assume(any(label != IGNORE for example in examples for label in example["labels"]))
    plain = model_of("by hand")
    expected_sums = sums_by_hand(plain, examples).sum(0)
    expected_sums[0].backward()
    gradients = adapter_gradients(plain).values()
    expected = [*(x.detach().float() for x in expected_sums[:3]), *gradients]
    token_loss = token_loss_on(path, model_of(path))
    got = outcome(token_loss, collate(examples, packing=path != "padded"))
    assert_near(got, expected)


@any_examples
@given(examples=lists_of_combs(most=6))
def test_an_evaluation_gives_the_sums_of_each_example_in_every_layout(examples):
    model = model_of("by hand")
    with torch.no_grad():
        expected = sums_by_hand(model, examples)
    rows = [{**example, "row_number": number} for number, example in enumerate(examples, 1)]
    data = Examples(Dataset.from_list(rows), truncated=[], dropped={})
    for layout in LAYOUTS[1:]:
        layout = type(layout)(layout.packing, layout.micro_batch_size, 3 * layout.max_tokens)
        plan = Plan(data.lengths, data.target_counts, layout, 1, num_epochs=1, seed=0)
        batches = plan_evaluation(plan, data)
        got = evaluate(Accelerator(cpu=True), TokenLoss(model), batches, data.dataset, layout.packing)
        assert torch.equal(got[:, 3], expected[:, 3])
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def several_at_one_place() -> list[Comb]:
    """Three branches and the trunk itself each train another token behind the same one."""
    ids = [*range(10), *range(10, 19)]
    branches = [[10, 6], [13, 6], [16, 6]]
    return [{"input_ids": ids, "labels": [IGNORE, *ids[1:]], "branches": branches}]


def test_a_token_may_predict_several(path):
    batch = collate(several_at_one_place(), packing=path != "padded")
    plain = model_of("by hand")
    sums = sums_by_hand(plain, several_at_one_place())[0]
    sums[0].backward()
    expected = [*(x.detach().float() for x in sums[:3]), *adapter_gradients(plain).values()]
    got = outcome(token_loss_on(path, model_of(path)), batch)
    assert_near(got, expected)
    assert path == "padded" or batch.target_positions.tolist().count(5) == 4
    assert sums[3] == len(batch.target_ids) == 18 == VOCABULARY - 2
