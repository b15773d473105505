"The whole path through the real commands: real pictures in, a trained run out, and nothing lost on the way."
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from fastcore.script import CliError
from PIL import Image
from safetensors.torch import save_file

from vae_nb import cli
from vae_nb.cli import vae_interpolate, vae_reconstruct, vae_sample, vae_train
from vae_nb.data.scenes import scenes
from vae_nb.loss.objective import Objective
from vae_nb.plots import curves
from vae_nb.train.checkpoint import load_model, load_state, save_checkpoint, save_model
from vae_nb.train.config import recipe
from vae_nb.train.logging import read_metrics
from vae_nb.train.loop import Reporter, fit, new_state

QUICK = ["--preset", "demo", "--size", "32", "--latent", "16", "--images", "120", "--batch-size", "16", "--lpips", "none",
         "--device", "cpu", "--log-every", "1", "--val-fraction", "0.2"]


def command(name, *arguments, **environment):
    "Start one of the console scripts, on one thread."
    return subprocess.Popen([Path(sys.executable).with_name(name), *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1", **environment))


def run(name, *arguments, ok=True, **environment):
    process = command(name, *arguments, **environment)
    out, err = process.communicate(timeout=240)
    assert (process.returncode == 0) == ok, out + err
    return out if ok else err


@pytest.fixture(scope="module")
def trained(outside, tmp_path_factory):
    "A run on real emoji with every term of the loss and W&B offline, and what the command printed."
    folder = tmp_path_factory.mktemp("runs") / "emoji"
    options = [option for option in QUICK if option not in ("--lpips", "none")]
    backbone = ["--lpips", "squeeze", "--backbone", outside("squeezenet1_1")]
    return folder, run("vae-train", outside("emoji"), "--out", folder, *options, *backbone, "--epochs", 2)


def test_a_run_folder_holds_everything_and_says_so(trained):
    folder, said = trained
    for name in ("config.json", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoint.safetensors"):
        assert (folder / name).stat().st_size > 0 and name in said
    for name in ("reconstructions", "samples", "curves"):
        assert Image.open(folder / "pictures" / f"{name}.png").width > 100 and f"pictures/{name}.png" in said
    record, summary = json.loads((folder / "config.json").read_text()), json.loads((folder / "summary.json").read_text())
    assert record["images"] == 120 and record["train"] + record["val"] == 120 and record["D"] == 16
    assert "squeezenet1_1_features.pth" in record["objective"][0] and "squeezenet1_1_features.pth" in said
    assert {"psnr_val", "psnr_mean_image", "l1_val", "lpips_val", "kl_val"} <= summary.keys()
    assert not any(part.suffix in (".pkl", ".pt", ".pth") for part in folder.rglob("*"))


def test_every_row_has_every_term(trained):
    rows = read_metrics(trained[0])
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    for row in steps:
        assert {"l1", "lpips", "kl", "rate", "lr", "grad_norm", "images_per_second"} <= row.keys()
        assert abs(row["loss"] - (row["l1"] + row["lpips"] + 0.02 * row["kl"])) < 1e-4 * row["loss"]


def wandb_records(file):
    "The records of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB (CRC, length, type, bytes)."
    data, at, parts = Path(file).read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768   # the rest of a block that has no room for a header
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        parts.append(data[at + 7:at + 7 + length])
        at += 7 + length
        if kind in (1, 4): yield b"".join(parts); parts = []   # 1: whole, 2: first, 3: middle, 4: last


def test_the_offline_wandb_run_can_be_read_back(trained):
    "Configuration, terms, speed, pictures and final metrics are in W&B's own file."
    from wandb.proto.wandb_internal_pb2 import Record
    file, = (trained[0] / "wandb").glob("offline-run-*/run-*.wandb")
    config, history, summary = {}, [], {}
    read = lambda items: {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
    for data in wandb_records(file):
        record = Record()
        record.ParseFromString(data)
        config.update(read(record.run.config.update))
        summary.update(read(record.summary.update))
        if record.HasField("history"): history.append(read(record.history.item))
    assert {"loss", "l1", "lpips", "kl", "rate", "lr", "images_per_second", "psnr_val", "l1_val"} <= set().union(*history)
    for name in ("reconstructions", "samples"):
        assert {row[f"{name}._type"] for row in history if f"{name}._type" in row} == {"image-file"}
        kept, = {row[f"{name}.path"] for row in history if f"{name}.path" in row}
        assert Image.open(file.parent / "files" / kept).width == Image.open(trained[0] / "pictures" / f"{name}.png").width
    assert config["config"]["beta"] == 0.02 and config["D"] == 16
    assert summary["psnr_val"] == json.loads((trained[0] / "summary.json").read_text())["psnr_val"]


def test_resume_reconstruct_sample_interpolate(trained, outside, tmp_path):
    folder, _ = trained
    before = load_state(folder / "checkpoint.safetensors").step
    emoji = outside("emoji")
    run("vae-train", "--resume", "--out", folder, "--epochs", 3, "--wandb", "disabled")
    assert load_state(folder / "checkpoint.safetensors").step == before * 3 // 2
    steps = [row["step"] for row in read_metrics(folder) if "loss" in row]
    assert steps == list(range(1, before * 3 // 2 + 1))
    run("vae-reconstruct", folder, emoji, "--n", 8, "--out", tmp_path / "r.png")
    run("vae-sample", folder, "--n", 9, "--out", tmp_path / "s.png")
    for i, color in enumerate(("red", "blue")): Image.new("RGB", (50, 70), color).save(tmp_path / f"{i}.png")
    run("vae-interpolate", folder, tmp_path / "0.png", tmp_path / "1.png", "--out", tmp_path / "i.png", "--steps", 5)
    assert Image.open(tmp_path / "r.png").size == (8 * 34 + 2, 2 * 34 + 2)
    assert Image.open(tmp_path / "s.png").size == (8 * 34 + 2, 2 * 34 + 2)
    assert Image.open(tmp_path / "i.png").size == (5 * 34 + 2, 34 + 2)


def weights(folder): return load_model(folder, "cpu").state_dict()


def test_a_stopped_run_ends_like_an_undisturbed_one(tmp_path):
    "SIGTERM is answered with a checkpoint, and the resumed run ends with the same bits. (For SIGKILL, see test_lost.)"
    options, folder = ["scenes", *QUICK, "--epochs", 4, "--checkpoint-every", 3, "--wandb", "disabled"], tmp_path / "stopped"
    run("vae-train", *options, "--out", tmp_path / "whole")
    process = command("vae-train", *options, "--out", folder)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:   # wait until some steps are in the log
        if (folder / "checkpoint.safetensors").exists() and len(read_metrics(folder)) >= 4: break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0, "the run was over before the signal came"
    assert "nothing is lost" in err and "--resume" in err
    run("vae-train", "--resume", "--out", folder)
    expected, found = weights(tmp_path / "whole"), weights(folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [row["step"] for row in read_metrics(folder) if "loss" in row]
    assert rows == sorted(set(rows))


@pytest.mark.parametrize("source, options, expected", [
    ("", {}, "which images"),
    ("no/such/folder", {}, "no/such/folder"),
    ("scenes", dict(latent="8x4"), "--latent: "),
    ("scenes", dict(batch_size=-1), "--batch-size: expected a whole number above 0, got -1"),
    ("scenes", dict(size=33), "size"),
    ("scenes", dict(size=16, lpips="alex", backbone="random"), "--size: LPIPS.alex. sees images of .* pixels or more"),
    ("scenes", dict(seed=10**15), "--seed: expected a whole number of at most 12 digits"),
    ("scenes", dict(preset="huge"), "preset"),
    ("scenes", dict(backbone="no-such-file.pth", lpips="alex"), "no-such-file.pth"),
    ("scenes", dict(device="cuda" if not torch.cuda.is_available() else "mps"), "device"),
])
def test_bad_input_gets_one_clear_line_and_leaves_nothing_behind(source, options, expected, tmp_path):
    options = dict(dict(preset="demo", size=32, wandb="disabled"), **options)
    with pytest.raises(CliError, match=expected) as said:
        vae_train(source, out=str(tmp_path / "run"), images=40, **options)
    assert len(str(said.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_command_says_one_line_and_knows_its_flags(tmp_path):
    said = run("vae-train", "scenes", "--latent", "8x4", "--no-flip", "--no-artifacts", "--out", tmp_path / "run", ok=False)
    assert "--latent: expected" in said and "Traceback" not in said and len(said.strip().splitlines()) <= 2


@pytest.mark.parametrize("name", ["vae-reconstruct", "vae-encode"])
def test_a_command_without_images_says_so_in_its_usage(name):
    said = " ".join(run(name, "scenes", ok=False).split())
    assert "run images [images ...]" in said and "arguments are required: images" in said


def test_home_is_home(tmp_path, monkeypatch):
    "A tilde that no shell has replaced."
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAE_NB_CACHE", str(tmp_path / "cache"))
    quick = dict(preset="demo", size=32, images=40, epochs=1, batch_size=8, device="cpu", wandb="disabled", threads=1)
    vae_train("scenes", out="~/run", **quick)
    assert (tmp_path / "run/model.safetensors").exists() and not (tmp_path / "~").exists()
    assert load_model("~/run", "cpu").size == 32
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["threads"] == 1


@pytest.fixture
def model(tmp_path):
    "A folder with a small untrained model."
    save_model(new_state(recipe("demo", size=32, latent="16", device="cpu")).ema, tmp_path / "model.safetensors")
    return tmp_path


def test_an_interpolation_has_two_ends_and_no_picture_is_overwritten(model):
    (model / "two").mkdir()
    for i in range(2): Image.new("RGB", (40, 40), "red").save(model / f"two/{i}.png")
    one, two, out = str(model / "two/0.png"), str(model / "two"), str(model / "i.png")
    for a, b in ((two, one), (one, two)):
        with pytest.raises(CliError, match="A and B must each be one image, got [12] and [12]"):
            vae_interpolate(str(model), a, b, out=out)
    vae_interpolate(str(model), one, one, out=out)
    with pytest.raises(CliError, match="is one of the images"): vae_reconstruct(str(model), one, out=one)


def test_any_file_of_a_run_is_a_model(tmp_path):
    "Of a checkpoint the averaged weights are taken; a file of another kind is refused by name."
    state = new_state(recipe("demo", size=32, latent="16", device="cpu"))
    with torch.no_grad():
        for p in state.ema.parameters(): p.add_(1)
    assert save_checkpoint(state, tmp_path, val_loss=0.5)
    for name in ("model", "best", "checkpoint"):
        found = load_model(tmp_path / f"{name}.safetensors", "cpu").state_dict()
        assert all(torch.equal(value, found[key]) for key, value in state.ema.state_dict().items())
    vae_sample(str(tmp_path / "best.safetensors"), n=2, out=str(tmp_path / "s.png"))
    save_file({"x": torch.zeros(1)}, tmp_path / "checkpoint.safetensors", dict(format="vae_nb checkpoint 2", config="{}"))
    with pytest.raises(CliError, match="a checkpoint of format 2, and this version .* reads format 3"):
        vae_sample(str(tmp_path / "checkpoint.safetensors"))


def test_ctrl_c_before_anything_is_one_word_and_a_long_seed_one_line(model, monkeypatch, capsys):
    def interrupted(*args): raise KeyboardInterrupt
    for command in (partial(vae_sample, str(model)), partial(vae_train, "scenes", out=str(model / "run"))):
        with pytest.raises(CliError, match="--seed: expected a .*number of at most 1[28] digits"): command(seed=10**20)
    monkeypatch.setattr("vae_nb.export.load_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt): vae_sample(str(model))   # in Python it goes on its way
    monkeypatch.setattr(cli, "is_cli", lambda: True)
    with pytest.raises(SystemExit) as end: vae_sample(str(model))
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "stopped"


def test_curves_have_a_name_for_each_line_that_is_there():
    "A lone row is a dot, and what was never measured has no entry."
    held_out = curves([dict(step=9, loss_val=1.0)], dict(loss=["loss", "loss_val"]))
    whole = [dict(step=1, loss=2.0, loss_val=1.0)]
    names = lambda figure: [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names(held_out) == ["held out"] and names(curves(whole, dict(loss=["loss", "loss_val"]))) == ["training", "held out"]
    lone, _ = curves(whole, dict(loss=["loss", "loss_val"])).axes[0].lines
    assert lone.get_marker() == "o"


def test_a_checkpoint_cannot_smuggle_code(trained, tmp_path):
    "A pickle named like a checkpoint is refused, and what it would run does not run."
    import pickle

    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "exploded"),))

    for name, load in (("checkpoint.safetensors", load_state), ("model.safetensors", load_model)):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match=name): load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_missing_packages_say_what_to_install(tmp_path):
    "Without lpips and wandb the library trains; asked for, each says how to get it."
    code = ("import sys; sys.modules['wandb'] = None\nimport importlib.util as u; find = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'lpips' else find(name, *a)\n"
            "from vae_nb.cli import vae_train\n"
            "kind = dict(preset='demo', size=32, images=40, epochs=1, batch_size=8, device='cpu')\n"
            f"vae_train('scenes', out={str(tmp_path / 'a')!r}, wandb='disabled', lpips='auto', **kind)\n"
            "for options in (dict(wandb='offline', lpips='none'), dict(wandb='disabled', lpips='alex')):\n"
            f"    try: vae_train('scenes', out={str(tmp_path / 'b')!r}, overwrite=True, **options, **kind)\n"
            "    except Exception as error: print('SAID', error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert done.returncode == 0 and len(said) == 2, done.stdout + done.stderr
    assert "pip install wandb" in said[0] and "pip install lpips" in said[1]


def test_the_script_in_the_readme_runs(root, tmp_path):
    "The ten lines of Python that the first page shows, on fewer images."
    cells = json.loads((root / "nbs/index.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code, = [source for source in sources if "#| hide" not in source]
    assert code.count("n=2000") == code.count("epochs=2") == 1
    code = code.replace("n=2000", "n=80").replace("epochs=2", "epochs=1, log_every=1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "samples.png").width > 400 and load_model(tmp_path / "model.safetensors", "cpu").D


def test_a_compiled_run_is_the_same_run(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))   # all but the C compiler
    images, _ = scenes(40, size=32)
    rows, ended = {"off": [], "on": []}, {}
    for choice, seen in rows.items():
        config = recipe("demo", size=32, epochs=2, batch_size=16, accumulate=2, compile=choice, device="cpu", precision="fp32")
        class Watch(Reporter):
            def step(self, state, terms, seen=seen):
                seen.append([float(terms[name]) for name in ("loss", "grad_norm", "skipped")])
        ended[choice] = fit(new_state(config), Objective(config.beta), images, torch.arange(40), reporter=Watch())
    assert len(rows["on"]) == 4
    assert torch.allclose(torch.tensor(rows["on"]), torch.tensor(rows["off"]), rtol=1e-3)   # 2e-4 is seen
    assert list(ended["on"].model.state_dict()) == list(ended["off"].model.state_dict())
