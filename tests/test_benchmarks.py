"""What benchmarks/xmag.py does before torch sees the machine."""

import os
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "xmag.py"


@pytest.mark.parametrize(
    ("arguments", "hidden"),
    [
        (["--device", "cpu"], True),
        (["--device=cpu"], True),
        (["a.svs", "--device=cpu", "--repeats", "1"], True),
        (["--device=cuda"], False),
        (["--device"], False),
        ([], False),
    ],
)
def test_the_cpu_is_taken_however_the_device_is_spelt(
    arguments: list[str], hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both spellings of argparse; an option without its value is left for argparse to refuse."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "argv", [str(SOURCE), *arguments])
    before, mark, _ = SOURCE.read_text().partition("\nimport numpy")
    exec(compile(before, str(SOURCE), "exec"), {"__name__": "xmag"})
    assert mark and os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0")
