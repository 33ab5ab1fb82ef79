"""From text to token ids and back, for servers whose model folder has a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mla_trt.errors import BadModelError, UsageError

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
"""Files that Hugging Face's models have."""


class Tokenizer:
    """A tokenizer of the library `tokenizers`.

    Args:
        path: its tokenizer.json.

    Raises:
        BadModelError: the file is missing or is not what it should be.
        UsageError: the library is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
            from tokenizers import decoders
        except ImportError:
            raise UsageError("the library tokenizers is not installed: pip install 'mla-trt[text]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise BadModelError(f"'{path}' is not a tokenizer: {error}") from None
        self._decoder = decoders.DecodeStream

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with those that the tokenizer puts around a text."""
        return self._tokenizer.encode(text).ids

    def stream(self, prompt: list[int]) -> Callable[[list[int]], str]:
        """What turns the next ids of one sequence into its next piece of text.

        A character that is not complete waits for its end.

        Args:
            prompt: the ids before; whether a word begins with a space depends on them.
        """
        decoder = self._decoder(skip_special_tokens=True)

        def text_of(ids: list[int]) -> str:
            return "".join(decoder.step(self._tokenizer, token) or "" for token in ids)

        text_of(prompt)
        return text_of


def stop_ids_of(folder: Path) -> tuple[int, ...]:
    """The ids that end a sequence, as the model's generation_config.json says; none where there is no such file.

    Raises:
        BadModelError: the file cannot be read.
    """
    path = folder / GENERATION
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text()).get("eos_token_id")
        return tuple(int(token) for token in ([] if found is None else found if isinstance(found, list) else [found]))
    except (ValueError, TypeError, AttributeError) as error:
        raise BadModelError(f"'{path}' cannot be read: {error}") from None
