"""Greedy generation with a session, for `mla-trt run` and the demo."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

import numpy as np

from mla_trt.errors import UsageError
from mla_trt.session import Session

PREFILL_CHUNK = 512


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
) -> Generator[tuple[int, int], None, None]:
    """Continues prompts with the likeliest token, again and again, all prompts together.

    Args:
        session: a session over a model of token ids.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: most tokens to add to each.
        stop_ids: ids that end a sequence; they are given out as well.
        prefill_chunk: most tokens of a prompt in one step, where the engine takes so many.

    Yields:
        (index of the prompt, token), as soon as it is known.

    Raises:
        UsageError: an empty prompt, ids outside the vocabulary, or more positions than the model has.
        OutOfPagesError: the pool has no room. The sequences of this call are freed, as they are in the end in any case.
    """
    if max_new_tokens < 1:
        return
    live: dict[int, int] = {}
    latest: dict[int, int] = {}
    produced = [0] * len(prompts)
    try:
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise UsageError(f"prompt {index} is empty: give at least one token id")
            sequence = session.create()
            live[sequence] = index
            latest[sequence] = _greedy(_prefill(session, sequence, prompt, prefill_chunk))
            yield index, latest[sequence]
            produced[index] = 1
        while True:
            for sequence, index in list(live.items()):
                if latest[sequence] in stop_ids or produced[index] >= max_new_tokens:
                    session.free(sequence)
                    del live[sequence], latest[sequence]
            if not live:
                return
            logits = session.decode(latest)
            for sequence, index in live.items():
                latest[sequence] = _greedy(logits[sequence])
                produced[index] += 1
                yield index, latest[sequence]
    finally:
        for sequence in live:
            session.free(sequence)


def _prefill(session: Session, sequence: int, prompt: Sequence[int], chunk: int) -> np.ndarray:
    main = session.engine.results[0]
    tokens = np.asarray(prompt)
    chunk = min(chunk, session.engine.max_tokens or chunk)
    for start in range(0, len(tokens), chunk):
        results = session.step({sequence: tokens[start : start + chunk]})[sequence]
    return results[main][-1]


def _greedy(logits: np.ndarray) -> int:
    return int(np.argmax(logits))
