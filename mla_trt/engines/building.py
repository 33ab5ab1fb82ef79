"""Builds a TensorRT engine from a lowered model."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import onnx
from onnx import helper

from mla_trt import __version__
from mla_trt.cuda import Gpu, find_gpu
from mla_trt.engines.engine_file import (
    CACHES,
    IO,
    RESIDENT,
    EngineDescription,
    EngineTensor,
    Range,
    description_path,
    engine_tensors,
    plan_digest,
    without_pools,
)
from mla_trt.engines.engine_onnxruntime import embedded_vocabulary
from mla_trt.engines.input_projections import is_faster
from mla_trt.engines.plugin_model import DTYPES, FP8, MODEL_FILE, WEIGHTS, write_plugin_model
from mla_trt.engines.profiles import input_range, make_profiles, plan_profiles
from mla_trt.engines.tensorrt_api import Messages, load_plugins, load_tensorrt, start
from mla_trt.errors import BadModelError, UsageError
from mla_trt.loading import load_model
from mla_trt.metadata import METADATA_KEY, LoweredMetadata
from mla_trt.ops import OPS
from mla_trt.ops.common import QUERY_TERMS
from mla_trt.signals import ENDING, Ended, handled
from mla_trt.writing import check_writable, draft_in

log = logging.getLogger(__name__)

STREAMED_SHARE = 0.6
"""Weights that would take more of the GPU's memory than this are streamed from the host's."""
TARGET_VERSIONS = {"tensorrt-10.6": 10, "tensorrt-11": 11}


class Phases(Protocol):
    """Is told how far a build is. Phases lie within each other."""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of some number of steps begins."""
        ...

    def step(self, name: str, done: int) -> None:
        """Some of its steps are done."""
        ...

    def finish(self, name: str) -> None:
        """It ends, with all of its steps or without."""
        ...


@dataclass(frozen=True)
class BuildOptions:
    """What the command's options say.

    Attributes:
        dtype: "keep" the model's types, or "bf16" (mla_trt.engines.bfloat16).
        weights: "keep", or "fp8": those in bf16 that are multiplied with before and behind attention become e4m3 codes, half the bytes and
            less exact (mla_trt.engines.coded_weights); for Hopper alone.
        query_terms: how exact attention over e4m3 rows must be (docs/op-set.md, MlaDecoding); None: as the model says.
        cache: "io", pages are inputs and outputs, or "resident", the engine's plugins hold them (`pages` of each cache).
        max_batch, max_tokens, max_length, pages: see `mla_trt.engines.profiles.make_profiles`.
        optimization_level: TensorRT's, 0 (fastest build) to 5.
        workspace: bytes that a layer may use beside its tensors; None: as much as there is.
        timing_cache: file of measured times, read and written.
        keep_times: without such a file, keep them in one of the user's cache folder.
        weight_streaming: keep weights in host memory; None: where they would fill the GPU's.
        refit: weights can be replaced in the engine.
        keep_codes: leave quantised weights as codes, which the engine decodes in every step, instead of decoding them now.
        tf32: let products in float32 round their factors to 10 bits.
        plugins: the plugin library; None: the one that is found.
    """

    dtype: str = "keep"
    weights: str = "keep"
    query_terms: int | None = None
    cache: str = IO
    max_batch: int | None = None
    max_tokens: int | None = None
    max_length: int | None = None
    pages: int | None = None
    optimization_level: int = 3
    workspace: int | None = None
    timing_cache: Path | None = None
    keep_times: bool = False
    weight_streaming: bool | None = None
    refit: bool = False
    keep_codes: bool = False
    tf32: bool = False
    plugins: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype is '{self.dtype}': choose one of {', '.join(DTYPES)}")
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights is '{self.weights}': choose one of {', '.join(WEIGHTS)}")
        if self.query_terms not in (None, *QUERY_TERMS.choices):
            raise UsageError(f"--query-terms is {self.query_terms}: choose one of 0, 1, 2")
        if self.cache not in CACHES:
            raise UsageError(f"--cache is '{self.cache}': choose one of {', '.join(CACHES)}")
        if self.cache == RESIDENT and self.pages is None:
            raise UsageError(
                "--cache resident needs --pages N, the number of pages that the engine holds of each cache"
            )
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(f"--optimization-level is {self.optimization_level}: it must be 0 to 5")


def build_file(
    source: Path, output: Path, options: BuildOptions, *, phases: Phases | None = None
) -> tuple[EngineDescription, float]:
    """Builds the engine `output` and its description from a lowered model.

    Args:
        source: the folder that `mla-trt lower` wrote, or the model in it.
        output: the engine's file.
        options: how to build.
        phases: told how far it is.

    Returns:
        what was built, and the seconds that it took.

    Raises:
        BadModelError: the model is not a lowered one, or TensorRT does not take it; the message names node and cause.
        UsageError: an option or file that cannot be.
        MlaTrtError: there is no GPU, TensorRT or plugin library. Nothing was written, as on every error.
    """
    path = source / MODEL_FILE if source.is_dir() else source
    if not path.exists():
        raise UsageError(f"'{path}' does not exist: give the folder that 'mla-trt lower' wrote")
    if output.exists() and not output.is_file():
        raise UsageError(f"'{output}' is a folder or a device: give a file to write the engine to")
    model = load_model(path).proto
    metadata = LoweredMetadata.of(model)
    inputs, outputs = engine_tensors(model, metadata)
    if options.cache == RESIDENT:
        inputs, outputs = without_pools(inputs, outputs, metadata)
    profiles = make_profiles(
        metadata,
        max_batch=options.max_batch,
        max_tokens=options.max_tokens,
        max_length=options.max_length,
        pages=options.pages,
    )
    check_writable(output.parent)
    gpu = find_gpu()
    trt = load_tensorrt()
    _check_target(metadata, trt.__version__)
    build = load_plugins(options.plugins, gpu, trt.__version__)
    if options.weights == FP8:
        _check_fp8(gpu, build)
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    with draft_in(output.parent) as folder:
        with weights_phase(phases) as progress:
            write_plugin_model(
                path,
                folder,
                inputs,
                dtype=options.dtype,
                query_terms=options.query_terms,
                pages=options.pages,
                resident=options.cache == RESIDENT,
                keep_codes=options.keep_codes,
                input_projections=is_faster(gpu, build),
                weights=options.weights,
                progress=progress,
            )
        weights = weight_bytes(onnx.load(folder / MODEL_FILE, load_external_data=False))
        if options.timing_cache is None and options.keep_times:
            options = replace(options, timing_cache=default_timing_cache(gpu, trt.__version__))
        if options.weight_streaming is None:
            options = replace(options, weight_streaming=weights > STREAMED_SHARE * gpu.memory)
        draft = folder / "plan"
        _Build(trt, options, inputs, plan_profiles(profiles, options.cache), phases).run(folder / MODEL_FILE, draft)
        description = EngineDescription(
            metadata=metadata,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            profiles=profiles,
            vocabulary=metadata.vocabulary or embedded_vocabulary(model, metadata.token_input),
            tensorrt=trt.__version__,
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            plugins=build,
            dtype=options.dtype,
            cache=options.cache,
            weight_streaming=bool(options.weight_streaming),
            plan_bytes=draft.stat().st_size,
            plan_digest=plan_digest(draft),
            mla_trt=__version__,
            weights=options.weights,
        )
        text = next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY)
        described = folder / "description"
        described.write_text(json.dumps(description.to_json(json.loads(text)), indent=1) + "\n")
        os.replace(draft, output)
        os.replace(described, description_path(output))
    return description, time.monotonic() - started


@contextmanager
def weights_phase(phases: Phases | None) -> Iterator[Callable[[int, int], None] | None]:
    """The phase in which weights are written anew, of which there may be none; gives who is told of each, how many there are."""
    if phases is None:
        yield None
        return
    name = "weights"
    begun = False

    def progress(done: int, steps: int) -> None:
        nonlocal begun
        if not begun:
            phases.start(name, None, steps)
        begun = True
        phases.step(name, done)

    try:
        yield progress
    finally:
        phases.finish(name)


def default_timing_cache(gpu: Gpu, version: str) -> Path:
    """Where measured times are kept between builds: one file for each GPU and TensorRT."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mla-trt"
    return folder / f"timing-{version}-{'-'.join(gpu.name.split())}.cache"


def parser_error(errors: list[Any]) -> str:
    """One line for what TensorRT's ONNX parser found wrong.

    Args:
        errors: its `ParserError`s.
    """
    error = errors[0]
    name, op, text = error.node_name(), error.node_operator(), " ".join(error.desc().split())
    where = f"node '{name}' ({op})" if op else "the model"
    hint = ""
    if op in OPS:
        hint = f": the plugin library has no plugin {op} that takes this node; run 'mla-trt plugins build' again"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"TensorRT's parser does not take {where}: {text}{hint}{more}"


def _check_target(metadata: LoweredMetadata, version: str) -> None:
    major = int(version.split(".")[0])
    wanted = TARGET_VERSIONS.get(metadata.target)
    if wanted is None or wanted > major:
        raise BadModelError(
            f"the model was lowered for '{metadata.target}', and this is TensorRT {version}: lower it with --target "
            f"{'tensorrt-11' if major >= 11 else 'tensorrt-10.6'}"
        )


def _check_fp8(gpu: Gpu, plugins: str) -> None:
    if is_faster(gpu, plugins):
        return
    if gpu.compute_capability == "9.0":
        raise UsageError(
            f"--weights fp8 needs a plugin library for sm_90a, and this one is '{plugins}': run 'mla-trt plugins build' again"
        )
    raise UsageError(f"--weights fp8 is for Hopper, and {gpu.name} is another GPU: build with --weights keep")


def weight_bytes(model: onnx.ModelProto) -> int:
    """Of the weights that the engine gets; the files that hold them may hold others too."""
    return sum(
        math.prod(weight.dims) * helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        for weight in model.graph.initializer
    )


class _Build:
    """One build with TensorRT."""

    def __init__(
        self,
        trt: Any,
        options: BuildOptions,
        inputs: list[EngineTensor],
        profiles: Sequence[Mapping[str, Range]],
        phases: Phases | None,
    ) -> None:
        self._trt = trt
        self._options = options
        self._inputs = inputs
        self._profiles = profiles
        self._phases = phases
        self._messages = Messages()

    def run(self, model: Path, plan: Path) -> None:
        """Builds the plan of a model.

        Raises:
            BadModelError: TensorRT does not take it.
            Ended: a signal asked for it.
        """
        trt = self._trt
        logger = start(trt, self._messages)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if self._phases:
            self._phases.start("parse", None, 1)
        if not parser.parse_from_file(str(model)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise BadModelError(parser_error(errors) if errors else f"TensorRT's parser fails: {self._messages.take()}")
        if self._phases:
            self._phases.finish("parse")
        config = builder.create_builder_config()
        self._configure(config)
        for ranges in self._profiles:
            config.add_optimization_profile(self._profile(builder, network, ranges))
        cache = self._load_cache(config)
        ended: list[int] = []
        monitor = make_monitor(trt, self._phases, ended) if self._phases else None
        if monitor is not None:
            config.progress_monitor = monitor
        # A signal asks TensorRT to stop, rather than to raise through it.
        with handled((signal.SIGINT, *ENDING), lambda number, _: ended.append(number)):
            serialized = builder.build_serialized_network(network, config)
        if ended:
            raise Ended(ended[0])
        if serialized is None:
            raise BadModelError(f"TensorRT cannot build the engine: {self._messages.take()}")
        with plan.open("wb") as file:
            file.write(memoryview(serialized))
        if cache is not None and self._options.timing_cache is not None:
            write_times(config, self._options.timing_cache)
            self._messages.take()

    def _configure(self, config: Any) -> None:
        trt, options = self._trt, self._options
        if hasattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03"):
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        config.builder_optimization_level = options.optimization_level
        if options.optimization_level == 0:
            config.avg_timing_iterations = 1
            config.max_aux_streams = 0
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if options.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)

    def _profile(self, builder: Any, network: Any, ranges: Mapping[str, Range]) -> Any:
        profile = builder.create_optimization_profile()
        described = {tensor.name: tensor for tensor in self._inputs}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if tensor.is_shape_tensor:
                raise BadModelError(
                    f"the input '{tensor.name}' decides shapes, which an engine of this package cannot have"
                )
            profile.set_shape(tensor.name, *input_range(described[tensor.name], ranges))
        return profile

    def _load_cache(self, config: Any) -> Any:
        path = self._options.timing_cache
        if path is None:
            return None
        for data in (path.read_bytes() if path.exists() else b"", b""):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
            log.warning("the timing cache '%s' is of another GPU or TensorRT: it is made anew", path)
            self._messages.take()
        return None


def make_monitor(trt: Any, phases: Phases, ended: Sequence[int]) -> Any:
    """TensorRT's progress monitor over `phases`; it ends the build when there is a signal in `ended`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step + 1)
            return not ended

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def write_times(config: Any, path: Path) -> None:
    """Adds what a build measured to a timing cache, which builds beside it may have written meanwhile.

    Args:
        config: the build's configuration.
        path: the cache, which is made anew where it is of another GPU or TensorRT.
    """
    times = config.get_timing_cache()
    try:
        if path.exists() and (others := config.create_timing_cache(path.read_bytes())) is not None:
            times.combine(others, False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(memoryview(times.serialize()))
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the timing cache '%s' cannot be written: %s", path, error.strerror)
