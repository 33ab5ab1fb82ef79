"""From file to file: load, lower, verify, write."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from mla_trt.errors import BadModelError, NoSessionError, UsageError, VerificationError
from mla_trt.loading import LoadedModel, ModelOnDisk, load_from_elsewhere, load_model
from mla_trt.lowering import Lowered, LowerOptions, Progress, lower
from mla_trt.metadata import LoweredMetadata
from mla_trt.ops import retarget
from mla_trt.passes.standardize import forbid_rounded_activations
from mla_trt.report import Report
from mla_trt.verification.layers import half_of_memory, memory_needed, verify_layers
from mla_trt.verification.verify import VERIFICATION_PAGE_SIZE, VerificationReport, verify, with_failures
from mla_trt.verification.weights import compare_attentions, has_quantised_weights
from mla_trt.weight_file import WeightFile
from mla_trt.writing import check_writable, folder_written_whole, weight_file_in, write_json, write_model

log = logging.getLogger(__name__)


def lower_file(
    path: Path,
    output: Path,
    options: LowerOptions,
    *,
    verify: bool = True,
    verify_memory: int | None = None,
    progress: Progress = lambda _: None,
) -> Report:
    """Lowers the model at `path` into the folder `output`.

    Args:
        path: the export.
        output: folder for the model and its report.
        options: how to lower.
        verify: compare the result with the export before it is written.
        verify_memory: bytes that this may take; a model that needs more is verified a layer at a time. None: half of the
            machine's memory.
        progress: told what is being done.

    Raises:
        BadModelError, UsageError, NoMlaError, VerificationError: nothing was written.
    """
    check_writable(output)
    progress("load")
    loaded = load_model(path)
    if (output / "model.onnx").exists() and (output / "model.onnx").samefile(path):
        raise UsageError(f"the model would be written over the export itself: choose another folder than '{output}'")
    layers = verify and _is_larger(loaded, verify_memory)
    with folder_written_whole(output) as draft:
        weight_file = weight_file_in(draft, loaded.proto)
        # Models that are verified whole are kept whole in memory, as ONNX Runtime takes them.
        apart = layers or not verify
        lowered = lower(
            loaded.proto, options, loaded.base_dir, progress, weight_file=weight_file if apart else None, plan=layers
        )
        report = lowered.report
        if verify:
            progress("verify")
            found = verify_models(
                loaded, lowered, options, weight_file=weight_file if apart else None, progress=progress
            )
            report.verification = found.to_json()
            if not found.passed:
                raise VerificationError(
                    f"the lowered model does not compute what the original computes: {found.failures[0]}"
                )
        progress("write")
        write_model(lowered.model, draft, output, loaded.base_dir, weight_file)
        write_json(report.to_json(), draft / "report.json")
    return report


def verify_models(
    loaded: LoadedModel,
    lowered: Lowered,
    options: LowerOptions,
    *,
    weight_file: WeightFile | None = None,
    progress: Progress = lambda _: None,
) -> VerificationReport:
    """Compares a lowered model in memory with its original: layer by layer where the layers' borders were found.

    Args:
        loaded: the export.
        lowered: what became of it.
        options: how it was lowered.
        weight_file: where its new weights are, if they are not in memory.
        progress: told which layer is compared.

    Raises:
        NoSessionError: the export cannot be run from the first token of a sequence.
    """
    moved = {weight_file.path.name: weight_file.path.parent} if weight_file is not None else {}
    written = ModelOnDisk(lowered.model, loaded.base_dir, moved)
    if options.weights == "keep":
        return _compare(loaded, lowered, written, written, progress)
    with TemporaryDirectory() as folder:
        exact = _with_exact_weights(loaded, options, Path(folder) if weight_file is not None else None)
        return _compare(loaded, lowered, exact, written, progress)


def verify_files(
    original: Path, folder: Path, *, verify_memory: int | None = None, progress: Progress = lambda _: None
) -> VerificationReport:
    """Compares the model that `lower_file` wrote with the export it came from.

    Args:
        original: the export.
        folder: where the lowered model is.
        verify_memory, progress: as for `lower_file`.

    Raises:
        BadModelError: one of them cannot be read.
        NoSessionError: the export cannot be run from the first token of a sequence.
    """
    loaded = load_model(original)
    file = folder / "model.onnx" if folder.is_dir() else folder
    written = ModelOnDisk(load_model(file).proto, file.parent)
    metadata = LoweredMetadata.of(written.proto)
    if not metadata.caches:
        raise BadModelError(f"'{file}' has no caches in its metadata: lower it again")
    options = LowerOptions(logits=metadata.logits, page_size=metadata.page_size, target=metadata.target)
    layers = _is_larger(loaded, verify_memory)
    with TemporaryDirectory() as place:
        weight_file = weight_file_in(Path(place), loaded.proto) if layers else None
        again = lower(loaded.proto, options, loaded.base_dir, progress, weight_file=weight_file, plan=layers)
        moved = {weight_file.path.name: weight_file.path.parent} if weight_file is not None else {}
        exact = ModelOnDisk(again.model, loaded.base_dir, moved) if has_quantised_weights(written.proto) else written
        return _compare(loaded, again, exact, written, progress)


def _is_larger(loaded: LoadedModel, verify_memory: int | None) -> bool:
    return memory_needed(loaded.proto) > (half_of_memory() if verify_memory is None else verify_memory)


def _with_exact_weights(loaded: LoadedModel, options: LowerOptions, folder: Path | None) -> ModelOnDisk:
    """The model lowered with weights as exported, which are put into a folder if there is one."""
    weight_file = weight_file_in(folder, loaded.proto) if folder is not None else None
    kept = replace(options, weights="keep", strict=False)
    model = lower(_fresh(loaded), kept, loaded.base_dir, weight_file=weight_file).model
    moved = {weight_file.path.name: weight_file.path.parent} if weight_file is not None else {}
    return ModelOnDisk(model, loaded.base_dir, moved)


def _compare(
    loaded: LoadedModel, lowered: Lowered, exact: ModelOnDisk, written: ModelOnDisk, progress: Progress
) -> VerificationReport:
    """Verifies sessions of the model with exact weights and, where they are another, of the model as written."""
    judged = not lowered.quantised_activations
    reason = None
    if lowered.plan is None:
        rewritten = retarget(exact.proto, row_format="f32", index_format="f32", page_size=VERIFICATION_PAGE_SIZE)
        load_from_elsewhere(rewritten, exact, written.folder)
        try:
            report = verify(
                _fresh(loaded),
                lowered.interface,
                rewritten,
                written.proto,
                base_dir=written.folder,
                original_dir=loaded.base_dir,
                judged=judged,
            )
            return with_failures(report, _quantised_badly(exact, written))
        except NoSessionError as error:
            # Of a layer alone, rows can be made without the tokens before them.
            reason = error
            lowered = lower(_fresh(loaded), LowerOptions(), loaded.base_dir, plan=True)
    assert lowered.plan is not None
    try:
        report = verify_layers(
            ModelOnDisk(_fresh(loaded), loaded.base_dir),
            lowered.interface,
            lowered.plan,
            exact,
            written,
            judged=judged,
            progress=progress,
        )
    except NoSessionError as error:
        raise reason or error from None
    return with_failures(report, _quantised_badly(exact, written))


def _quantised_badly(exact: ModelOnDisk, written: ModelOnDisk) -> list[str]:
    return [] if exact is written else compare_attentions(exact, written)


def _fresh(loaded: LoadedModel) -> onnx.ModelProto:
    """The model as it is in its file, but for the permission to round activations: lowering may have changed the copy in memory."""
    proto = load_model(loaded.path).proto
    forbid_rounded_activations(proto)
    return proto
