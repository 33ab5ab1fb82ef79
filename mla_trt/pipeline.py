"""From file to file: load, lower, verify, write."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx

from mla_trt.errors import BadModelError, UsageError, VerificationError
from mla_trt.loading import LoadedModel, load_model
from mla_trt.lowering import Lowered, LowerOptions, Progress, lower
from mla_trt.metadata import LoweredMetadata
from mla_trt.ops import retarget
from mla_trt.report import Report
from mla_trt.verification import VerificationReport, verify
from mla_trt.writing import check_writable, folder_written_whole, weight_file_in, write_json, write_model

log = logging.getLogger(__name__)

VERIFICATION_PAGE_SIZE = 4  # so small that sessions cross page borders early


def lower_file(
    path: Path, output: Path, options: LowerOptions, *, verify: bool = True, progress: Progress = lambda _: None
) -> Report:
    """Lowers the model at `path` into the folder `output`.

    Raises:
        BadModelError, UsageError, NoMlaError, VerificationError: nothing was written.
    """
    check_writable(output)
    progress("load")
    loaded = load_model(path)
    if output.resolve() == loaded.path.parent.resolve() and loaded.path.name == "model.onnx":
        raise UsageError(f"the model would be written over the export itself: choose another folder than '{output}'")
    with folder_written_whole(output) as draft:
        weight_file = weight_file_in(draft, loaded.proto)
        lowered = lower(loaded.proto, options, loaded.base_dir, progress, weight_file=None if verify else weight_file)
        report = lowered.report
        if verify:
            progress("verify")
            found = verify_models(loaded, lowered, options)
            report.verification = found.to_json()
            if not found.passed:
                raise VerificationError(
                    f"the lowered model does not compute what the original computes: {found.failures[0]}"
                )
        progress("write")
        write_model(lowered.model, draft, output, loaded.base_dir, weight_file)
        write_json(report.to_json(), draft / "report.json")
    return report


def verify_models(loaded: LoadedModel, lowered: Lowered, options: LowerOptions) -> VerificationReport:
    """Compares a lowered model in memory with its original."""
    exact = lowered.model
    if options.weights != "keep":
        exact = lower(
            _fresh(loaded),
            LowerOptions(page_size=options.page_size, logits=options.logits, target=options.target),
            loaded.base_dir,
        ).model
    rewritten = retarget(exact, row_format="f32", index_format="f32", page_size=VERIFICATION_PAGE_SIZE)
    return verify(
        _fresh(loaded),
        lowered.interface,
        rewritten,
        lowered.model,
        base_dir=loaded.base_dir,
        judged=not lowered.quantised_activations,
    )


def _fresh(loaded: LoadedModel) -> onnx.ModelProto:
    """The model as it is in its file: lowering may have changed the copy in memory."""
    return load_model(loaded.path).proto


def verify_files(original: Path, folder: Path) -> VerificationReport:
    """Compares the model that `lower_file` wrote with the export it came from.

    Raises:
        BadModelError: one of them cannot be read.
    """
    loaded = load_model(original)
    file = folder / "model.onnx" if folder.is_dir() else folder
    written = load_model(file).proto
    metadata = LoweredMetadata.of(written)
    if not metadata.caches:
        raise BadModelError(f"'{file}' has no caches in its metadata: lower it again")
    again = lower(
        loaded.proto,
        LowerOptions(logits=metadata.logits, page_size=metadata.page_size, target=metadata.target),
        loaded.base_dir,
    )
    rewritten = retarget(written, row_format="f32", index_format="f32", page_size=VERIFICATION_PAGE_SIZE)
    return verify(
        _fresh(loaded),
        again.interface,
        rewritten,
        written,
        base_dir=file.parent,
        judged=not again.quantised_activations,
    )
