"""The builder: what it compiles, what it says when something is missing, and how its libraries are found again."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

import mla_trt
from mla_trt.cli import main
from mla_trt.errors import PluginLibraryError, UsageError
from mla_trt.plugins import build as builder
from mla_trt.plugins import library, toolchain
from mla_trt.plugins.build import BuildOptions, build, parse_architectures
from mla_trt.plugins.kernel_library import KernelLibrary

# the C interface, over ops that do nothing
OPS = """#include "call.h"
namespace mla {
%s
}
"""
RUNS = (
    "run_plan",
    "run_fused_rope_rms_norm_quantization",
    "run_decoding",
    "run_prefill",
    "run_prefill_sparse",
    "run_decode_branch_fp8",
    "run_indexer",
    "run_attention",
    "run_sparse_attention",
    "run_input_projections",
    "run_output_projection",
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels that compile in a second, and a cache of its own."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name in ("api.cpp", "api.h", "call.h", "layout.h", "op_table.h"):
        shutil.copy(builder.KERNELS / name, folder / name)
    ops = "\n".join(f"int {name}(Call&) {{ return MLA_OK; }}" for name in RUNS)
    (folder / "ops.cpp").write_text(OPS % ops)
    monkeypatch.setattr(builder, "KERNELS", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def compiled(progress: list[str]) -> list[str]:
    return [text.rpartition(": ")[2] for text in progress if text.startswith("compiled ")]


def run_build(options: BuildOptions | None = None) -> list[str]:
    progress: list[str] = []
    build(options or BuildOptions(kernels_only=True, architectures=("80",)), progress.append)
    return compiled(progress)


def test_only_what_changed_is_compiled_again(sources: Path):
    (sources / "extra.h").write_text("constexpr int extra = 1;\n")
    (sources / "more.cu").write_text('#include "extra.h"\nint more() { return extra; }\n')
    assert sorted(run_build()) == ["api.cpp", "more.cu", "ops.cpp"]
    assert run_build() == []
    os.utime(sources / "ops.cpp")
    assert run_build() == []
    (sources / "extra.h").write_text("constexpr int extra = 2;\n")
    assert run_build() == ["more.cu"]
    (sources / "extra.h").write_text("constexpr int extra = 1;\n")
    assert run_build() == []
    (sources / "call.h").write_text((sources / "call.h").read_text() + "\n")
    assert sorted(run_build()) == ["api.cpp", "ops.cpp"]


def test_libraries_of_other_architectures_are_told_apart(sources: Path):
    run_build()
    found = library.find_library(name=library.KERNELS)
    assert found.architectures == ("sm_80",)
    run_build(BuildOptions(kernels_only=True, architectures=("80", "90a")))
    found = library.find_library(name=library.KERNELS)
    assert found.architectures == ("sm_80", "sm_90a")
    assert found.path == library.default_path(library.KERNELS)
    assert KernelLibrary(found.path).build == f"{mla_trt.__version__} sm_80 sm_90a"


def test_source_that_does_not_compile_is_named_with_the_first_error(sources: Path):
    (sources / "broken.cu").write_text("int broken() { return nothing; }\n")
    with pytest.raises(PluginLibraryError, match=r"^broken\.cu does not compile: .*\"nothing\" is undefined"):
        run_build()
    assert not library.default_path(library.KERNELS).exists()


def test_warnings_are_shown_at_every_build(sources: Path, caplog: pytest.LogCaptureFixture):
    (sources / "warned.cu").write_text("int warned() { int unused; return 0; }\n")
    for expected in (["warned.cu"], []):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = run_build()
        assert [name for name in again if name == "warned.cu"] == expected
        assert any("warned.cu" in message and "unused" in message for message in caplog.messages)


def test_source_that_changes_while_it_is_compiled_is_not_kept(sources: Path, monkeypatch: pytest.MonkeyPatch):
    compile_it = builder._run
    before = (sources / "ops.cpp").read_text()

    def edit_meanwhile(command: list[str], failure: str) -> str:
        said = compile_it(command, failure)
        (sources / "ops.cpp").write_text(before + "// edited\n")
        return said

    with monkeypatch.context() as patch:
        patch.setattr(builder, "_run", edit_meanwhile)
        with pytest.raises(PluginLibraryError, match=r"ops\.cpp or what it includes changed while it was compiled"):
            run_build()
    (sources / "ops.cpp").write_text(before)
    assert "ops.cpp" in run_build()


def test_op_that_nothing_defines_does_not_link(sources: Path):
    text = (sources / "ops.cpp").read_text()
    (sources / "ops.cpp").write_text(text.replace("int run_plan", "int run_nothing"))
    with pytest.raises(PluginLibraryError, match=r"does not link: .*run_plan"):
        run_build()


def test_library_of_another_version_is_refused(sources: Path, monkeypatch: pytest.MonkeyPatch):
    run_build()
    path = library.default_path(library.KERNELS)
    monkeypatch.setattr(mla_trt, "__version__", "9.9.9")
    with pytest.raises(
        PluginLibraryError, match=r"is of mla-trt \d.*, but this is 9\.9\.9: run 'mla-trt plugins build'"
    ):
        library.find_library(path)


def test_library_that_is_not_there_or_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLA_TRT_PLUGINS", raising=False)
    with pytest.raises(PluginLibraryError, match=r"there is no '.*plugins\.so': run 'mla-trt plugins build' first"):
        library.find_library()
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF" + bytes(100))
    monkeypatch.setenv("MLA_TRT_PLUGINS", str(other))
    with pytest.raises(PluginLibraryError, match="is not a library that 'mla-trt plugins build' wrote"):
        library.find_library()
    other.write_bytes(b"")
    with pytest.raises(PluginLibraryError, match="cannot be read"):
        library.find_library()


def test_architectures_are_names_of_nvcc():
    assert parse_architectures("90a,80") == ("80", "90a")
    assert parse_architectures("sm_100a, 8.9 ,80,89") == ("80", "89", "100a")
    for text, message in (("", "is empty"), ("hopper", "is 'hopper'"), ("75", "need sm_80 or newer")):
        with pytest.raises(UsageError, match=message):
            parse_architectures(text)


def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "SYSTEM_TOOLKIT", tmp_path)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    with pytest.raises(PluginLibraryError, match=r"nvcc was not found: .*pip install 'mla-trt\[kernels\]'"):
        toolchain.find_nvcc()
    with pytest.raises(PluginLibraryError, match="there is no such file"):
        toolchain.find_nvcc(tmp_path / "nvcc")


def test_compiler_of_cuda_home_comes_before_that_of_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for folder in ("home/bin", "path", "named"):
        script = tmp_path / folder / "nvcc"
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\necho {folder}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert toolchain.find_nvcc().version == "path"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain.find_nvcc().version == "home/bin"
    assert toolchain.find_nvcc(tmp_path / "named" / "nvcc").version == "named"


def write_headers(folder: Path, major: int, minor: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").write_text("")
    (folder / "NvInferVersion.h").write_text(
        f"#define MAJOR_OF_ALL {major}\n#define NV_TENSORRT_MAJOR MAJOR_OF_ALL //!< major\n"
        f"#define NV_TENSORRT_MINOR {minor} //!< minor\n"
    )
    return folder


def test_headers_are_found_in_order_and_their_version_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    monkeypatch.setattr(toolchain, "TENSORRT_FOLDERS", (tmp_path / "system",))
    with pytest.raises(PluginLibraryError, match="headers were not found: install libnvinfer-headers-dev"):
        toolchain.find_tensorrt_headers()
    write_headers(tmp_path / "system", 10, 6)
    assert toolchain.find_tensorrt_headers().version == (10, 6)
    write_headers(tmp_path / "root" / "include", 11, 1)
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "root"))
    assert toolchain.find_tensorrt_headers().version == (11, 1)
    named = write_headers(tmp_path / "named", 10, 15)
    assert toolchain.find_tensorrt_headers(named).version == (10, 15)
    with pytest.raises(PluginLibraryError, match=r"there is no NvInferRuntime\.h in it"):
        toolchain.find_tensorrt_headers(tmp_path)
    with pytest.raises(PluginLibraryError, match=r"has TensorRT 10\.0, but the plugins need 10\.6 or newer"):
        toolchain.find_tensorrt_headers(write_headers(tmp_path / "old", 10, 0))


def test_command_builds_and_says_where(sources: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    output = tmp_path / "out" / "kernels.so"
    assert main(["plugins", "build", "--kernels-only", "--arch", "80", "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"written: {output} (sm_80)\n"
    assert library.describe(output).version == mla_trt.__version__
    assert main(["plugins", "build", "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err
    assert main(["plugins", "build", "--tensorrt-include", str(tmp_path)]) == 2
    assert "there is no NvInferRuntime.h in it" in capsys.readouterr().err
