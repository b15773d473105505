"""Nothing is lost: processes killed at random moments, full disks, vanished files, failing services, a NaN loss."""
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vae_nb import checkpoint, run, track
from vae_nb.checkpoint import load_state, read_header
from vae_nb.track import read_metrics

TINY = dict(preset="demo", size=32, latent="16", images=120, batch_size=16, lpips="none", device="cpu", log_every=1,
            val_fraction=0.1, wandb="disabled")


def train(out, resume=False, source="scenes", **options):
    run.train_run(str(source), out, resume, False, dict(TINY, **options))


# --- SIGKILL -----------------------------------------------------------------------------------------------------
# A process that has imported everything forks children that train. Each is killed, by itself at a chosen place or from outside
# at a random time, and the next one resumes, until one comes through.

NURSERY = """
import json, os, signal, sys, time, traceback
import torch
from pathlib import Path
from vae_nb import cache as caches, checkpoint, data, run

torch.set_num_threads(1)
calls = 0

def deadly(module, name, at):
    "The at-th call of a function is the last thing that the process does."
    inner = getattr(module, name)
    def outer(*args, **kwargs):
        global calls
        calls += 1
        if calls == at: os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)
    setattr(module, name, outer)

places = dict(decode=(data, "decode"), settle=(caches, "_settle"), rename=(os, "replace"), flush=(os, "fsync"), link=(os, "link"),
              save=(checkpoint, "save_file"), clip=(torch.nn.utils, "clip_grad_norm_"), lerp=(torch, "_foreach_lerp_"),
              adam=(torch.optim.AdamW, "step"), backward=(torch.Tensor, "backward"), set_up=(run, "set_up"),
              validate=(run, "validate"))

for line in sys.stdin:
    out, cache, place, at, options = json.loads(line)
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        sys.stderr = open(out + ".log", "a")
        os.environ["VAE_NB_CACHE"] = cache
        if place in places: deadly(*places[place], int(at))
        try: run.train_run(sys.argv[1], Path(out), True, False, options)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if place == "after":
        time.sleep(float(at))
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    "Trains in children of one process; tells how each ended."
    def __init__(self, source):
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY, str(source)], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))

    def __call__(self, out, place="", at=0, **options):
        "True if the child came through, False if it was killed."
        print(json.dumps([str(out), f"{out}-cache", place, at, dict(TINY, **options)]), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), out.with_name(f"{out.name}.log").read_text()
        return status == 0

    def __enter__(self): return self
    def __exit__(self, *error): self.process.stdin.close(), self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A folder of sixty noisy pictures."
    from PIL import Image
    folder = tmp_path_factory.mktemp("pictures")
    noise = torch.Generator().manual_seed(0)
    for i in range(60):
        pixels = torch.randint(0, 256, (4, 4, 3), generator=noise, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"{i:03d}.png")
    return folder


def same(a, b):
    "Two checkpoints hold the same bits: weights, average, moments, counters."
    first, second = load_file(a / "checkpoint.safetensors"), load_file(b / "checkpoint.safetensors")
    assert first.keys() == second.keys() and any(name.endswith("exp_avg_sq") for name in first)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    headers = [{k: v for k, v in read_header(f / "checkpoint.safetensors").items() if k in ("step", "best")} for f in (a, b)]
    best = [read_header(f / "best.safetensors")["step"] for f in (a, b)]
    rows = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(f)] for f in (a, b)]
    assert not different and headers[0] == headers[1] and best[0] == best[1], (different[:3], headers, best)
    assert rows[0] == rows[1]   # the log, too: nothing twice, nothing missing
    assert not list(b.glob(".*")), "a killed writer's file was left"


QUICK = [("decode", 17), ("backward", 5), ("save", 4), ("lerp", 1), ("link", 1)]
FULL = [("decode", 1), ("decode", 40), ("settle", 1), ("set_up", 1), ("validate", 1), ("flush", 1), ("rename", 2), ("save", 1)]


def kill_and_compare(tmp_path, pictures, kills, **options):
    "A run in peace, and one that is killed again and again; where each of them died."
    options = dict(dict(epochs=4, checkpoint_every=2, picture_every=1000), **options)
    with Nursery(pictures) as child:
        assert child(tmp_path / "peace", **options)
        died = [(place, at) for place, at in kills if not child(tmp_path / "killed", place, at, **options)]
        assert child(tmp_path / "killed", **options)
    same(tmp_path / "peace", tmp_path / "killed")
    return died


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, pictures):
    "While it caches images, in a backward pass, while a checkpoint is written, before the average, between best and last."
    assert kill_and_compare(tmp_path, pictures, QUICK) == QUICK


@pytest.mark.slow
def test_twenty_kills(tmp_path, pictures):
    "Eight chosen places, then at least twelve moments by the clock."
    chance = random.Random()
    clock = [("after", round(chance.uniform(0.05, 0.8), 3)) for _ in range(16)]
    died = kill_and_compare(tmp_path, pictures, FULL + clock, epochs=60)
    print(len(died), "kills:", died)
    assert len(died) >= 20


# --- what else can go wrong --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    "A run that nothing happened to; the others share its cache."
    folder = tmp_path_factory.mktemp("peace")
    os.environ["VAE_NB_CACHE"] = str(folder / "cache")
    train(folder / "run", epochs=2)
    yield folder / "run"
    del os.environ["VAE_NB_CACHE"]


def weights(folder):
    tensors = load_file(folder / "checkpoint.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith(("model.", "ema."))}


def equal(a, b): return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def spoil(monkeypatch, steps):
    "The KL of every run is NaN in certain steps (counted from 1)."
    make = run.make_objective

    def make_spoilt(config):
        objective, calls = make(config), []
        inner = objective.forward

        def forward(*args):
            terms = inner(*args)
            if not torch.is_grad_enabled(): return terms
            calls.append(1)
            nan = float("nan") if len(calls) in steps else 1
            return dict(terms, kl=terms["kl"] * nan, loss=terms["loss"] * nan)
        objective.forward = forward
        return objective
    monkeypatch.setattr(run, "make_objective", make_spoilt)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tmp_path, peace, monkeypatch):
    spoil(monkeypatch, {3, 4})
    train(tmp_path / "run", epochs=2)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run") if "lr" in row}
    assert [step for step, row in rows.items() if row.get("skipped")] == [3, 4] and len(rows) == len(
        [row for row in read_metrics(peace) if "lr" in row])
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values()) and not equal(peace, tmp_path / "run")
    assert read_header(tmp_path / "run/checkpoint.safetensors")["step"] == read_header(peace / "checkpoint.safetensors")["step"]


def test_a_run_without_a_finite_loss_stops_names_the_term_and_leaves_the_last_good_checkpoint(tmp_path, peace, monkeypatch):
    spoil(monkeypatch, set(range(5, 100)))
    with pytest.raises(FloatingPointError, match=r"no finite loss in the last 3 steps, up to step 7: kl is not finite"):
        train(tmp_path / "run", epochs=2, give_up=3, checkpoint_every=1)
    state = load_state(tmp_path / "run/checkpoint.safetensors")
    assert state.step == 4 and state.lost == 0 and all(p.isfinite().all() for p in state.model.parameters())
    monkeypatch.undo()
    os.environ["VAE_NB_CACHE"] = str(peace.parent / "cache")
    train(tmp_path / "run", resume=True, source="", checkpoint_every=500)   # and goes on as if nothing had been
    assert equal(peace, tmp_path / "run")


def full(path, *args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_takes_no_epoch(tmp_path, peace, monkeypatch, capsys):
    "The first checkpoint cannot be written, nor rows for a while: the run says so once, goes on, and the next one is there."
    inner, calls = checkpoint.save_file, []

    def save(tensors, path, header):
        calls.append(path)
        if len(calls) < 3: full(path)
        inner(tensors, path, header)
    monkeypatch.setattr(checkpoint, "save_file", save)
    train(tmp_path / "run", epochs=2, checkpoint_every=2)
    said = capsys.readouterr().err
    assert said.count("No space left") == 1 and "checkpoint" in said and equal(peace, tmp_path / "run")


def test_a_disk_that_stays_full_leaves_the_result_elsewhere(tmp_path, peace, monkeypatch):
    "Even the last checkpoint does not fit: it goes to the folder for temporary files, and the error says so."
    inner = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path, header:
                        full(path) if "rescue" not in str(path) else inner(tensors, path, header))
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="is in .*rescue.* instead: make room"): train(tmp_path / "run", epochs=2)
    rescue, = tmp_path.glob("vae_nb-rescue-*")
    assert equal(peace, rescue) and (rescue / "model.safetensors").exists()


def test_a_file_that_grows_too_large_for_its_disk(tmp_path):
    "A real failure of the system call, within safetensors: an OSError that names the file, and the old file stays."
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.write_safely(path, lambda temporary: save_file(dict(x=torch.zeros(10)), temporary))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="x.safetensors could not be written .*File too large"):
            checkpoint.write_safely(path, lambda temporary: save_file(dict(x=torch.zeros(100_000)), temporary))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["x"].shape == (10,)


def test_an_unwritable_folder_is_one_clear_line_before_anything_happens(tmp_path, peace):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; --out needs a folder"): train(tmp_path / "file" / "run", epochs=1)
    with pytest.raises(OSError, match="/proc/nowhere"): train(Path("/proc/nowhere"), epochs=1)


def test_images_that_vanish_while_they_are_used(tmp_path, peace, pictures, monkeypatch):
    "Decoded images stay mapped when their file is deleted; a resumed run wants the same images, or says that they have changed."
    from shutil import copytree, rmtree
    source, (first, second) = copytree(pictures, tmp_path / "pictures"), (tmp_path / "first", tmp_path / "second")
    monkeypatch.setenv("VAE_NB_CACHE", str(tmp_path / "cache"))
    train(first, source=source, epochs=2)
    inner = run.validate

    def validate(*args):
        rmtree(tmp_path / "cache", ignore_errors=True)
        (source / "007.png").unlink(missing_ok=True)
        return inner(*args)
    monkeypatch.setattr(run, "validate", validate)
    train(second, source=source, epochs=2)
    assert equal(first, second)
    with pytest.raises(ValueError, match="the images have changed since the run began .60 then, 59 now"):
        train(second, source="", resume=True, epochs=3)
    rmtree(source)
    with pytest.raises(ValueError, match="no such file or folder"): train(second, source="", resume=True, epochs=3)
    assert equal(first, second)


def test_wandb_that_fails_is_mentioned_once(tmp_path, peace, monkeypatch, capsys):
    "Every call fails from the third on, the last one too: the run ends like any other."
    class Failing(track.NoWandb):
        calls = 0

        def log(self, row, step=None):
            Failing.calls += 1
            if Failing.calls > 2: raise ConnectionError("the service has gone")

        def finish(self): raise TimeoutError("still gone")
    monkeypatch.setattr(track, "start_wandb", lambda *_: Failing())
    train(tmp_path / "run", epochs=2)
    said = capsys.readouterr().err
    assert Failing.calls > 4 and said.count("the service has gone") == 1 and equal(peace, tmp_path / "run")


# --- what may be read --------------------------------------------------------------------------------------------

def test_foreign_old_and_damaged_checkpoints_are_refused_by_name(tmp_path, peace):
    path, good = tmp_path / "checkpoint.safetensors", (peace / "checkpoint.safetensors").read_bytes()
    header, tensors = read_header(peace / "checkpoint.safetensors"), load_file(peace / "checkpoint.safetensors")
    old, new = (dict(header, format=f"vae_nb checkpoint {version}") for version in (1, 3))
    half = {name: value for name, value in tensors.items() if not name.startswith("ema.")}
    for write, text in ((lambda: path.write_bytes(good[:-100]), "damaged"), (lambda: path.write_bytes(b""), "damaged"),
                        (lambda: save_file(tensors, path, old), "format 1.*reads format 2"),
                        (lambda: save_file(tensors, path, new), "format 3.*reads format 2"),
                        (lambda: save_file(tensors, path, {}), "calls itself 'nothing'"),
                        (lambda: save_file(half, path, header), "does not hold this model")):
        path.unlink(missing_ok=True)
        write()
        with pytest.raises(ValueError, match=f"checkpoint.safetensors.*{text}"): load_state(path)


def test_nothing_here_reads_pickles(root):
    "No module of the library loads a pickle; the trunk of LPIPS is read as weights only."
    for path in (root / "vae_nb").glob("*.py"):
        code = path.read_text()
        assert "import pickle" not in code and "allow_pickle=True" not in code
        assert all("weights_only=True" in line for line in code.splitlines() if "torch.load(" in line), path.name
