"""Commands that are asked to end leave nothing, and signals that are ignored stay so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mla_trt.cli import main
from mla_trt.signals import ENDING, Ended, handled
from mla_trt.writing import DRAFT, YOUNG_SECONDS, draft_in

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op23__sdpa__dec.onnx"
# `lower` as far as its draft, where it waits.
WAITING = """
import sys, time
from mla_trt import cli, pipeline
def wait(*_, **__):
    print("drafting", flush=True)
    time.sleep(60)
pipeline.write_json = wait
sys.exit(cli.main(["lower", sys.argv[1], "-o", sys.argv[2], "--no-verify", "--quiet"]))
"""


def start(folder: Path, *before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", WAITING, str(EXAMPLE), str(folder / "new" / "out")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "drafting\n"
    assert list((folder / "new" / "out").iterdir()), "there is a draft now"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_a_command_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert said == f"mla-trt: {how}; nothing was written\n"
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


def test_what_is_ignored_does_not_end_it(tmp_path: Path) -> None:
    """As under nohup."""
    process = start(tmp_path, "env", "--ignore-signal=HUP")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


SECOND = """
import os, signal, time
from mla_trt.signals import Ended, ending_raises
try:
    with ending_raises():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
except Ended as end:
    print(end.number, flush=True)
with ending_raises():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    finally:  # what takes too long
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
"""


def test_a_second_one_ends_the_process_where_it_stands() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.returncode) == (f"{signal.SIGTERM.value}\n", -signal.SIGTERM)


def test_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    seen: list[int] = []
    with suppress(Ended), handled([signal.SIGUSR1], lambda number, _: seen.append(number)):
        signal.raise_signal(signal.SIGUSR1)
        raise Ended(signal.SIGTERM)
    assert seen == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert {number: signal.getsignal(number) for number in before} == before


def test_an_interrupt_is_handled_where_it_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled([signal.SIGINT, signal.SIGTERM], lambda *_: None):
            assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_no_signals() -> None:
    found: list[object] = []

    def look() -> None:
        with handled(ENDING, lambda *_: None):
            found.extend(signal.getsignal(number) for number in ENDING)

    before = [signal.getsignal(number) for number in ENDING]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == before


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = start(tmp_path)
    process.kill()
    process.wait()
    output = tmp_path / "new" / "out"
    (left,) = output.iterdir()
    assert main(["lower", str(EXAMPLE), "-o", str(output), "--no-verify", "--quiet"]) == 0
    assert left.is_dir(), "too young to be known for abandoned"
    old = time.time() - 2 * YOUNG_SECONDS
    os.utime(left, (old, old))
    caplog.clear()
    assert main(["lower", str(EXAMPLE), "-o", str(output), "--no-verify"]) == 0
    assert [record.getMessage() for record in caplog.records if "killed" in record.getMessage()] == [
        f"'{left}' was left by a run that was killed: it is removed"
    ]
    assert all(place.is_file() for place in output.iterdir())


def test_drafts_of_others_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = time.time() - 2 * YOUNG_SECONDS
    for name in (f"{DRAFT}abcdefg", f"{DRAFT}abcdefgh.d", ".mla-trt-another-abcdefgh", ".other-abcdefgh"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{DRAFT}abcdefgh").write_text("a file")
    (tmp_path / f"{DRAFT}abcdefgi").symlink_to(tmp_path / ".other-abcdefgh")
    process = start(tmp_path)
    try:
        output = tmp_path / "new" / "out"
        (live,) = output.iterdir()
        for place in (live, *tmp_path.iterdir()):
            os.utime(place, (old, old), follow_symlinks=False)
        before = sorted(tmp_path.iterdir())
        for folder in (tmp_path, output):
            with draft_in(folder) as draft:
                assert draft.is_dir()
            assert not draft.exists()
        assert sorted(tmp_path.iterdir()) == before
        assert live.is_dir()
        assert not caplog.records
    finally:
        process.kill()
        process.wait()
