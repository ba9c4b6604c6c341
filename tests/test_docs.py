"""What the documentation shows can be typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_import_in_the_documentation_works() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = {
        line
        for page in pages
        for line in re.findall(
            r"^\s*(?:>>> )?((?:from twotower[\w.]* import|import twotower)[^\n(#]*)",
            page.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    assert len(lines) > 5
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(sorted(lines))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
