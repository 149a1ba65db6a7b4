"""What the benchmarks share: turns in both orders, ratios within a turn, tables and JSON that say the
same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "run_scripts"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmark"))
    import harness as module

    yield module
    sys.modules.pop("harness")


def test_contenders_run_in_turn_and_in_both_orders(harness: ModuleType) -> None:
    calls: list[str] = []
    seconds = harness.race(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=4, inner=2
    )
    rounds = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    # one round more than is counted, which is not
    assert len(rounds) == 5 and set(rounds) == {"aabb", "bbaa"}
    assert rounds[1:].count("aabb") == 2
    assert {len(values) for values in seconds.values()} == {4} and min(seconds["a"]) > 0


def test_a_ratio_is_the_median_of_those_within_a_turn(harness: ModuleType) -> None:
    case = harness.Case(
        "x", {harness.OURS: [1.0, 10.0, 3.0], "peer": [2.0, 10.0, 30.0]}, limit=0.5, limited_by="memory"
    )
    assert case.ratio("peer") == 0.5 and case.median() == 3.0
    data = case.to_dict()
    assert data["contenders"]["peer"]["ratio_of_ours"] == 0.5 and data["limit"][
        "share_reached"
    ] == pytest.approx(1 / 6)


def test_the_table_and_the_json_of_a_part(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    case = harness.Case("some layer", {harness.OURS: [0.002] * 5, "peer": [0.004] * 5}, 0.001, "arithmetic")
    size = harness.Case("its file", {harness.OURS: [2e6]}, unit="B")
    harness.report("part", "A title", [case, size], ["a note"], argparse.Namespace(out=tmp_path, repeats=5))
    text = (tmp_path / "part.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| some layer | 2.0 ms | 4.0 ms (0.5) | 1.0 ms, arithmetic | 50% |" in text and "a note" in text
    assert "| its file | 2.0 MB | - | - | - |" in text and harness.machine()["processor"] in text
    data = json.loads((tmp_path / "part.json").read_text())
    assert (
        data["cases"][0]["contenders"]["peer"]["all"] == [0.004] * 5 and data["machine"] == harness.machine()
    )


def test_a_fresh_process_answers_in_json_or_its_error_is_shown(harness: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import sys\nprint('chatter')\nprint('{\"n\": %d}' % (int(sys.argv[1]) + 1))")
    assert harness.run_fresh(script, 4) == {"n": 5}
    with pytest.raises(RuntimeError, match="invalid literal"):
        harness.run_fresh(script, "four")


def test_a_limit_is_the_slower_of_arithmetic_and_memory(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "flops_per_second", lambda: 100.0)
    monkeypatch.setattr(harness, "bytes_per_second", lambda: 10.0)
    assert harness.roofline(500, 20) == (5.0, "arithmetic") and harness.roofline(500, 80) == (8.0, "memory")


def test_a_part_that_there_is_not() -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "benchmark.sh"), "kmeans", "kmean"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "benchmark: no part 'kmean'; parts: kmeans compress"
    )
