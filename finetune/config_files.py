"""The files that come with the program: in a checkout beside its code, in an installed wheel inside it."""

from pathlib import Path

PACKAGE = Path(__file__).parent

# configs/ and data/ of the checkout, and where a wheel has them (see pyproject.toml).
IN_A_WHEEL = {"configs": PACKAGE / "configs", "data": PACKAGE / "sample_data"}

IS_INSTALLED = IN_A_WHEEL["configs"].is_dir()

TRAIN_PROGRAM = "-m train" if IS_INSTALLED else "train.py"  # behind `python` or a launcher

SAMPLE = "data/finance_sample.csv"  # found from any folder


def shipped(name: str) -> Path:
    """The file that is called `name`, such as configs/quickstart.yaml, in a checkout."""
    folder, _, rest = name.partition("/")
    return IN_A_WHEEL[folder] / rest if IS_INSTALLED else PACKAGE.parent / name
