"""The C source beside a double loop in C, under the sanitizers."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from twotower.retrieval.scan import native

CHECK = Path(__file__).with_name("scan_check.c")


@pytest.mark.parametrize(
    "sanitizers", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_no_sanitizer_has_a_complaint(sanitizers: str, tmp_path: Path) -> None:
    program = tmp_path / "check"
    flags = [
        "-std=c11",
        "-O1",
        "-g",
        "-ffp-contract=off",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    checks = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run(["cc", *flags, *checks, "-o", program, CHECK, "-lm"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_levels_have_names() -> None:
    assert native.level_name(0) == "plain C"
    assert native.level_name(native.level()) in {
        *("plain C", "AVX2", "AVX-512 VNNI", "AMX int8", "NEON dot product")
    }
    if platform.machine() in {"x86_64", "AMD64"}:
        assert native.level_name(native.AMX) == "AMX int8"
