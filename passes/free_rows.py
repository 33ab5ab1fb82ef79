"""Makes cases of exports whose caches have a fixed, large number of rows small: what the graph spells that number out in is read as if there
were fewer rows. Keys of a real model, for each of its heads and each of some thousand rows, would not fit in memory as atoms.

Only reading is made easier in this way. What is not a number of rows after all makes the case contradict itself, and then it is read as it is;
masks are checked, and the lowered model is verified, with the export as it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.attention_core import HIDDEN_SCORE
from mla_trt.passes.graph import constant_value, element_count

FEW_ROWS = 64  # so many are no burden
_SIZES = 16  # most elements of a constant that is a shape or a bound
_LARGEST = 1 << 26
_COUNTS = (np.dtype(np.int64), np.dtype(np.int32))
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))


def free_rows(graph: gs.Graph, rows: int, fewer: int, base_dir: Path | None) -> dict[int, np.ndarray]:
    """Constants, by id, as they would be if caches had `fewer` rows instead of `rows`.

    Shapes and bounds name the other number; ranges, indices and masks over the rows end earlier.
    """
    constants = {id(item): item for node in graph.nodes for item in node.inputs if isinstance(item, gs.Constant)}
    found: dict[int, np.ndarray] = {}
    for key, tensor in constants.items():
        shape = tuple(int(size) for size in tensor.shape)
        counts, truths = tensor.dtype in _COUNTS, tensor.dtype == np.bool_
        if rows in shape and element_count(tensor) <= _LARGEST:
            if not (counts or truths or tensor.dtype in _FLOATS):
                continue
            array = constant_value(tensor, base_dir)
            if counts or truths or _is_range_or_mask(array, shape.index(rows)):
                found[key] = array[tuple(slice(fewer if size == rows else None) for size in shape)]
        elif counts and len(shape) <= 1 and element_count(tensor) <= _SIZES:
            array = constant_value(tensor, base_dir)
            if (array == rows).any():
                found[key] = np.where(array == rows, fewer, array).astype(array.dtype)
    return found


def _is_range_or_mask(array: np.ndarray, axis: int) -> bool:
    """Whether floats count along an axis, or hide and show scores. Others are weights or tables."""
    if array.size == array.shape[axis] and np.array_equal(array.reshape(-1), np.arange(array.size)):
        return True
    hides = array < HIDDEN_SCORE
    return bool(hides.any() and (hides | (array == 0)).all())
