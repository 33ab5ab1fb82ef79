"""Runs a lowered model as a TensorRT engine.

This module decides what runs: which profile a step uses, how it is padded to sizes that recur, and what of the results is
padding. `mla_trt.engines.tensorrt_runner` does the running.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from mla_trt.engines import profiles
from mla_trt.engines.engine import PAGE_COPIES
from mla_trt.engines.engine_file import COPIES, DECODE, PAGES, SEQUENCES, TOKENS, EngineDescription, read_description
from mla_trt.errors import BadModelError, MlaTrtError, UsageError
from mla_trt.pages import UNASSIGNED


class Runner(Protocol):
    """What runs the steps of an engine and holds its pools."""

    def run(self, profile: str, inputs: Mapping[str, np.ndarray], *, recurring: bool) -> dict[str, np.ndarray]:
        """Runs one step on the pools.

        Args:
            profile: the profile to use.
            inputs: all inputs but the caches, of shapes that the profile takes.
            recurring: more steps of these shapes are to be expected.

        Returns:
            all outputs but the caches.
        """
        ...

    def copy_pages(self, page_copies: np.ndarray) -> None:
        """Copies (from, to) pages, int32 [n, 2], in every pool."""
        ...

    def read_pages(self, cache: str) -> np.ndarray:
        """A copy of a pool, int32 [pages, page_words]."""
        ...

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        """Replaces a pool."""
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...

    @property
    def recordings(self) -> int | None:
        """How many sizes of steps run as a CUDA graph; None where the engine cannot be recorded."""
        ...


class TensorRtEngine:
    """The engine of a GPU. See `mla_trt.engines.engine.Engine` for its attributes.

    Args:
        description: what is known of the engine.
        runner: runs it.
        pages: pages in the pool of each cache.

    Raises:
        BadModelError: the engine lacks an input that its metadata names.
    """

    def __init__(self, description: EngineDescription, runner: Runner, pages: int) -> None:
        self.description = description
        self.metadata = description.metadata
        self.pages = pages
        self.vocabulary = description.vocabulary
        limits = description.limits()
        self.max_tokens: int | None = limits["tokens"]
        self.max_sequences: int | None = limits["sequences"]
        self.max_length: int | None = limits["tokens of a sequence"]
        self.results = description.results
        self._runner = runner
        caches = {cache.name for cache in self.metadata.caches}
        self._inputs = {tensor.name: tensor for tensor in description.inputs if tensor.name not in caches}
        self._outputs = {tensor.name: tensor for tensor in description.outputs}
        tokens = self._inputs.get(self.metadata.token_input)
        if tokens is None or not self.results:
            raise BadModelError(
                "the engine's description names inputs or outputs that it does not have: build it again"
            )
        self.token_dtype = tokens.numpy_dtype
        # Ids have no axes but those of tokens; embeddings have one more.
        features = tokens.axes[len(tokens.axes) - (self.token_dtype.kind not in "iu") :]
        self.token_features = tuple(int(size) for size in features)
        # Padding has to be told apart in every input and result.
        self._pads = self.metadata.packed and all(profiles.can_unpad(self._outputs[name]) for name in self.results)

    @classmethod
    def open(cls, path: Path | str, *, pages: int | None = None, plugins: Path | None = None) -> TensorRtEngine:
        """Loads an engine.

        Args:
            path: the engine; its description lies beside it.
            pages: pages in the pool of each cache; None: as many as it was built for, or 256.
            plugins: the plugin library; None: the one that is found.

        Raises:
            BadModelError: the engine is damaged, or made for another GPU, TensorRT or plugin library.
            MlaTrtError: there is no GPU, or TensorRT is not installed.
            UsageError: the engine takes another number of pages.
        """
        from mla_trt.engines.tensorrt_runner import TensorRtRunner

        description = read_description(Path(path))
        count = pool_pages(description, pages)
        return cls(description, TensorRtRunner(Path(path), description, pages=count, plugins=plugins), count)

    def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one step on the pool; see `mla_trt.engines.engine.Engine.run`.

        Raises:
            UsageError: the step is larger than the engine takes, or an input has another shape. Nothing was run.
            MlaTrtError: an input is missing, or TensorRT fails.
        """
        values = dict(inputs)
        if PAGE_COPIES in self._inputs:
            # A pair outside of the pool is skipped; a tensor without elements is one that few engines are tried with.
            values[PAGE_COPIES] = page_copies if len(page_copies) else np.full((1, 2), UNASSIGNED, np.int32)
        missing = sorted(self._inputs.keys() - values.keys())
        if missing:
            raise MlaTrtError(
                f"the model also needs the inputs {', '.join(missing)}: give them as extra inputs of the step"
            )
        values = {name: np.ascontiguousarray(values[name], tensor.numpy_dtype) for name, tensor in self._inputs.items()}
        values["block_table"] = self._used_columns(values)
        sizes = profiles.read_sizes(list(self._inputs.values()), values)
        profile = profiles.choose_profile(self.description, sizes)
        ranges = self.description.profiles[profile]
        # Prompts' ends beside other sequences' tokens come in too many sizes to be worth a recording each.
        new = np.diff(values["query_offsets"])
        recurring = self._pads and profile == DECODE and bool((new == new[:1]).all())
        padded = profiles.bucketed(sizes, ranges) if recurring else profiles.at_least(sizes, ranges)
        if COPIES in sizes:
            # Pairs that copy nothing cost little, a recording more for each of their numbers does not.
            most = ranges[COPIES].most
            padded[COPIES] = most if recurring else profiles.bucket(sizes[COPIES], most)
        if not self._pads and padded[SEQUENCES] != sizes[SEQUENCES]:
            raise UsageError("a step needs at least one sequence")
        if len(page_copies) and PAGE_COPIES not in self._inputs:
            self._runner.copy_pages(page_copies)
        given = {name: profiles.pad(tensor, values[name], padded) for name, tensor in self._inputs.items()}
        outputs = self._runner.run(profile, given, recurring=recurring)
        if not self._pads:
            return outputs
        real = {axis: sizes[axis] for axis in (TOKENS, SEQUENCES)}
        return {name: profiles.unpad(self._outputs[name], value, real) for name, value in outputs.items()}

    def _used_columns(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The columns of the block table that tokens of this step reach."""
        lengths = values["cache_lengths"].astype(np.int64)
        longest = int((lengths + np.diff(values["query_offsets"])).max(initial=1)) if len(lengths) else 1
        return values["block_table"][:, : max(1, -(-longest // self.metadata.page_size))]

    def read_pages(self, cache: str) -> np.ndarray:
        """A copy of the pages of one cache, int32 [pages, page_words]."""
        return self._runner.read_pages(cache)

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        """Replaces the pages of one cache."""
        self._runner.write_pages(cache, np.ascontiguousarray(pages, np.int32))

    @property
    def recordings(self) -> int | None:
        """How many sizes of steps run as a CUDA graph; None where the engine cannot be recorded."""
        return self._runner.recordings

    def close(self) -> None:
        """Gives the GPU's memory back. The engine cannot be used after that."""
        self._runner.close()


def pool_pages(description: EngineDescription, pages: int | None) -> int:
    """The number of pages of an engine's pools.

    Args:
        description: of the engine.
        pages: as asked for; None: as many as the engine was built for, or tuned for.

    Raises:
        UsageError: the engine does not take them.
    """
    sizes = description.profiles[DECODE][PAGES]
    count = sizes.best if pages is None else pages
    if not sizes.least <= count <= sizes.most:
        wanted = f"exactly {sizes.most}" if sizes.least == sizes.most else f"{sizes.least} to {sizes.most}"
        raise UsageError(f"the engine's pools take {wanted} pages, not {count}: leave --pages out or build it again")
    return count
