"""Nothing is lost: processes killed at random moments, full disks, vanished files, failing services, a NaN loss."""
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vae_nb.train import checkpoint, loop, run
from vae_nb.train import logging as track
from vae_nb.train.checkpoint import load_state, read_header
from vae_nb.train.logging import read_metrics

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
from vae_nb.data import dataset as data
from vae_nb.train import checkpoint, loop, run

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

places = dict(decode=(data, "decode"), settle=(Path, "rename"), rename=(os, "replace"), flush=(os, "fsync"),
              best=(checkpoint, "save_state"), save=(checkpoint, "save"), clip=(torch.nn.utils, "clip_grad_norm_"),
              lerp=(torch, "_foreach_lerp_"), folder=(run, "_begin_folder"),
              adam=(torch.optim.AdamW, "step"), backward=(torch.Tensor, "backward"), validate=(loop, "validate"))

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
    assert not list(b.glob(".*.tmp")), "a killed writer's file was left"


QUICK = [("decode", 17), ("backward", 5), ("save", 4), ("lerp", 1), ("best", 2)]
FULL = [("decode", 1), ("decode", 40), ("settle", 1), ("folder", 1), ("validate", 1), ("flush", 1), ("rename", 2), ("save", 1)]


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


def test_what_other_commands_leave_in_a_run_goes_with_it(tmp_path, peace):
    "A fitted prior and an evaluation are a run's own files: --overwrite removes them, and does not refuse."
    shutil.copytree(peace, tmp_path / "run")
    for name in ("prior.safetensors", "evaluation.json", "card.png"): (tmp_path / "run" / name).write_text("old")
    run.check_folder(tmp_path / "run", resume=False, overwrite=True)
    (tmp_path / "run/mine.txt").write_text("not a run's")
    with pytest.raises(ValueError, match="mine.txt"): run.check_folder(tmp_path / "run", resume=False, overwrite=True)


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
        train(tmp_path / "run", epochs=2, max_nonfinite_steps=3, checkpoint_every=1)
    state = load_state(tmp_path / "run/checkpoint.safetensors")
    assert state.step == 4 and state.nonfinite_steps == 0 and all(p.isfinite().all() for p in state.model.parameters())
    monkeypatch.undo()
    os.environ["VAE_NB_CACHE"] = str(peace.parent / "cache")
    train(tmp_path / "run", resume=True, source="", checkpoint_every=500)   # and goes on as if nothing had been
    assert equal(peace, tmp_path / "run")


def full(path, *args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_takes_no_epoch(tmp_path, peace, monkeypatch, capsys):
    "The first checkpoint cannot be written, nor rows for a while: the run says so once, goes on, and the next one is there."
    inner, calls = checkpoint.atomic_write, []

    def write(path, content):
        calls.append(path)
        if len(calls) < 3: full(path)
        inner(path, content)
    monkeypatch.setattr(checkpoint, "atomic_write", write)
    train(tmp_path / "run", epochs=2, checkpoint_every=2)
    said = capsys.readouterr().err
    assert said.count("No space left") == 2 and "checkpoint of step 2" in said and "checkpoint of step 4" in said   # each one
    assert equal(peace, tmp_path / "run")


def test_a_disk_that_stays_full_is_an_error_and_what_was_there_stays(tmp_path, peace, monkeypatch):
    monkeypatch.setattr(checkpoint, "atomic_write", full)
    with pytest.raises(OSError, match="No space left"): train(tmp_path / "run", epochs=2)
    monkeypatch.undo()
    os.environ["VAE_NB_CACHE"] = str(peace.parent / "cache")
    again(tmp_path / "run", overwrite=True)
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "atomic_write", full)
    with pytest.raises(OSError, match="No space left"): train(tmp_path / "run", epochs=2, resume=True)
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before


def test_a_file_that_grows_too_large_for_its_disk(tmp_path):
    "A real failure of the system call: an OSError that names the file, and the old file stays."
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint._write_tensors(path, dict(x=torch.zeros(10)), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="x.safetensors could not be written .*File too large"):
            checkpoint._write_tensors(path, dict(x=torch.zeros(100_000)), {})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["x"].shape == (10,)


def test_windows_flushes_only_what_is_open_for_writing(tmp_path, monkeypatch):
    fcntl, inner = pytest.importorskip("fcntl"), os.fsync

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY: raise OSError(errno.EBADF, "Bad file descriptor")
        inner(number)
    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.atomic_write(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_an_unwritable_folder_is_one_clear_line_before_anything_happens(tmp_path, peace):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; a run .--out. needs a folder"):
        train(tmp_path / "file" / "run", epochs=1)
    with pytest.raises(OSError, match="/proc/nowhere"): train(Path("/proc/nowhere"), epochs=1)


def test_images_that_vanish_while_they_are_used(tmp_path, peace, pictures, monkeypatch):
    "Decoded images stay mapped when their file is deleted; a resumed run wants the same images, or says that they have changed."
    source, (first, second) = shutil.copytree(pictures, tmp_path / "pictures"), (tmp_path / "first", tmp_path / "second")
    monkeypatch.setenv("VAE_NB_CACHE", str(tmp_path / "cache"))
    train(first, source=source, epochs=2)
    inner = loop.validate

    def validate(*args):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (source / "007.png").unlink(missing_ok=True)
        return inner(*args)
    monkeypatch.setattr(loop, "validate", validate)
    train(second, source=source, epochs=2)
    assert equal(first, second)
    with pytest.raises(ValueError, match="the images have changed since the run began .60 then, 59 now"):
        train(second, source="", resume=True, epochs=3)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="no such file or folder"): train(second, source="", resume=True, epochs=3)
    assert equal(first, second)


def test_wandb_that_fails_is_mentioned_once(tmp_path, peace, monkeypatch, capsys):
    "Every call fails from the third on, the last one too: the run ends like any other."
    class Failing:
        calls, summary = 0, {}

        def log(self, row, step=None):
            Failing.calls += 1
            if Failing.calls > 2: raise ConnectionError("the service has gone")

        def finish(self, exit_code=0): raise TimeoutError("still gone")
    monkeypatch.setattr(track, "_start_wandb", lambda *_: Failing())
    train(tmp_path / "run", epochs=2)
    said = capsys.readouterr().err
    assert Failing.calls > 4 and said.count("the service has gone") == 1 and equal(peace, tmp_path / "run")


# --- a folder is somebody's --------------------------------------------------------------------------------------

def files(folder):
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    there.pop(".lock", None)
    return there


def again(out, resume=False, overwrite=False, source="scenes", **options):
    run.train_run(str(source), out, resume, overwrite, dict(TINY, **{"epochs": 1, **options}))


@pytest.mark.parametrize("name, text", [("config.json", "{}"), ("config.json", '{"source": "theirs", "version": 3}'),
                                        ("thesis.txt", "three years"), (".env.local.2024", "key"), ("wandb/x", "theirs")])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    before = files(tmp_path)
    for how in (dict(resume=True), dict(overwrite=True), {}):
        expected = f"left alone.*{name}" if how and name != "wandb/x" else "left alone" if how else "not empty"
        with pytest.raises(ValueError, match=expected): again(tmp_path, **how)
    assert files(tmp_path) == before


@pytest.fixture(scope="module")
def old(peace, tmp_path_factory):
    "A run of one epoch to be copied."
    again(tmp_path_factory.mktemp("old") / "run")
    return next(tmp_path_factory.getbasetemp().glob("old*/run"))


@pytest.mark.parametrize("given, said", [(dict(preset="huge"), "preset: expected"), (dict(latent="4x3x3"), "latent: expected"),
                                         (dict(source="nowhere"), "no such file or folder")])
def test_what_is_wrong_with_the_options_is_said_before_the_folder_is_looked_at(old, given, said):
    before = files(old)
    with pytest.raises(ValueError, match=said): again(old, **given)
    assert files(old) == before


def test_what_comes_next_is_said_of_the_images_that_were_trained_on():
    said = {source: "\n".join(run._where(Path("runs/a b"), source)) for source in ("scenes", "/my pictures")}
    assert all("vae-sample 'runs/a b' --n 64" in text for text in said.values())
    assert "vae-train FOLDER_OF_IMAGES" in said["scenes"] and "vae-train" not in said["/my pictures"]
    assert "vae-reconstruct 'runs/a b' '/my pictures' --out" in said["/my pictures"]


def test_a_run_that_cannot_begin_takes_nothing_with_it(tmp_path, old, monkeypatch):
    "W&B wants a login: the old run is as it was, be it overwritten or resumed; and a new folder is not left behind."
    folder = shutil.copytree(old, tmp_path / "run")

    def no_login(*args): raise ValueError("W&B can't start")
    monkeypatch.setattr(track, "_start_wandb", no_login)
    before = files(folder)
    for out, how in ((folder, dict(overwrite=True)), (tmp_path / "new", {})):
        with pytest.raises(ValueError, match="W&B can't start"): again(out, seed=1, **how)
    with pytest.raises(ValueError, match="W&B can't start"): train(folder, resume=True, epochs=3, wandb="online")
    assert files(folder) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_old_run_is_there_until_the_new_one_has_done_a_step(tmp_path, old, monkeypatch):
    "The first step may fail: the old run is as it was."
    folder = shutil.copytree(old, tmp_path / "run")
    before = files(folder)

    def no_memory(*args, **kwargs): raise MemoryError("out of memory")
    monkeypatch.setattr(loop, "step", no_memory)
    for how in (dict(overwrite=True, seed=1), dict(resume=True, epochs=3)):
        with pytest.raises(MemoryError): again(folder, **how)
    with pytest.raises(MemoryError): again(tmp_path / "new")
    assert files(folder) == before and not (tmp_path / "new").exists()
    monkeypatch.undo()


def test_a_folder_has_one_run_at_a_time(tmp_path, old):
    folder = shutil.copytree(old, tmp_path / "run")
    with run._lock_folder(folder):
        for how in (dict(overwrite=True), dict(resume=True, epochs=3)):
            with pytest.raises(ValueError, match="another process is training in .*run: wait for it, or"): again(folder, **how)
    assert equal(old, folder)


def test_images_of_the_run_itself_are_no_source(tmp_path, old):
    folder = shutil.copytree(old, tmp_path / "run")
    before = files(folder)
    with pytest.raises(ValueError, match="the images are in .*run, the folder of the run"):
        again(folder, overwrite=True, source=folder / "pictures")
    assert files(folder) == before


def test_a_closed_terminal_ends_a_run_politely_and_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        for handler, expected in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with run._StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop() == expected
    finally: signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("stream", [None, "/dev/full"])
def test_a_bar_that_nobody_sees_ends_no_run(tmp_path, old, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream and open(stream, "w", buffering=1))
    again(tmp_path / "run")
    monkeypatch.undo()
    assert equal(old, tmp_path / "run")


def test_overwriting_replaces_what_a_run_writes_and_names_what_it_does_not(tmp_path, old):
    "Also behind a link; and what a resumed run writes replaces no other file."
    folder = shutil.copytree(old, tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    for name in ("pictures/samples-0000001.png", ".config.json.tmp"): (folder / name).write_text("of the old run")
    for name in ("thesis.txt", "pictures/mine.png", ".notes.txt.1", "pictures/.samples.png.4711"):
        (folder / name).write_text("three years")
        with pytest.raises(ValueError, match=f"left alone.*{name}"): again(tmp_path / "link", overwrite=True, seed=1)
        assert (folder / name).read_text() == "three years" and equal(old, folder)
        (folder / name).unlink()
    again(tmp_path / "link", overwrite=True, seed=1)
    assert not equal(old, folder) and files(folder).keys() == files(old).keys()
    for name in ("checkpoint", "best", "model"): (folder / f"{name}.safetensors").unlink()
    again(folder, resume=True)   # begins
    assert equal(old, folder)
    (folder / "thesis.txt").write_text("three years")
    again(folder, resume=True, epochs=2)
    assert (folder / "thesis.txt").exists()


def test_a_finished_run_is_left_as_it_is(tmp_path, peace, old, capsys):
    folder = shutil.copytree(old, tmp_path / "run")
    before = files(folder)
    train(folder, resume=True, source="", epochs=1)
    assert files(folder) == before and "is finished: 6 steps" in capsys.readouterr().out
    for name in ("summary.json", "model.safetensors"):   # killed at the very end; lost by somebody
        (folder / name).unlink()
        train(folder, resume=True, source="", epochs=1)
        assert json.loads((folder / "summary.json").read_text())["step"] == 6 and equal(old, folder)
    longer = shutil.copytree(peace, tmp_path / "longer")
    (longer / "summary.json").unlink()
    with pytest.raises(ValueError, match="--epochs 1: these are 6 steps, and 12 have been done already"):
        train(longer, resume=True, source="", epochs=1)


def test_more_epochs_survive_a_kill_before_the_next_checkpoint(tmp_path, old):
    "What a resumed run was asked for is in its config.json, before the checkpoint has heard of it."
    facts = json.loads((old / "config.json").read_text())
    folder = shutil.copytree(old, tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(dict(facts, config=dict(facts["config"], epochs=9))))
    for given in ({}, dict(epochs=9)): assert run._begin("", folder, True, given)[0].config.epochs == 9


def test_a_resumed_run_keeps_its_loss(tmp_path, old):
    "auto means what the machine has: another machine, another loss. Other words for the same loss are no matter."
    facts = json.loads((old / "config.json").read_text())
    folder = shutil.copytree(old, tmp_path / "run")
    was = dict(facts, loss=dict(facts["loss"], lpips="alex", backbone="0123"), objective=["in other words"])
    (folder / "config.json").write_text(json.dumps(was))
    with pytest.raises(ValueError, match="began with another loss: lpips was 'alex' and is 'none'"):
        train(folder, resume=True, epochs=2)
    assert json.loads((folder / "config.json").read_text()) == was
    (folder / "config.json").write_text(json.dumps(dict(was, loss=facts["loss"])))
    train(folder, resume=True, epochs=2)


def test_weights_of_lpips_are_known_by_what_they_are(tmp_path):
    "The same weights in another file are the same loss, other weights in a file of the same name are not."
    from vae_nb.loss.lpips import load_backbone
    state = {name: value for name, value in load_backbone("squeeze", "random")[0].named_buffers()}
    def facts(folder, scale):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / f"w{len(folder)}.pth"
        torch.save({f"features.{name}": value * scale for name, value in state.items()}, path)
        return run._loss_facts(run.make_objective(run.recipe("demo", lpips="squeeze", backbone=str(path))))
    assert facts("a", 1) == facts("bb", 1) != facts("c", 2)


@pytest.mark.parametrize("options, expected", [(dict(val_fraction=0), "val_fraction: expected 0 < "),
                                               (dict(images=1), "at least two images")])
def test_images_to_train_on_and_to_hold_out(tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected): again(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_where_images_are_and_where_the_run_goes(tmp_path, pictures, monkeypatch):
    "Not into the images; and a relative path is found again from another folder."
    source = shutil.copytree(pictures, tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    for out in (source / "run", source, Path("pictures/a/b")):
        with pytest.raises(ValueError, match="must not be inside its images"): again(out, source="pictures")
    assert not list(source.glob("*/"))
    train(Path("run"), source="pictures", epochs=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in ("", "../pictures", source): train(Path("../run"), source=given, resume=True, epochs=2)
    shutil.move(source, tmp_path / "moved")
    with pytest.raises(ValueError, match="no such file or folder.*have moved: vae-train IMAGES --resume"):
        train(Path("../run"), source="", resume=True, epochs=3)
    train(Path("../run"), source="../moved", resume=True, epochs=3)
    assert load_state(tmp_path / "run/checkpoint.safetensors").config.epochs == 3
    assert json.loads((tmp_path / "run/config.json").read_text())["source"] == str(tmp_path / "moved")


def test_what_went_wrong_for_good_is_said(tmp_path, old, capsys, monkeypatch):
    "Weights beyond all measure make no model, and that is an error; where there is a good checkpoint, its step is told."
    with pytest.raises(FloatingPointError, match="not finite, .* there is none. A lower --lr"):
        again(tmp_path / "a", lr=1e30)
    assert not list((tmp_path / "a").glob("*.safetensors")) and "Trained" not in capsys.readouterr().out
    spoil(monkeypatch, {6})
    again(tmp_path / "b", checkpoint_every=5)
    assert "the last good checkpoint is of step 5" in capsys.readouterr().err
    monkeypatch.setattr(run._StopSignal, "__call__", lambda self: True)
    spoil(monkeypatch, {1})
    with pytest.raises(run.TrainingInterrupted, match="after step 1 of 6; the last loss .* none.$"): again(tmp_path / "c")


def test_a_run_that_is_worse_than_the_mean_image_says_so(tmp_path, old, capsys):
    again(tmp_path / "run", lr=1e-9)   # it learns nothing
    assert "BAD    it reconstructs worse than the mean training image" in capsys.readouterr().out
    fine = dict(psnr_val=20.0, psnr_mean_image=12.0, kl_val=0.5, seconds=1.0)
    said = lambda **given: " ".join(run._how_good(dict(fine, **given)))
    assert "BAD" not in said() and "astronomic" in said(kl_val=1e9) and "KL 0.5 nats a dimension." in said()
    assert [run._steps(n) for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, old, capsys, monkeypatch):
    def no_memory(*args): raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(track, "sample_grid", no_memory)
    again(tmp_path / "run", picture_every=2)
    said = capsys.readouterr()
    assert said.err.count("samples: out of memory. The run goes on.") == 1 and equal(old, tmp_path / "run")
    assert "pictures/reconstructions.png" in said.out and "pictures/samples.png" not in said.out


def test_a_run_shorter_than_a_row_and_a_batch(tmp_path, capsys):
    "The last step has a row; the bar, the speed and the announcement count images that there are; files may be read by others."
    again(tmp_path / "run", images=23, batch_size=1000, log_every=100, epochs=2)
    said, rows = capsys.readouterr(), read_metrics(tmp_path / "run")
    held_out = json.loads((tmp_path / "run/config.json").read_text())["val"]
    assert [row["step"] for row in rows if "loss" in row] == [2] and f"2 steps of {23 - held_out} images" in said.out
    assert f"{2 * (23 - held_out)}/{2 * (23 - held_out)}" in said.err
    assert len({path.stat().st_mode for path in (tmp_path / "run").glob("*.*")}) == 1


# --- what may be read --------------------------------------------------------------------------------------------

def test_foreign_old_and_damaged_checkpoints_are_refused_by_name(tmp_path, peace):
    path, good = tmp_path / "checkpoint.safetensors", (peace / "checkpoint.safetensors").read_bytes()
    header, tensors = read_header(peace / "checkpoint.safetensors"), load_file(peace / "checkpoint.safetensors")
    old, new = (dict(header, format=f"vae_nb checkpoint {version}") for version in (2, 4))
    without = lambda part: {name: value for name, value in tensors.items() if not name.startswith(part)}
    strange = dict(header, config=json.dumps(dict(json.loads(header["config"]), spirit=3)))
    for write, text in ((lambda: path.write_bytes(good[:-100]), "damaged"), (lambda: path.write_bytes(b""), "damaged"),
                        (lambda: save_file(tensors, path, old), "format 2.*reads format 3"),
                        (lambda: save_file(tensors, path, new), "format 4.*reads format 3"),
                        (lambda: save_file(tensors, path, {}), "calls itself 'nothing'"),
                        (lambda: save_file(tensors, path, strange), "no configuration .*'spirit'"),
                        (lambda: save_file(without("optimizer."), path, header), "lacks some of what the optimiser remembers"),
                        (lambda: save_file(without("ema."), path, header), "does not hold this model")):
        path.unlink(missing_ok=True)
        write()
        with pytest.raises(ValueError, match=f"checkpoint.safetensors.*{text}"): load_state(path)


def test_nothing_here_reads_pickles(root):
    "No module of the library loads a pickle; the backbone of LPIPS is read as weights only."
    for path in (root / "vae_nb").rglob("*.py"):
        code = path.read_text()
        assert "import pickle" not in code and "allow_pickle=True" not in code
        assert all("weights_only=True" in line for line in code.splitlines() if "torch.load(" in line), path.name
