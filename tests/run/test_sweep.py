"""The values, combinations and folder names of a sweep."""

import pytest

from finetune.run.sweep import choose_combinations, folder_name, parse_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,2e-4", ["1e-4", "2e-4"]),
        (" a , b ", ["a", "b"]),
        ("[q_proj, v_proj],all-linear", ["[q_proj, v_proj]", "all-linear"]),
        ("\"a, b\",'c'", ["a, b", "c"]),
        ("null,no,true", ["null", "no", "true"]),
        ("a.csv,b c.csv", ["a.csv", "b c.csv"]),
    ],
)
def test_values_are_the_items_of_a_yaml_list(text, values):
    assert parse_values([f"--x.y={text}"]) == {"x.y": values}


def test_random_combinations_are_different_ones_of_the_grid_and_the_same_for_a_seed():
    values = {"a": ["1", "2", "3"], "b": ["4", "5"]}
    grid = choose_combinations(values, None, 0)
    assert len(grid) == 6
    drawn = choose_combinations(values, 4, 7)
    assert drawn == choose_combinations(values, 4, 7)
    assert drawn != choose_combinations(values, 4, 8)
    assert len({tuple(combination.values()) for combination in drawn}) == 4
    assert all(combination in grid for combination in drawn)
    everything = choose_combinations(values, 6, 1)
    assert sorted(map(str, everything)) == sorted(map(str, grid))


def test_names_of_folders_are_safe_short_and_different():
    texts = ["a/b", "a b", "a-b", "..", "", "x" * 500, "x" * 501, "ß", "$(rm)", None, ["q_proj", "v_proj"]]
    names = [folder_name({"data.system_prompt": text}) for text in texts]
    assert len(set(names)) == len(names)
    assert all(
        len(name) < 90 and set(name) <= set("abcdefghijklmnopqrstuvwxyz_=.+-0123456789") for name in names
    )
    assert folder_name({"lora.r": 4, "optim.learning_rate": 2e-5}) == "r=4_learning_rate=2e-05"
    both = folder_name({"checkpoint.every_steps": 5, "log.every_steps": 5})
    assert both == "checkpoint.every_steps=5_log.every_steps=5"
