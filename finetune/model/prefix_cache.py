"""Keys and values kept between the turns of a conversation, so that a turn computes only its new tokens."""

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer


class PrefixCache:
    """The keys and values of one conversation, for the prompt that continues it.

    A model with layers that do not keep every position (sliding windows, recurrent states) gets a new cache
    for each prompt: what such layers have forgotten cannot be taken back.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config.get_text_config()
        self._tokens: list[int] = []  # whose keys and values the cache holds
        self._cache: Any = None

    def start(self, prompt: Sequence[int]) -> Any:
        """A cache for `generate` with the keys and values of the prompt's known start; None for a new one.

        Until `keep` is called, nothing counts as known: a generation that was stopped leaves layers of
        different lengths.
        """
        known, self._tokens = self._tokens, []
        # Generation needs the scores behind the last token, so at least that one is computed again.
        length = 0
        for before, now in zip(known, prompt[:-1], strict=False):
            if before != now:
                break
            length += 1
        if length > 0:
            self._cache.crop(length - len(known))
        else:
            cache = DynamicCache(config=self._config)
            keeps_all = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
            self._cache = cache if keeps_all else None
        return self._cache

    def keep(self, tokens: Sequence[int]) -> None:
        """Note the prompt and its answer as known, but for the last token, which was never an input."""
        if self._cache is not None:
            self._tokens = list(tokens[: self._cache.get_seq_length()])
