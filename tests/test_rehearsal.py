"The command for a GPU, rehearsed on a CPU with tiny sizes: every part runs, and every file is written."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    "What it printed, its exit status, the folder of its records and that of its runs."
    out, runs = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("runs")
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--seconds", "1500", "--out", out, "--runs", runs]
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True)
    return done, out, runs


def test_every_part_ends_well(rehearsal):
    done, _, _ = rehearsal
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("card", "matrix", "runs", "lpips", "tests"): assert f"---- {part}: " in done.stdout
    lines = [line for line in done.stdout.splitlines() if "Error" in line and "pythae" not in line]   # it may not be installed
    assert not lines, "\n".join(lines)


def test_every_record_is_written(rehearsal):
    _, out, _ = rehearsal
    names = {path.name for path in out.iterdir()}
    records = {f"{name}_cpu_rehearsal.json" for name in ("card", "step_matrix", "reference_run")}
    assert records | {"runs.tar.00"} <= names
    matrix = json.loads((out / "step_matrix_cpu_rehearsal.json").read_text())
    assert all("error" not in row for row in matrix["rows"] + matrix["rivals"] if row.get("name") != "pythae")
    assert set(matrix["curves"]) == {"ordinary", "recorded", "compiled recorded"}


def test_the_reference_run_was_stopped_and_resumed(rehearsal):
    _, out, runs = rehearsal
    stopped = json.loads((out / "reference_run_cpu_rehearsal.json").read_text())["stopped_at"]
    steps = [json.loads(line)["step"] for line in (runs / "default" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < stopped < steps[-1] and (runs / "default" / "summary.json").is_file()
