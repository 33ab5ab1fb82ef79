"""What each input and output of an exported model is: the roles that probing, lowering and verification share.

Axes are named by letters: ``B`` sequences, ``S`` new tokens, ``P`` cached tokens, ``T`` = P + S all tokens, ``L`` the rows that a cache has from the
beginning, most of them not yet those of a token; any other axis is its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Axis = str | int

TOKENS = "tokens"  # token ids or embeddings: the data that flows through the model
# Token ids beside those of TOKENS, of an MTP head, or positions that are looked up in a table of embeddings, [B, S].
SECOND_TOKENS = "second_tokens"
POSITIONS = "positions"  # position of each new token (int), or of the first one only, where it has no axis S
LENGTHS = "lengths"  # tokens of each sequence after the step (int)
ATTENTION_MASK = "attention_mask"  # 1 where a token counts, 0 for padding (int or bool), [B, T], [B, S] or [B, L]
SCORE_MASK = "score_mask"  # added to scores (float) or selecting them (bool), [..., S, T or L]
# Past keys, values or latents: grows by S tokens along its axis P each step, or is given new rows along its axis L.
CACHE = "cache"
STATE = "state"  # any other state with an output of its own (recurrent layers): carried as it is
ROPE_COS = "rope_cos"  # cosines given from outside, [..., S, Dr] or [..., S, Dr/2]
ROPE_SIN = "rope_sin"
TOKEN_INDEX = (
    "token_index"  # which new tokens results are wanted of: [S] for each of them, [B] one of each sequence, [] one
)
TOKEN_COUNT = "token_count"  # of how many of the last tokens results are wanted
UNUSED = "unused"  # no output depends on more than its shape


@dataclass(frozen=True)
class ModelInput:
    """One graph input.

    Attributes:
        name: name in the graph.
        role: one of the constants of this module.
        dtype: ONNX element type (``onnx.TensorProto.FLOAT``, ...).
        axes: a letter or a fixed size for each axis.
        output: for ``CACHE`` and ``STATE``, and for ``POSITIONS`` that the graph counts on, the graph output that holds its next value.
    """

    name: str
    role: str
    dtype: int
    axes: tuple[Axis, ...]
    output: str | None = None


@dataclass(frozen=True)
class ModelInterface:
    """All inputs, and the outputs that are results rather than next states or rows for a cache.

    ``fixed`` holds the sizes of letters that the export fixed, such as ``{"S": 1}``.
    """

    inputs: tuple[ModelInput, ...]
    results: tuple[str, ...]
    fixed: dict[str, int] = field(default_factory=dict)

    def by_role(self, role: str) -> list[ModelInput]:
        """Inputs of one role, in graph order."""
        return [model_input for model_input in self.inputs if model_input.role == role]

    @property
    def has_full_caches(self) -> bool:
        """Whether caches have all their rows from the beginning, into which the graph writes those of the new tokens."""
        return any("L" in entry.axes for entry in self.by_role(CACHE))

    @property
    def tokens(self) -> ModelInput:
        """The token input."""
        return self.by_role(TOKENS)[0]


def token_index(entry: ModelInput, shape: tuple[int, ...], new: int) -> np.ndarray:
    """What an input of role ``TOKEN_INDEX`` is given so that results of as many tokens as it allows are had: all ``new`` ones, or the last.

    Returns:
        int64 of the given shape.
    """
    return np.arange(new).reshape(shape) if "S" in entry.axes else np.full(shape, new - 1)
