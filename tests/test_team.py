"""More than one process, and Weights & Biases for real: read back from what they leave on the disk."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vae_nb.data.dataset import batches
from vae_nb.train.checkpoint import read_header
from vae_nb.train.config import Config
from vae_nb.train.logging import read_metrics

QUICK = ["scenes", "--preset", "demo", "--size", "32", "--latent", "16", "--images", "120", "--batch-size", "16",
         "--lpips", "none", "--device", "cpu", "--precision", "fp32", "--log-every", "1", "--val-fraction", "0.1"]


def start(*command):
    return subprocess.Popen([sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True)


def finish(process, ok=True):
    out, err = process.communicate(timeout=200)
    assert (process.returncode == 0) == ok, out + err
    return out, err


def test_shares_are_the_batch():
    "Every image once, whatever the number of processes; what can't be shared equally is refused before the first step."
    images = torch.arange(96, dtype=torch.uint8)[:, None, None, None].expand(96, 3, 2, 2)
    whole = torch.cat(list(batches(images, torch.arange(96), 24, epoch=1)))
    for size in (2, 3, 4, 8):
        parts = zip(*(list(batches(images, torch.arange(96), 24, epoch=1, share=(rank, size))) for rank in range(size)))
        assert torch.equal(torch.cat([x for part in parts for x in part]), whole)
    for count, batch in ((96, 25), (91, 24)):
        with pytest.raises(ValueError, match="can't share a batch"): batches(images, torch.arange(count), batch, share=(0, 2))
    batches(images, torch.arange(90), 24, drop_last=True, share=(0, 2))


def test_two_processes_then_one_are_the_run_of_one(tmp_path):
    "torchrun with two processes, stopped by SIGTERM, resumed by one: loss curve and weights of a run that one did alone."
    options = [*QUICK, "--epochs", "4", "--wandb", "disabled", "--lr", "1e-4"]
    finish(start("vae_nb", *options, "--out", tmp_path / "one"))
    two = start("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vae_nb", *options, "--accumulate", "2",
                "--out", tmp_path / "two")
    deadline = time.time() + 120
    while two.poll() is None and time.time() < deadline:
        if (tmp_path / "two/metrics.jsonl").exists() and len(read_metrics(tmp_path / "two")) >= 5: break
        time.sleep(0.05)
    two.send_signal(signal.SIGTERM)
    said = "".join(finish(two, ok=False))
    stopped = int(read_header(tmp_path / "two/checkpoint.safetensors")["step"])
    rows = [row["step"] for row in read_metrics(tmp_path / "two") if "lr" in row]
    assert 5 <= stopped < 24 and rows == list(range(1, stopped + 1)), said   # process 0 alone writes
    assert "shared by 2 processes" in said and said.count("implied Laplace scale") == 1
    finish(start("vae_nb", "--resume", "--out", tmp_path / "two"))
    curves = [{row["step"]: row for row in read_metrics(tmp_path / name) if "lr" in row} for name in ("one", "two")]
    assert curves[0].keys() == curves[1].keys()
    apart = max(abs(curves[0][step][name] - curves[1][step][name]) / curves[0][step][name]
                for step in curves[0] for name in ("loss", "l1", "kl"))
    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    distance, length = (sum(((one[name] - scale * other[name]) ** 2).sum() for name in one if name.startswith("model.")) ** 0.5
                        for scale in (1, 0))
    # 32-bit sums in another order leave gradients 1e-6 apart, and 24 steps let that grow a little; with --lr 1e-4, since larger
    # steps amplify it (each update is a gradient divided by its size)
    assert apart < 1e-5 and distance / length < 1e-5, (apart, float(distance / length))
    print(f"stopped after {stopped}; losses {apart:.1e} apart, weights {float(distance / length):.1e}")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    three = start("torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "vae_nb", *QUICK, "--wandb", "disabled",
                  "--out", tmp_path / "three")
    assert "3 processes can't share a batch of 16 images equally" in "".join(finish(three, ok=False))


# --- Weights & Biases --------------------------------------------------------------------------------------------

def records(file):
    "The records of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB (CRC, length, type, bytes)."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, parts = Path(file).read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        parts.append(data[at + 7:at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def test_wandb_goes_on_with_the_same_run_and_keeps_checkpoints_and_the_load_of_the_machine(tmp_path, monkeypatch):
    "A killed offline run and its resumption have one id; artifacts and system metrics stand in W&B's own file."
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.2")
    process = start("vae_nb", *QUICK, "--epochs", "3", "--wandb", "offline", "--artifacts", "--out", tmp_path / "run")
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if (tmp_path / "run/checkpoint.safetensors").exists() and len(read_metrics(tmp_path / "run")) >= 8: break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)   # W&B's own process dies, too
    process.communicate()
    finish(start("vae_nb", "--resume", "--out", tmp_path / "run"))
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    ids, steps, load, artifacts = set(), [], set(), []
    for file in files:
        for record in records(file):
            if record.HasField("run"): ids.add(record.run.run_id)
            if record.HasField("stats"): load |= {item.key for item in record.stats.item}
            if record.HasField("artifact"): artifacts.append({entry.path for entry in record.artifact.manifest.contents})
            if record.HasField("request") and record.request.HasField("log_artifact"):
                artifacts.append({entry.path for entry in record.request.log_artifact.artifact.manifest.contents})
            if record.HasField("history") and file == files[-1]: steps.append(record.history.step.num)
    assert ids == {json.loads((tmp_path / "run/config.json").read_text())["wandb_id"]}
    assert any("cpu" in key for key in load) and any("memory" in key for key in load), load
    assert {"best.safetensors", "checkpoint.safetensors", "model.safetensors"} in artifacts, artifacts
    assert max(steps) == int(read_header(tmp_path / "run/checkpoint.safetensors")["step"])


def test_the_sweep_names_options_that_exist_and_its_command_runs(root, tmp_path):
    "What an agent would start, with the values it would give; the run has the id that the sweep gave."
    yaml = pytest.importorskip("yaml")
    sweep = yaml.safe_load((root / "nbs/train/sweep.yaml").read_text())
    assert sweep["parameters"].keys() == {"beta", "latent"} <= Config.__dataclass_fields__.keys()
    for name, grid in sweep["parameters"].items():
        for value in grid["values"]: Config(**{name: value})
    chosen = [f"--{name}={grid['values'][0]}" for name, grid in sweep["parameters"].items()]
    smaller = ["--size=32", "--images=40", "--epochs=1", "--batch-size=8", "--lpips=none", "--wandb=offline", "--device=cpu"]
    command = [part for item in sweep["command"] for part in {"${env}": ["env"], "${args}": chosen + smaller}.get(item, [item])]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          env=dict(os.environ, PATH=path, WANDB_RUN_ID="sweep0001", OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "runs/sweep/sweep0001/config.json").read_text())["config"]
    assert config["beta"] == sweep["parameters"]["beta"]["values"][0] and config["latent"] == "16"
    assert list((tmp_path / "runs/sweep/sweep0001/wandb").glob("offline-run-*-sweep0001")) and shutil.which("sh")
