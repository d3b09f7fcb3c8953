"""Launches that are refused, and what must be the same for all processes of one."""

import os
import subprocess
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT

from finetune.runtime.launch import refuse_other_engines


@pytest.fixture
def launch(monkeypatch):
    """Set the environment that `accelerate launch` with these options gives its processes."""

    def prepare(*options: str) -> None:
        common = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        arguments = launch_command_parser().parse_args([*common, *options, "train.py"])
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ""  # as `accelerate launch` does
            _, environment = prepare_deepspeed_cmd_env(arguments)
        else:
            environment = prepare_multi_gpu_env(arguments)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return prepare


@pytest.mark.parametrize(
    ("options", "reason", "use"),
    [
        ("--use_deepspeed", "DeepSpeed is not supported", "--fsdp_version 2"),
        ("--use_megatron_lm", "Megatron-LM is not supported", "--fsdp_version 2"),
        ("--use_fsdp --fsdp_version=1", "FSDP1 is not supported", "--fsdp_version 2"),
        (
            "--use_fsdp --fsdp_version=2 --fsdp_offload_params=true",
            "CPU offload is not supported",
            "--fsdp_offload_params false",
        ),
        *(
            (
                f"--use_parallelism_config --parallelism_config_{kind[0]}p_size=2",
                f"{kind} parallelism is not supported",
                f"--parallelism_config_{kind[0]}p_size 1",
            )
            for kind in ("tensor", "context", "sequence")
        ),
    ],
)
def test_a_launch_that_the_loop_cannot_serve_is_refused_in_one_line(launch, options, reason, use):
    launch(*options.split())
    with pytest.raises(ValueError, match=reason) as error:
        refuse_other_engines()
    assert use in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", ["", "--use_fsdp --fsdp_version=2", "--use_parallelism_config"])
def test_other_launches_are_not_refused(launch, options):
    launch(*options.split())
    refuse_other_engines()


def test_a_run_is_refused_before_anything_is_written(run_train, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    run_train(expect=2, output_dir=tmp_path / "runs" / "refused")
    message = capfd.readouterr().err
    assert message.startswith("error: DeepSpeed is not supported")
    assert message.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# Two processes compare what they hold; what each of them ends with is printed.
COMPARE = """
import sys
from accelerate import Accelerator
from finetune.config import Config, TrainConfig
from finetune.runtime.launch import require_same, require_same_launch
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
def ends_with(function, *arguments):
    try:
        function(accelerator, *arguments)
        end = "nothing"
    except (ValueError, SystemExit) as error:
        end = f"{type(error).__name__} {error}"
    print(f"{rank}: {end}\\n", end="", flush=True)
    accelerator.wait_for_everyone()
ends_with(require_same, {"the rows": "123", "the step": "4"})
ends_with(require_same, {"the rows": "123", "the step": str(4 + rank)})
ends_with(require_same_launch, Config(output_dir=sys.argv[1], train=TrainConfig(seed=rank)))
ends_with(require_same_launch, Config(output_dir=f"{sys.argv[1]}/./"))
ends_with(require_same_launch, Config(output_dir=f"{sys.argv[1]}/{rank}"))
"""


def test_two_processes_must_have_the_same_settings_and_see_the_same_folder(tmp_path):
    (tmp_path / "compare.py").write_text(COMPARE)
    run_dir = tmp_path / "runs" / "new"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*torchrun, str(tmp_path / "compare.py"), str(run_dir)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    said = {rank: [line[3:] for line in lines if line.startswith(f"{rank}: ")] for rank in (0, 1)}
    assert said[1] == ["nothing", "SystemExit 2", "SystemExit 2", "nothing", "SystemExit 2"]
    rows, step, seed, same, folder = said[0]
    assert rows == same == "nothing"
    assert step.startswith(
        "ValueError the step must be the same on all processes, and is 4 for process 0 on "
    )
    assert "5 for process 1 on" in step
    assert seed.startswith("ValueError train.seed must be the same")
    assert folder.startswith(f"ValueError output_dir {run_dir / '0'} is not one folder: process 1 on ")
    assert not (tmp_path / "runs").exists()
