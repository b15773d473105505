"The loss beyond its notebooks: LPIPS against its authors' package, every way to lack its weights, the audit, one objective."
import io
import math
import os
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastcore.script import CliError
from perceptual import official
from torch import nn

from vae_nb.loss import lpips as perceptual
from vae_nb.loss.audit import Audit, audit
from vae_nb.loss.lpips import LPIPS, NETS, Comparison, distance_map
from vae_nb.loss.objective import MIN_SCALE, Objective, apply_free_bits, beta_share, reduce
from vae_nb.model.distributions import Posterior, laplace_log_likelihood
from vae_nb.model.vae import VAE
from vae_nb.train.config import Config
from vae_nb.train.distributed import SingleProcess
from vae_nb.train.logging import read_metrics
from vae_nb.train.loop import fit, new_state, raise_if_diverged

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(n=2, size=48, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def differences(ours, theirs, x, y):
    "Largest relative difference of the values, relative difference of the gradients."
    x = x.clone().requires_grad_()
    values = [f(x, y).flatten() for f in (ours, theirs)]
    a, b = (torch.autograd.grad(value.sum(), x)[0] for value in values)
    return ((values[0] - values[1]).abs() / values[1]).max().item(), ((a - b).norm() / b.norm()).item()


# ---- LPIPS is what its authors say


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shape", [(2, 48, 48), (1, 70, 37)])
def test_equals_the_package(net, shape):
    ours, (n, *size) = LPIPS(net, "random"), shape
    x, y = torch.rand(2, n, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    value, gradient = differences(ours, official(ours), x, y)
    assert value < 1e-5 and gradient < 1e-4


def test_equals_the_package_on_real_pictures_with_a_trained_backbone(outside):
    ours = LPIPS("squeeze", str(outside("squeezenet1_1")))
    from vae_nb.data.images import decode, open_image
    with zipfile.ZipFile(outside("emoji")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[100:3500:900]
        real = torch.stack([torch.tensor(decode(open_image(io.BytesIO(archive.read(name))), 96)) for name in names]) / 127.5 - 1
    soft = nn.functional.avg_pool2d(nn.functional.pad(real, (2,) * 4, mode="replicate"), 5, 1)
    tint = torch.tensor([1, .9, .9]).view(3, 1, 1)
    copies = dict(darker=real - 0.05, tinted=real * tint, shifted=real.roll(1, 3), blurred=soft,
                  noisy=real + 0.1 * torch.randn_like(real))
    package, found = official(ours), {}
    for name, copy in copies.items():
        value, gradient = differences(ours, package, copy.clamp(-1, 1), real)
        assert value < 1e-5 and gradient < 1e-4, name
        found[name] = ours(copy.clamp(-1, 1), real).mean()
    assert found["darker"] < found["tinted"] < found["blurred"] and found["darker"] < found["shifted"] < found["noisy"]


@pytest.mark.parametrize("net", NETS)
def test_gradients_are_finite_where_everything_is_equal_or_flat(net):
    ours, x = LPIPS(net, "random"), noise(3)
    flat = [torch.full_like(x, value) for value in (-1., 0., 1.)]
    for a, b in [(x, x), (flat[0], flat[0]), (flat[0], flat[1]), (flat[2], x), (x, flat[2])]:
        leaf = a.clone().requires_grad_()
        value = ours(leaf, b)
        gradient, = torch.autograd.grad(value.sum(), leaf)
        assert gradient.isfinite().all() and (value == 0).all() == torch.equal(a, b)


def test_the_gradient_by_hand_is_the_automatic_one_to_the_second_order():
    a, b = torch.rand(2, 2, 4, 3, 3, dtype=torch.float64) + 0.1
    w = torch.rand(1, 4, 1, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: Comparison.apply(a, b, w), a.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda a: Comparison.apply(a, b, w), a)
    big, other = torch.rand(2, 3, 64, 100, 100)  # several pieces
    assert torch.allclose(Comparison.apply(big, other, w.float()[:, :1]), distance_map(big, other, w.float()[:, :1]).mean((1, 2)))


def test_either_image_or_both_may_want_a_gradient():
    ours, x, y = LPIPS("squeeze", "random"), noise(), noise(seed=1)
    def gradients(first, second):
        a, b = x.clone().requires_grad_(first), y.clone().requires_grad_(second)
        return torch.autograd.grad(ours(a, b).sum(), [leaf for leaf in (a, b) if leaf.requires_grad])
    both = gradients(True, True)
    for one, other in zip((gradients(True, False)[0], gradients(False, True)[0]), both):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-9)
    with torch.no_grad(): assert not ours(x, y).requires_grad


# ---- the metric stays frozen


@pytest.mark.parametrize("net", NETS)
def test_nothing_a_parent_does_reaches_the_backbone(net):
    ours, x, y = LPIPS(net, "random"), noise(), noise(seed=1)
    parent = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), ours)
    before = ours(x, y)
    parent.train().requires_grad_(True)
    assert parent.training and not any(part.training for part in ours.modules()) and torch.equal(ours(x, y), before)
    ours(x.requires_grad_(), y).sum().backward()
    assert len(list(parent.parameters())) == 2 and not any("2." in name for name in parent.state_dict())
    assert all(not b.requires_grad and b.grad is None for b in ours.buffers())
    torch.optim.SGD(parent.parameters(), 1.0).step()
    assert torch.equal(ours(x, y), before)


def test_no_prints_and_no_warnings(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net in NETS: LPIPS(net, "random")(noise().requires_grad_(), noise(seed=1)).sum().backward()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrong, expected", [
    (noise() * 2, r"expected images in \[-1,1\], got values from -2 to 2"), (noise().add(1).mul(127).byte(), "expected floats"),
    (noise()[:, :1], r"\(B,3,H,W\).*\(2, 1, 48, 48\)"), (noise()[0], r"\(B,3,H,W\)"), (noise(size=16), "17 pixels or more")])
def test_what_is_no_image_is_refused(wrong, expected):
    with pytest.raises(ValueError, match=expected): LPIPS("squeeze", "random")(wrong, wrong)


def test_a_broken_model_makes_a_broken_loss_and_no_error():
    ours, x = LPIPS("squeeze", "random"), torch.full((1, 3, 48, 48), float("nan"))
    assert ours(x, noise(1)).isnan().all()   # the training loop skips such a step


def test_told_otherwise_it_takes_any_range():
    ours, x, y = LPIPS("squeeze", "random", any_range=True), noise() * 2, noise(seed=1)
    assert differences(ours, official(ours), x, y)[0] < 1e-5
    with pytest.raises(ValueError, match="x is .* y is"): ours(x, y[:1])
    with pytest.raises(ValueError, match="2 images, but activations of 1"): ours(x, ours.activations(y[:1]))


# ---- fast


def test_remembered_targets_change_nothing():
    ours, x, y = LPIPS("alex", "random"), noise().requires_grad_(), noise(seed=1)
    seen = ours.activations(y)
    assert torch.equal(ours(x, seen), ours(x, y)) and not any(a.requires_grad for a in seen)
    assert torch.equal(*(torch.autograd.grad(ours(x, target).sum(), x)[0] for target in (seen, y)))
    assert torch.allclose(sum(d.mean((1, 2)) for d in ours.maps(x, y)), ours(x, y), rtol=1e-5)


@pytest.mark.parametrize("net", ["squeeze", "vgg"])
def test_compiles_into_one_graph(net):
    ours, x, y = LPIPS(net, "random"), noise(1).requires_grad_(), noise(1, seed=1)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, y), ours(x, y), rtol=1e-5)
    a, b = (torch.autograd.grad(f(x, y).sum(), x)[0] for f in (compiled, ours))
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 * b.abs().max())


def test_sixteen_bits_and_channels_last():
    ours, x, y = LPIPS("squeeze", "random"), noise(4, 64), noise(4, 64, seed=1)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = ours(x, y)
    assert torch.allclose(ours(last, y), exact, rtol=1e-4)
    layouts = [a.is_contiguous(memory_format=torch.channels_last) for a in ours.activations(last)[:3] + ours._target(last, y)[:3]]
    assert all(layouts)
    with torch.autocast("cpu", torch.bfloat16): rough = ours(last, y)
    gradient, = torch.autograd.grad(rough.sum(), last)
    assert rough.dtype == gradient.dtype == torch.float32 and gradient.isfinite().all()
    assert torch.allclose(rough, exact, rtol=0.03) and not torch.equal(rough, exact)   # 8 bits of mantissa: 0.4 % an operation


# ---- weights


def test_two_machines_agree_on_the_random_backbone():
    code = ("import torch; from vae_nb.loss.lpips import LPIPS; torch.manual_seed(5)\n"
            "print(LPIPS('squeeze', 'random')(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)).item())")
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env=dict(os.environ, OMP_NUM_THREADS="1"))
    here = LPIPS("squeeze", "random")(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)).item()
    assert there.stderr == "" and float(there.stdout) == here


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "An empty torch cache, and a network that refuses connections."
    import socket
    def refuse(*args, **kwargs): raise ConnectionRefusedError("no network here")
    monkeypatch.delenv("VAE_NB_FILES", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


def test_without_a_network_one_message_names_three_ways_out(offline):
    start = time.time()
    with pytest.raises(OSError) as error: LPIPS("alex", "imagenet")
    said = str(error.value)
    assert "alexnet" in said and "https://" in said and "\n" not in said
    assert all(way in said for way in ("Put that file into the cache", "a path to a state dict", 'backbone="random"'))
    with pytest.warns(UserWarning, match="Going on with a random backbone") as notes: fallback = LPIPS("alex", "auto")
    assert len(notes) == 1 and fallback.description == "alex, random backbone" and time.time() - start < 10


def test_a_silent_network_is_given_up(monkeypatch, offline):
    import socket
    def silent(*args, **kwargs): raise TimeoutError(f"timed out after {socket.getdefaulttimeout()} s")
    monkeypatch.setattr(torch.hub, "download_url_to_file", silent)
    with pytest.raises(OSError, match="timed out after 10.0 s"): LPIPS("alex", "imagenet")
    assert socket.getdefaulttimeout() is None


def test_imagenet_comes_from_the_cache_and_a_damaged_cache_says_so(offline, outside):
    name = perceptual.models.get_model_weights("squeezenet1_1").DEFAULT.url.rsplit("/", 1)[1]
    (offline / "checkpoints").mkdir()
    weights = outside("squeezenet1_1")
    state = torch.load(weights, weights_only=True)
    torch.save({f"features.{key.removeprefix('features.')}": x for key, x in state.items()}, offline / "checkpoints" / name)
    cached, local = LPIPS("squeeze", "imagenet"), LPIPS("squeeze", str(weights))
    assert torch.equal(cached(noise(), noise(seed=1)), local(noise(), noise(seed=1)))
    assert cached.description == "squeeze, imagenet backbone"
    (offline / "checkpoints" / name).write_bytes(b"half of a fi")
    with pytest.raises(ValueError, match=f"{name} is damaged"): LPIPS("squeeze", "imagenet")


def test_every_bad_file_is_one_clear_line(tmp_path, outside):
    good = torch.load(outside("squeezenet1_1"), weights_only=True)
    files = {"noise.pth": b"\x00\x01 nothing", "empty.pth": b""}
    for name, content in files.items(): (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": good, "epoch": 3}, tmp_path / "nested.pth")
    torch.save({key: value[:1] for key, value in good.items()}, tmp_path / "cut.pth")
    cases = {"noise.pth": "damaged, or no state dict", "empty.pth": "damaged", "list.pth": "got a list",
             "nested.pth": "got none", "cut.pth": r"expected a tensor 0.weight of shape \(64, 3, 3, 3\), got \(1, 3, 3, 3\)"}
    for name, expected in cases.items():
        with pytest.raises(ValueError, match=expected) as error: LPIPS("squeeze", str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="alex|0.weight"): LPIPS("alex", str(outside("squeezenet1_1")))


def test_a_backbone_cannot_smuggle_code(tmp_path):
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "exploded"),))
    torch.save({"0.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="bomb.pth"): LPIPS("squeeze", str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


# ---- the objective


@pytest.mark.parametrize("pixels", ["mean", "sum", "calibrated"])
@pytest.mark.parametrize("latents", ["mean", "sum"])
@pytest.mark.parametrize("free_bits", [0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (2, 4, 4)])
def test_the_loss_is_the_weighted_sum_of_the_terms_it_reports(pixels, latents, free_bits, shape):
    x, x_hat, posterior = noise(4, 16), noise(4, 16, seed=1), Posterior(torch.randn(4, *shape), torch.randn(4, *shape))
    objective = Objective(0.3, lambda a, b: (a - b).square().flatten(1).mean(1), 2.0, pixels, latents, free_bits)
    terms = objective(x, x_hat, posterior)
    assert torch.isclose(terms["loss"], terms.get("nll", terms["l1"]) + 2 * terms["lpips"] + 0.3 * terms["kl"])
    assert set(terms) == set(objective.units) and all(value.ndim == 0 for value in terms.values())
    assert torch.isclose(terms["rate"], posterior.kl().flatten(1).sum(1).mean())
    said = objective.describe(768, posterior.mu[0].numel())
    assert f"{latents} over D=" in said and "N=768" in said and ("free" in said) == bool(free_bits) and " b = " in said


def test_a_compiled_objective_follows_a_schedule_without_being_compiled_again():
    x, x_hat, posterior = noise(2, 32), noise(2, 32, seed=1), Posterior(torch.randn(2, 5), torch.randn(2, 5))
    graphs = []
    def count(graph, inputs): graphs.append(graph); return graph.forward
    objective = Objective(0.3, LPIPS("squeeze", "random"), free_bits=0.1)
    compiled = torch.compile(objective, backend=count, fullgraph=True)
    for t in (0.05, 0.1, 0.2, 1.0):
        given = x, x_hat, posterior, torch.tensor(beta_share(t, "warmup"))
        assert torch.isclose(compiled(*given)["loss"], objective(*given)["loss"], rtol=1e-5)
    assert len(graphs) == 1


def test_the_calibrated_scale_is_the_best_one_and_has_a_floor():
    x, x_hat = noise(2, 8), noise(2, 8, seed=1)
    objective, q = Objective(1.0, pixels="calibrated", latents="sum"), Posterior(torch.zeros(2, 3), torch.zeros(2, 3))
    at = lambda b: -reduce(laplace_log_likelihood(x, x_hat, b), "sum")
    scales = torch.linspace(0.05, 2, 400)
    best = torch.stack([at(b) for b in scales]).min(0).values
    assert torch.allclose(objective(x, x_hat, q)["nll"], best.mean(), rtol=1e-4)
    assert torch.isclose(objective(x, x, q)["loss"], 192 * (torch.tensor(2 * MIN_SCALE).log() + 1))


def test_schedules_end_at_the_full_beta():
    for name in ("constant", "warmup", "cyclical"):
        values = [beta_share(step / 1000, name) for step in range(1001)]
        assert min(values) >= 0 and max(values) == values[-1] == 1
    assert sum(a > b for a, b in zip(values, values[1:])) == 3   # of the last, cyclical: four climbs


# ---- the audit


def small_model(**options):
    torch.manual_seed(1)
    return VAE(size=16, widths=(8, 16), latent=4, blocks=1, patch_size=2, mid_blocks=1, **options)


def scenery(n=8):
    "Smooth pictures in [-1,1]."
    return nn.functional.interpolate(noise(n, 4), size=(16, 16), mode="bilinear").clamp(-1, 1)


class Distance(nn.Module):
    "Some perceptual distance."
    def __init__(self): super().__init__(); self.look = nn.Conv2d(3, 8, 3, stride=2).requires_grad_(False)
    def forward(self, a, b): return (self.look(a) - self.look(b)).square().flatten(1).mean(1)


class LPIPSLike(Distance): pass


LPIPSLike.__name__ = "LPIPS"   # what the audit looks for


def changed(change):
    "An objective whose terms go through a function."
    class Changed(Objective):
        def forward(self, x, x_hat, posterior): return change(self, super().forward(x, x_hat, posterior))
    return Changed(lpips=Distance())


def total(self, terms, sign=1):
    return dict(terms, loss=terms["l1"] + self.lpips_weight * terms["lpips"] + sign * self.beta * terms["kl"])


def detached(name): return lambda self, terms: total(self, dict(terms, **{name: terms[name].detach()}))


CASES = {
    "healthy": (Objective(lpips=Distance()), ""),
    "healthy, calibrated": (Objective(1.0, pixels="calibrated", latents="sum"), ""),
    "healthy, free bits": (Objective(lpips=Distance(), free_bits=0.05), ""),
    "lpips under no_grad": (changed(detached("lpips")), "lpips: no gradient"),
    "kl under no_grad": (changed(detached("kl")), "kl: no gradient"),
    "kl subtracted": (changed(lambda self, terms: total(self, terms, -1)), "kl: wrong sign"),
    "kl upside down": (changed(lambda self, terms: total(self, dict(terms, kl=-terms["kl"]))), "kl: negative"),
    "weight of lpips 0": (Objective(lpips=Distance(), lpips_weight=0), "lpips: inert"),
    "beta 0": (Objective(0.0), "kl: inert"),
    "few nats to pay": (Objective(latents="sum"), "the code may collapse"),
    "not finite": (changed(lambda self, terms: total(self, dict(terms, l1=terms["l1"] / 0))), "l1: not a finite number"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_audit_catches(name):
    objective, expected = CASES[name]
    found = audit(small_model(), objective, scenery())
    assert isinstance(found, Audit) and bool(found.problems) == bool(expected), found
    assert not expected or any(expected in problem for problem in found.problems), found
    assert ("Nothing wrong was found" in str(found)) == (not expected) and max(map(len, str(found).splitlines())) < 160


def test_the_audit_catches_parameters_that_never_move():
    model = small_model()
    model.decoder.layers[0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    names = [name for name, _ in model.named_parameters() if name.startswith(("decoder.layers.0.", "unused"))]
    problem, = audit(model, Objective(), scenery()).problems
    assert "never move" in problem and names[0] in problem and f"{len(names) - 3} more" in problem
    whole = small_model()
    problem, = audit(whole, Objective(), scenery(), torch.optim.Adam(whole.encoder.parameters())).problems
    assert "not given to the optimiser" in problem
    assert audit(whole, Objective(), scenery(), torch.optim.Adam(whole.parameters())).problems == []
    nothing = audit(small_model(), changed(lambda self, terms: {k: v.detach() for k, v in terms.items()}), scenery()).problems
    assert any("never move" in problem for problem in nothing) and any("no gradient" in problem for problem in nothing)


def test_the_audit_catches_pictures_between_0_and_1():
    assert any(p.startswith("images: values from") for p in audit(small_model(), Objective(), scenery() / 2 + 0.5).problems)
    class Rescaled(nn.Module):
        def __init__(self): super().__init__(); self.inner = LPIPSLike()
        def forward(self, a, b): return self.inner(a / 2 + 0.5, b / 2 + 0.5)
    problems = audit(small_model(), Objective(lpips=Rescaled()), scenery()).problems
    assert len(problems) == 2 and all(p.startswith("LPIPS, image") and "expected [-1, 1]" in p for p in problems)
    assert audit(small_model(), Objective(lpips=LPIPSLike()), scenery()).problems == []


def test_the_audit_lets_bright_pictures_pass_and_still_catches_a_perceptual_net_that_rescales_them():
    bright = (215 + 40 * scenery()).round() / 127.5 - 1   # bytes from 175 to 255
    found = audit(small_model(), Objective(0.002, LPIPSLike()), bright)
    assert found.problems == [] and any("all bright" in note for note in found.notes)
    class Rescaled(nn.Module):
        def __init__(self): super().__init__(); self.inner = LPIPSLike()
        def forward(self, a, b): return self.inner(a / 2 + 0.5, b / 2 + 0.5)
    assert any(p.startswith("LPIPS, image 2") for p in audit(small_model(), Objective(0.002, Rescaled()), bright).problems)
    assert any(p.startswith("images: values from") for p in audit(small_model(), Objective(0.002), bright / 2 + 0.5).problems)


@pytest.mark.parametrize("latents", ["mean", "sum"])
def test_the_audit_lets_a_code_below_its_free_bits_pass_but_no_other_dead_term(latents):
    found = audit(small_model(), Objective(0.002, latents=latents, free_bits=0.5), scenery())
    kl, = (row for row in found.rows if row["term"] == "kl")
    assert kl["verdict"] == "below its free bits: no gradient yet" and found.problems == [], found
    dead = changed(lambda self, terms: total(self, dict(terms, kl=terms["kl"] + 0 * terms["l1"] - terms["kl"])))
    for objective in (dead, dead.__class__(lpips=Distance(), free_bits=1e-9)):
        assert any(p.startswith("kl: inert") for p in audit(small_model(), objective, scenery()).problems)


def test_the_audit_notices_a_term_that_is_drowned():
    rows = {row["term"]: row for row in audit(small_model(), Objective(1e-6), scenery()).rows}
    assert rows["kl"]["verdict"].startswith("dominated") and rows["l1"]["verdict"] == "fine" and rows["l1"]["share"] > 0.999


def test_the_audit_leaves_no_trace():
    model, objective, x = small_model(), Objective(lpips=LPIPSLike()), scenery()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3); expected = torch.rand(2); torch.manual_seed(3)
    audit(model, objective, x)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not objective.lpips._forward_pre_hooks


# ---- the command, and one objective for all


TINY = dict(preset="demo", size=32, latent="8", images=40, batch_size=8, epochs=2, lpips="none", wandb="disabled", device="cpu",
            precision="fp32", log_every=1)


def trained(folder, **options):
    "What vae-train said and left behind: its printed lines and its rows."
    from vae_nb.cli import vae_train
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()):
        vae_train("scenes", out=str(folder), **TINY | options)
    return said.getvalue(), read_metrics(folder)


def steps(rows): return [{key: row[key] for key in ("step", "loss", "l1", "kl", "grad_norm")} for row in rows if "loss" in row]


def test_an_audited_run_is_the_run_that_was_not(tmp_path):
    said, rows = trained(tmp_path / "audited", audit=True)
    silent, others = trained(tmp_path / "plain")
    assert "Nothing wrong was found." in said and "l1 " in said and "verdict" in said and "verdict" not in silent
    assert said.index("verdict") < said.index("data ") and steps(rows) == steps(others)


def test_an_audit_that_finds_something_stops_the_run_before_it_writes(tmp_path):
    with pytest.raises(CliError, match="--audit: 1 wrong.*nothing written"):
        trained(tmp_path / "run", audit=True, beta=0.0)
    assert not (tmp_path / "run").exists()
    trained(tmp_path / "run", beta=0.0, epochs=1)   # not asked, it does as it is told


def test_the_help_of_vae_train_says_what_an_audit_does():
    start = time.time()
    done = subprocess.run([Path(sys.executable).with_name("vae-train"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--audit" in done.stdout and "stop if one is wrong" in " ".join(done.stdout.split())
    assert "--beta_schedule" in done.stdout.replace("-schedule", "_schedule") and time.time() - start < 3


def test_training_and_validation_use_one_objective(tmp_path, monkeypatch):
    "One object is made, every loss of the run comes from it, and both sides compute the same number from the same images."
    from vae_nb.train import run
    made, calls, make = [], [], run.make_objective
    class Counted(Objective):
        def forward(self, x, x_hat, posterior, beta_weight=1.0):
            calls.append((id(self), torch.is_grad_enabled(), float(beta_weight)))
            return super().forward(x, x_hat, posterior, beta_weight)
    def counted(config):
        objective = make(config)
        objective.__class__ = Counted
        made.append(objective)
        return objective
    monkeypatch.setattr(run, "make_objective", counted)
    _, rows = trained(tmp_path / "run", beta_schedule="warmup", free_bits=0.05)
    assert len(made) == 1 and {call[0] for call in calls} == {id(made[0])}
    total = len(steps(rows))
    shares = [share for _, trains, share in calls if trains]
    assert len(shares) == total and shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1   # the schedule
    held_out = [share for _, trains, share in calls if not trains]
    assert len(held_out) >= 2 and set(held_out) == {1}                                                # the whole loss


def test_validation_computes_what_training_computes():
    from vae_nb.data.dataset import batches, load
    from vae_nb.train.config import recipe
    from vae_nb.train.loop import make_forward, new_state, noise, step, validate
    config = recipe("demo", **{name: value for name, value in TINY.items() if name not in ("preset", "wandb")})
    store, index = load("scenes", 32, 8), torch.arange(8)
    knobs = dict(pixels="calibrated", latents="sum", free_bits=0.1)
    for objective in (Objective(), Objective(1.0, **knobs), Objective(lpips=Distance())):
        held_out = validate(new_state(config), objective, store.images, index)
        x = next(batches(store.images, index, 8, shuffle=False, flip=False))
        state = new_state(config)   # the same weights, and the same noise
        terms = step(state, make_forward(state, objective), x, noise(config.seed, 0, (8, 8), torch.device("cpu")))
        for name in objective.units: assert held_out[f"{name}_val"] == pytest.approx(terms[name].item(), rel=1e-6), name


# ---- what can't work is refused


def test_a_configuration_that_cannot_work_is_refused_by_name():
    numbers = ("lr", "beta", "clip", "weight_decay", "free_bits", "lpips_weight")
    counts = ("size", "epochs", "batch_size", "images", "max_nonfinite_steps", "warmup", "threads")
    wrong = [(name, value) for name in numbers for value in (math.inf, math.nan, "0.1", -1)]
    wrong += [(name, value) for name in counts for value in (1.5, math.inf, "3", -1)]
    wrong += [("val_fraction", 0), ("val_fraction", 1), ("val_fraction", math.nan), ("ema", math.nan), ("seed", 1.5)]
    wrong += [("seed", 10**15)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got "): Config(**{name: value})


def test_free_bits_are_refused_where_a_batch_is_computed_in_parts():
    "The floor is under a mean over the batch: parts have means of their own, and other gradients."
    kl = torch.tensor([[0., 2.], [2., 0.]])
    whole, parts = apply_free_bits(kl, 0.8).sum(), sum(apply_free_bits(row, 0.8).sum() for row in kl.split(1)) / 2
    assert whole == 2 and parts == 2.8
    with pytest.raises(ValueError, match="free_bits: expected 0 with accumulate > 1"): Config(free_bits=0.5, accumulate=2)
    class Two(SingleProcess): world_size = 2
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    for process, parts in ((Two(), 1), (SingleProcess(), 4)):
        state = new_state(Config(**dict(TINY, images=0, accumulate=parts)))
        with pytest.raises(ValueError, match="free_bits: expected 0 for a batch in"):
            fit(state, Objective(free_bits=0.5), images, torch.arange(40), process=process)


def test_a_lost_run_names_the_loss_if_nothing_else_is_wrong():
    state = SimpleNamespace(nonfinite_steps=torch.tensor(9), step=9, config=Config(max_nonfinite_steps=3))
    nan, one = torch.tensor(math.nan), torch.tensor(1.)
    fine = dict(loss=one, kl=one, grad_norm=nan)
    for terms, blamed in ((fine | dict(loss=nan), "the loss"), (fine, "the gradient"), (fine | dict(loss=nan, kl=nan), "kl")):
        with pytest.raises(FloatingPointError, match=f": {blamed} is not finite"): raise_if_diverged(state, terms)
