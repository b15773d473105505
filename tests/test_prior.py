"Priors fitted to latents: what they promise at their public boundary, and the benchmark from end to end on small numbers."
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from vae_nb.analysis.flow import VelocityUNet, flow_matching_loss, integrate
from vae_nb.analysis.prior import (
    KINDS,
    FlowPrior,
    GaussianPrior,
    aggregate_moments,
    draw_latents,
    fit_prior,
    load_prior,
    model_fingerprint,
    nearest_neighbours,
)
from vae_nb.model.vae import VAE
from vae_nb.train.checkpoint import save_model

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(size=16, widths=[8], blocks=1, patch_size=4, mid_blocks=0)  # downsampling 4
QUICK = dict(vector=dict(network=dict(width=16, blocks=1)), spatial=dict(network=dict(widths=(8, 8), blocks=1)))
SHAPES = dict(vector=(6,), spatial=(2, 4, 4))


def generator(seed=0): return torch.Generator().manual_seed(seed)


def latents(kind, n=80):
    "mu and logvar of n images: correlated, away from 0, narrow."
    D = torch.Size(SHAPES[kind]).numel()
    mu = torch.randn(n, D, generator=generator()) @ torch.randn(D, D, generator=generator(1)) / D**0.5 + 1
    return mu.view(n, *SHAPES[kind]), torch.full((n, *SHAPES[kind]), -3.0)


def fitted(kind, shape):
    options = dict(steps=20, batch_size=16, **QUICK[shape]) if kind == "flow" else {}
    return fit_prior(*latents(shape), kind, components=3, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_samples_scores_saves_and_loads(kind, shape, tmp_path):
    pytest.importorskip("sklearn" if kind == "gmm" else "torch")
    prior = fitted(kind, shape)
    z = prior.sample(5, generator())
    assert z.shape == (5, *SHAPES[shape]) and z.isfinite().all()
    assert torch.equal(z, prior.sample(5, generator())) and not torch.equal(z, prior.sample(5, generator(1)))
    prior.steps = 4   # of the solver: this is about shapes
    log_p = prior.log_prob(z, probes=1) if kind == "flow" else prior.log_prob(z)
    assert log_p.shape == (5,) and log_p.isfinite().all()
    prior.steps = 32
    assert not any(p.requires_grad for p in prior.parameters()) and prior.kind == kind
    cold = prior.sample(200, generator(), temperature=0.2)
    assert cold.std(0).mean() <= prior.sample(200, generator()).std(0).mean()
    prior.save(tmp_path / "prior.safetensors")
    again = load_prior(tmp_path / "prior.safetensors")
    assert torch.allclose(again.sample(5, generator()), z, atol=0.05)
    assert {k: v for k, v in prior.info.items() if k != "history"} == again.info


@pytest.mark.parametrize("shape", SHAPES)
def test_same_seed_same_flow(shape):
    one, two = fitted("flow", shape), fitted("flow", shape)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    before = torch.get_rng_state()
    fitted("flow", shape)
    assert torch.equal(before, torch.get_rng_state())   # nobody else's random numbers are used up


@pytest.mark.parametrize("shape", SHAPES)
def test_untrained_flow_is_the_gaussian_of_the_moments(shape):
    mu, logvar = latents(shape, 2000)
    flow = fit_prior(mu, logvar, "flow", steps=1, lr=0.0, batch_size=8, **QUICK[shape])
    mean, covariance = aggregate_moments(mu, logvar)
    flow.steps = 8
    z = flow.sample(4000, generator()).flatten(1).double()
    wanted = covariance if shape == "vector" else covariance.diag().diag()
    found = torch.cov(z.T)
    assert (z.mean(0) - mean).abs().max() < 0.15
    assert (found - wanted).abs().max() < 0.12 * wanted.diag().max()


def test_flow_learns_two_modes_that_a_gaussian_cannot():
    mu = torch.tensor([[-2.0], [2.0]]).repeat(50, 1)
    logvar = torch.full_like(mu, -4)
    flow = fit_prior(mu, logvar, steps=300, batch_size=128, lr=5e-3, network=dict(width=64, blocks=1))
    gaussian = fit_prior(mu, logvar, "gaussian")
    near = lambda z: ((z.abs() - 2).abs() < 0.6).float().mean()
    assert near(flow.sample(500, generator())) > 0.8 > 0.5 > near(gaussian.sample(500, generator()))


def test_time_limit_ends_the_training():
    prior = fit_prior(*latents("vector"), steps=10**6, seconds=0.3, batch_size=8, **QUICK["vector"])
    assert 10 <= prior.info["steps"] < 10**5


def test_the_loss_has_a_gradient_for_every_weight():
    torch.manual_seed(0)
    network = VelocityUNet((2, 8, 8), widths=(8, 8), blocks=1)
    for p in network.parameters(): p.data.add_(0.05 * torch.randn_like(p))
    flow_matching_loss(network, torch.randn(4, 2, 8, 8), generator()).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_integration_of_a_constant_velocity_is_exact():
    x = torch.randn(3, 2)
    assert torch.allclose(integrate(lambda x, t: torch.ones_like(x), x, steps=5), x + 1, atol=1e-6)


def test_draws_have_the_moments_of_the_aggregate_posterior():
    mu, logvar = latents("vector")
    z = draw_latents(mu, (logvar / 2).exp(), 100_000, generator()).double()
    mean, covariance = aggregate_moments(mu, logvar)
    assert (z.mean(0) - mean).abs().max() < 0.03 and (torch.cov(z.T) - covariance).abs().max() < 0.05


def test_fingerprint_knows_a_model_by_its_weights_alone(tmp_path):
    torch.manual_seed(0)
    model, other = VAE(latent=6, **TINY), VAE(latent=6, **TINY)
    prior = fit_prior(*latents("vector"), "gaussian", fingerprint=model_fingerprint(model))
    prior.save(tmp_path / "prior.safetensors")
    assert load_prior(tmp_path / "prior.safetensors", model).fingerprint == model_fingerprint(model)
    with pytest.raises(ValueError, match="the prior of another model"): load_prior(tmp_path / "prior.safetensors", other)
    with pytest.raises(ValueError, match=r"latents \(6,\).*\(2, 4, 4\)"):
        load_prior(tmp_path / "prior.safetensors", VAE(latent=[2, 4, 4], **TINY))


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_what_is_no_prior_is_refused(content, tmp_path):
    path = tmp_path / "prior.safetensors"
    if content is None: save_model(VAE(latent=6, **TINY), path)
    else: path.write_bytes(content)
    with pytest.raises(ValueError, match="prior.safetensors"): load_prior(path)
    with pytest.raises(ValueError, match="no such file"): load_prior(tmp_path / "absent.safetensors")


def test_shipped_sizes():
    "In half precision: a flow of vectors at most 1 MB, of 8x16x16 grids at most 6 MB."
    size = lambda prior: 2 * sum(v.numel() for v in prior.state_dict().values())
    assert size(FlowPrior((64,))) <= 1e6 and size(FlowPrior((8, 16, 16))) <= 6e6 and size(GaussianPrior((64,))) < 1e4


def test_mixture_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"): fit_prior(*latents("vector"), "gmm")


def test_nearest_neighbours_finds_a_copy():
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=generator())
    distance, index = nearest_neighbours(images[[3, 7]], images, k=3, batch_size=7)
    assert index[:, 0].tolist() == [3, 7] and (distance[:, 0] == 0).all() and (distance.diff(dim=1) >= 0).all()
    with pytest.raises(ValueError, match="k: expected 1 to 30"): nearest_neighbours(images, images, k=31)


@pytest.mark.slow
@pytest.mark.parametrize("latent", [6, [2, 4, 4]])
def test_benchmark_runs_to_its_end(latent, root, tmp_path):
    model = tmp_path / "model.safetensors"
    save_model(VAE(latent=latent, **TINY), model)
    command = [sys.executable, "benchmarks/prior.py", model, "--rehearse", "--images", "60", "--device", "cpu",
               "--out", tmp_path / "out", "--latents", tmp_path / "latents.npz"]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/prior.json").read_text())
    assert list(record["kinds"]) == list(KINDS) and record["fingerprint"]
    samples = np.load(tmp_path / "out/samples.npz")
    assert all(samples[kind].shape == (64, 3, 16, 16) and samples[kind].dtype == np.uint8 for kind in KINDS)
    assert load_prior(tmp_path / "out/prior_flow.safetensors").latent_shape == tuple([latent] if latent == 6 else latent)
