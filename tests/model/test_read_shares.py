"""Shares that are read from files are those of a base that is loaded whole and then sharded."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

# Each process: the shares and the logits of both, and the error where a file lacks a weight.
TWO_PROCESSES = """
import sys
from pathlib import Path
import pytest, torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from finetune.model.read_shares import empty_base, read_shares

distributed.init_process_group("gloo")
mesh, cpu = init_device_mesh("cpu", (2,)), torch.device("cpu")

def sharded(base):
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return fully_shard(base, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))

for folder in map(Path, sys.argv[1:3]):
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    expected = sharded(whole)
    own = sharded(empty_base(AutoConfig.from_pretrained(folder), torch.bfloat16))
    read_shares(own, folder, cpu)
    ours, theirs = dict(own.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].to_local(), theirs[name].to_local()), name
        assert ours[name].to_local().untyped_storage().nbytes() <= (ours[name].nbytes + 4096) // 2, name
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(own(input_ids=ids).logits, expected(input_ids=ids).logits)
own = sharded(empty_base(AutoConfig.from_pretrained(folder), torch.bfloat16))
with pytest.raises(ValueError, match="lacks 1 weights, such as model.norm.weight"):
    read_shares(own, Path(sys.argv[3]), cpu)
distributed.barrier()
distributed.destroy_process_group()
"""


def test_each_process_reads_its_own_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    untied, incomplete = tmp_path / "untied", tmp_path / "incomplete"
    # An odd number of rows: the shares differ. In several files.
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=False)
    model.resize_token_embeddings(801)
    model.save_pretrained(untied, max_shard_size="200KB")
    assert len(list(untied.glob("*.safetensors"))) > 1
    incomplete.mkdir()
    weights = {
        name: value for path in untied.glob("*.safetensors") for name, value in load_file(path).items()
    }
    del weights["model.norm.weight"]
    save_file(weights, incomplete / "model.safetensors")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*torchrun, str(script), str(tiny_model_dir), str(untied), str(incomplete)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
