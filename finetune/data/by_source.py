"""Which source or eval set an example is from: where there are several, their losses are given apart."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from finetune.data.preparing.examples import Examples


def several_sources(examples: Examples) -> dict[int, str]:
    """The sources that the examples come from, with their names, in order; none if there is only one."""
    if len(examples.source_names) < 2:
        return {}
    present: list[int] = np.flatnonzero(np.bincount(examples.sources)).tolist()
    sources = {source: examples.source_names[source] for source in present}
    assert len(set(sources.values())) == len(sources), "no two sources of a split have the same name"
    return sources if len(sources) > 1 else {}


def source_of_each(examples: Examples) -> NDArray[np.object_]:
    """[N]: the name of each example's source."""
    names = [*examples.source_names] or [""] * (int(examples.sources.max(initial=0)) + 1)
    return np.array(names, dtype=object)[examples.sources]


def is_main(source_of_each: NDArray[np.object_], eval_sets: Collection[str]) -> NDArray[np.bool_]:
    """[E]: which eval examples the overall figures are of. Those of data.eval_fraction or data.eval_path are,
    and those of eval.sets only where there are no others.

    `source_of_each` [E] are the names of the examples' sources, `eval_sets` those of eval.sets.
    """
    main = ~np.isin(source_of_each.astype(str), list(eval_sets))
    return main if main.any() else ~main
