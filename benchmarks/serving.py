"""Tokens a second and the time between tokens where many requests decode together, by batch and context.

    python benchmarks/serving.py model.engine --batches 1 16 64 --contexts 1024 8192 -o benchmarks/results
    python benchmarks/serving.py --server 127.0.0.1:8001 --model deepseek --vocabulary 129280 -o results

A case begins as many requests as the batch has at once, with random prompts that have nothing in common, and looks at what comes
while all of them decode, greedily. An engine or lowered model runs in the engine loop that servers use, without a server;
--server asks a Triton that runs, with its gRPC client: start it with limits (--max-batch, --max-step-tokens, pages) that fit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mla_trt.engines.engine_tensorrt import TensorRtEngine
from mla_trt.engines.opening import open_engine
from mla_trt.errors import MlaTrtError, RequestFailedError, UsageError
from mla_trt.serving.loop import EngineLoop
from mla_trt.serving.request import Request
from mla_trt.session import Session
from mla_trt.writing import check_writable, folder_written_whole, write_json

WARM = 8
"""Tokens of each request that do not count: CUDA graphs are recorded in the first steps of a size."""
SERVER_SECONDS = 600
ATTEMPTS = 4


class ApartError(RequestFailedError):
    """There is no time in which all requests of a case decode."""


@dataclass(frozen=True)
class Case:
    """Requests that decode together, and the tokens of each one's prompt."""

    batch: int
    context: int


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        batch, context: the case.
        tokens_per_second: of all requests together, while all decode.
        p50, p90, p99: milliseconds between two tokens of a request, percentiles over all of those.
        first: seconds to the first token of a request, median over requests; all prompts compete for them.
        prompt_tokens_per_second: of all prompts, until the last request has its first token.
        note: why there are no figures.
    """

    batch: int
    context: int
    tokens_per_second: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    first: float | None = None
    prompt_tokens_per_second: float | None = None
    note: str = ""


Times = list[list[float]]
"""Seconds from the beginning of a case to each token of each request."""


def evaluate(case: Case, times: Times) -> Result:
    """The figures of a case.

    Args:
        case: the case.
        times: more than `WARM` tokens of each request.

    Raises:
        ApartError: there is no time in which all requests decode, or none has two tokens in it.
    """
    start, end = max(each[WARM - 1] for each in times), min(each[-1] for each in times)
    inside = [[time for time in each if start <= time <= end] for each in times]
    gaps = np.concatenate([np.diff(each) for each in inside])
    if end <= start or not len(gaps):
        raise ApartError("not all requests run at a time: batch or pool are too small")
    firsts = [each[0] for each in times]
    p50, p90, p99 = (float(1e3 * value) for value in np.percentile(gaps, (50, 90, 99)))
    return Result(
        case.batch,
        case.context,
        tokens_per_second=sum(sum(time > start for time in each) for each in inside) / (end - start),
        p50=p50,
        p90=p90,
        p99=p99,
        first=float(np.median(firsts)),
        prompt_tokens_per_second=case.batch * case.context / max(firsts),
    )


def new_tokens(case: Case, steps: int, max_step_tokens: int) -> int:
    """Tokens that each request may add: the first one must not end before the last one has decoded for some steps."""
    room = max(1, max_step_tokens - case.batch)
    return WARM + steps + case.batch + -(-case.batch * case.context // room)


def run_on_loop(session: Session, prompts: Sequence[np.ndarray], new: int, steps: int, max_step_tokens: int) -> Times:
    """Runs a case in an engine loop.

    Args:
        session: without sequences; it has none afterwards.
        prompts: of the requests.
        new: most tokens of each.
        steps: tokens of each that count.
        max_step_tokens: of the loop.

    Raises:
        MlaTrtError: the engine does not take all requests at a time.
    """
    batch = len(prompts)
    loop = EngineLoop(session, max_batch=batch, max_step_tokens=max_step_tokens, max_waiting=batch, prefix_sources=0)
    began = time.perf_counter()
    numbers = [loop.submit(Request(prompt, new)) for prompt in prompts]
    times: dict[int, list[float]] = {number: [] for number in numbers}
    try:
        while min(map(len, times.values())) < WARM + steps:
            events = loop.step()
            now = time.perf_counter() - began
            for event in events:
                if event.finish is not None:
                    raise RequestFailedError(event.error or f"only {loop.stats().running + 1} requests run at a time")
                times[event.request_id] += [now] * len(event.tokens)
            if loop.stats().preemptions:
                raise RequestFailedError("the pool has too few pages for all requests at a time")
        return list(times.values())
    finally:
        for number in numbers:
            loop.cancel(number)
        while not loop.idle:
            loop.step()


def ask_server(address: str, model: str, prompts: Sequence[np.ndarray], new: int, steps: int) -> Times:
    """Runs a case on a server; arguments as in `run_on_loop`. Tokens that come together share the time since those before.

    Raises:
        MlaTrtError: an error response, or nothing for long.
    """
    triton, errors = importlib.import_module("tritonclient.grpc"), importlib.import_module("tritonclient.utils")
    changed = threading.Condition()
    times: Times = [[] for _ in prompts]
    failures: list[str] = []
    ended: set[int] = set()
    clients = [triton.InferenceServerClient(address) for _ in prompts]

    def receive(case: int, result: Any, error: Any) -> None:
        now = time.perf_counter() - began
        with changed:
            if error is not None:
                failures.append(str(error))
            else:
                before, count = times[case][-1] if times[case] else now, len(result.as_numpy("token_ids"))
                times[case] += [before + (now - before) * (index + 1) / count for index in range(count)]
                if result.as_numpy("finish_reason")[0]:
                    ended.add(case)
            changed.notify_all()

    def done() -> bool:
        enough = (case in ended or len(each) >= WARM + steps for case, each in enumerate(times))
        return bool(failures) or all(enough)

    try:
        for case, client in enumerate(clients):
            try:
                client.is_server_live()  # connects now, so that all requests begin together
            except errors.InferenceServerException as error:
                raise RequestFailedError(f"{address}: {error}") from error
            client.start_stream(lambda result, error, case=case: receive(case, result, error))
        began = time.perf_counter()
        for client, prompt in zip(clients, prompts, strict=True):
            # -1 is no token: nothing ends a request early, whatever the server's configuration says.
            values = {"input_ids": prompt, "max_new_tokens": [new], "stop_ids": [-1]}
            inputs = []
            for name, value in values.items():
                inputs.append(triton.InferInput(name, [len(value)], "INT32"))
                inputs[-1].set_data_from_numpy(np.asarray(value, np.int32))
            client.async_stream_infer(model, inputs)
        with changed:
            if not changed.wait_for(done, SERVER_SECONDS):
                failures.append(f"the server did not answer within {SERVER_SECONDS} s")
            if failures:
                raise RequestFailedError(failures[0])
            return [list(each) for each in times]
    finally:
        for client in clients:
            client.stop_stream(cancel_requests=True)
            client.close()


def run_together(
    case: Case, run: Callable[[Sequence[np.ndarray], int], Times], prompts: Sequence[np.ndarray], new: int
) -> Result:
    """Runs a case, again with twice as many tokens where the first requests ended before the last ones began: a client may
    be slow beside a small model."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(ApartError):
            return evaluate(case, run(prompts, new))
        new *= 2
    return evaluate(case, run(prompts, new))


def measure(
    cases: Sequence[Case],
    run: Callable[[Sequence[np.ndarray], int], Times],
    *,
    steps: int,
    vocabulary: int,
    max_step_tokens: int,
    say: Callable[[str], None],
) -> list[Result]:
    """Runs cases one after the other; what fails has a note in place of figures."""
    results = []
    random = np.random.default_rng(0)
    for case in cases:
        prompts = [random.integers(0, vocabulary, case.context) for _ in range(case.batch)]
        try:
            result = run_together(case, run, prompts, new_tokens(case, steps, max_step_tokens))
            say(
                f"batch {case.batch}, context {case.context}: {result.tokens_per_second:.0f} tokens/s, p50 {result.p50:.2f} ms"
            )
        except MlaTrtError as error:
            result = Result(case.batch, case.context, note=" ".join(str(error).split()))
            say(f"batch {case.batch}, context {case.context}: {result.note}")
        results.append(result)
    return results


# what is written


def markdown(results: Sequence[Result], command: str, what: str, steps: int) -> str:
    """The results as a Markdown table under the command and a line about what was measured."""
    lines = [
        f"    {command}",
        "",
        f"{what}. All requests of a case decode together, greedily, each at least {steps} tokens; the context is that of the prompts, which "
        "have nothing in common. ms between two tokens of a request; the first token waits for the prompts of all.",
        "",
        "| batch | context | tokens/s | p50 ms | p90 ms | p99 ms | first token s | prompt tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if r.tokens_per_second is None:
            lines.append(f"| {r.batch} | {r.context} | {r.note.replace('|', '/')} | | | | | |")
            continue
        figures = (f"{r.tokens_per_second:.0f}", f"{r.p50:.2f}", f"{r.p90:.2f}", f"{r.p99:.2f}", f"{r.first:.2f}")
        lines.append(f"| {r.batch} | {r.context} | {' | '.join(figures)} | {r.prompt_tokens_per_second:.0f} |")
    return "\n".join(lines) + "\n"


def plot(pyplot: Any, path: Path, results: Sequence[Result]) -> None:
    """Tokens a second and time between tokens over the batch, a line for each context."""
    figure, (rate, latency) = pyplot.subplots(1, 2, figsize=(11, 4))
    measured = [result for result in results if result.tokens_per_second is not None]
    for context in sorted({result.context for result in measured}):
        row = sorted((result for result in measured if result.context == context), key=lambda result: result.batch)
        batches = [result.batch for result in row]
        rate.plot(batches, [result.tokens_per_second for result in row], marker="o", label=f"context {context}")
        (line,) = latency.plot(batches, [result.p50 for result in row], marker="o", label=f"context {context}, p50")
        latency.plot(batches, [result.p99 for result in row], linestyle=":", color=line.get_color(), label="p99")
    for axis, title in ((rate, "tokens/s of all requests"), (latency, "ms between tokens of a request")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        batches = sorted({result.batch for result in measured})
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("requests that decode together")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_results(folder: Path, results: Sequence[Result], page: str, what: str) -> None:
    """`serving.md`, `serving.json` and, with matplotlib, `serving.png`."""
    with folder_written_whole(folder) as draft:
        (draft / "serving.md").write_text(page)
        write_json({"what": what, "results": [asdict(result) for result in results]}, draft / "serving.json")
        try:
            pyplot = importlib.import_module("matplotlib.pyplot")
        except ImportError:
            return
        plot(pyplot, draft / "serving.png", results)


def describe(engine: Any) -> str:
    """One line on an engine and its machine."""
    if isinstance(engine, TensorRtEngine):
        d = engine.description
        layers = len({cache.layer for cache in d.metadata.caches})
        return (
            f"{d.gpu}, TensorRT {d.tensorrt}: {layers} attention layer(s), rows {d.metadata.row_format}, --dtype {d.dtype}, --cache {d.cache}, "
            f"logits {d.metadata.logits}, vocabulary {d.vocabulary}, in the engine loop without a server"
        )
    return f"ONNX Runtime on {os.cpu_count()} cores ({platform.machine()}), in the engine loop without a server"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit status is 1 where a case has no figures."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", type=Path, help="what 'mla-trt build' or 'mla-trt lower' wrote")
    parser.add_argument(
        "--server", metavar="HOST:PORT", help="gRPC address of a Triton that runs, in place of an engine"
    )
    parser.add_argument("--model", help="the model's name in it")
    parser.add_argument("--vocabulary", type=int, help="token ids to draw from (default: the engine's)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--steps", type=int, default=64, help="tokens of each request that count (default 64)")
    parser.add_argument("--max-step-tokens", type=int, default=2048, help="of the engine loop (default 2048)")
    parser.add_argument("--pages", type=int, help="pages in the pool")
    parser.add_argument("--plugins", type=Path, help="the plugin library (default: found by itself)")
    parser.add_argument("-o", "--output", type=Path, help="writes serving.md, .json and .png into this directory")
    options = parser.parse_args(arguments)
    if (options.engine is None) == (options.server is None) or (options.server is None) != (options.model is None):
        parser.error("give an engine, or --server with --model")
    cases = [Case(batch, context) for context in options.contexts for batch in options.batches]
    if min(*(size for case in cases for size in (case.batch, case.context)), options.steps) < 1:
        parser.error("batches, contexts and --steps must be at least 1")
    command = shlex.join(["python", "benchmarks/serving.py", *arguments])
    try:
        if options.output is not None:
            check_writable(options.output)
        vocabulary = options.vocabulary
        if options.server is not None:
            what = f"Model '{options.model}' of the Triton server at {options.server}, times as its client has them"

            def run(prompts: Sequence[np.ndarray], new: int) -> Times:
                # Clients need time to begin.
                return ask_server(options.server, options.model, prompts, 2 * new, options.steps)
        else:
            session = Session(open_engine(options.engine, pages=options.pages, plugins=options.plugins))
            what, vocabulary = describe(session.engine), vocabulary or session.engine.vocabulary

            def run(prompts: Sequence[np.ndarray], new: int) -> Times:
                return run_on_loop(session, prompts, new, options.steps, options.max_step_tokens)

        if vocabulary is None:
            raise UsageError("it is not known which token ids there are: give --vocabulary")
        results = measure(
            cases,
            run,
            steps=options.steps,
            vocabulary=vocabulary,
            max_step_tokens=options.max_step_tokens,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        page = markdown(results, command, what, options.steps)
        print(page, end="")
        if options.output is not None:
            write_results(options.output, results, page, what)
    except MlaTrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 1 if any(result.note for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
