"""Generation with a session that nobody else uses, for `mla-trt run` and the demo."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

from mla_trt.errors import RequestFailedError, UsageError
from mla_trt.serving.loop import EngineLoop
from mla_trt.serving.request import Request
from mla_trt.serving.sampling import Sampling
from mla_trt.session import Session

STEP_TOKENS = 512


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    samplings: Sequence[Sampling] | None = None,
    max_step_tokens: int = STEP_TOKENS,
) -> Generator[tuple[int, int], None, None]:
    """Continues prompts, all together as far as pages and engine allow.

    Args:
        session: a session without sequences over a model of token ids.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: most tokens to add to each.
        stop_ids: ids that end a sequence; they are given out as well.
        samplings: how the tokens of each are chosen; None: the likeliest.
        max_step_tokens: most tokens of a step, where the engine takes so many.

    Yields:
        (index of the prompt, token), as soon as it is known.

    Raises:
        UsageError: an empty prompt, ids outside the vocabulary, or more positions than the model or the pool has.
        RequestFailedError: the engine failed. All pages are free again then, as they are in the end in any case.
    """
    if max_new_tokens < 1 or not prompts:
        return
    count = len(prompts)
    loop = EngineLoop(session, max_batch=count, max_step_tokens=max_step_tokens, max_waiting=count, prefix_sources=0)
    indices = {}
    for index, prompt in enumerate(prompts):
        sampling = Sampling() if samplings is None else samplings[index]
        try:
            indices[loop.submit(Request(prompt, max_new_tokens, stop_ids, sampling))] = index
        except UsageError as error:
            raise UsageError(f"prompt {index}: {error}") from None
    try:
        while not loop.idle:
            for event in loop.step():
                if event.error is not None:
                    raise RequestFailedError(f"prompt {indices[event.request_id]}: {event.error}")
                for token in event.tokens:
                    yield indices[event.request_id], token
    finally:
        loop.abort("generation was ended")
        loop.step()
