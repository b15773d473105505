"The model in more combinations than its notebook has room for."
import json

import pytest
import torch

from vae_nb.model.distributions import Posterior
from vae_nb.model.layers import FineUnpatch, Unpatch, groups
from vae_nb.model.vae import PRESETS, VAE, costs

TINY = dict(widths=[8, 16], blocks=1, stem=2, mid=1)  # downsampling 4


pytestmark = pytest.mark.usefixtures("one_thread")


def images(n, size):
    "Noise in the range of pixels: (n,3,size,size) in [-1,1]."
    return torch.rand(n, 3, size, size) * 2 - 1


@pytest.mark.parametrize("size", [4, 20, 64])
@pytest.mark.parametrize("kind", ["vector", "spatial"])
@pytest.mark.parametrize("mirror", [True, False])
def test_any_multiple_of_the_downsampling_works(size, kind, mirror):
    latent = 5 if kind == "vector" else (3, size // 4, size // 4)
    model = VAE(size, latent=latent, mirror=mirror, **TINY)
    x_hat, posterior = model(images(2, size))
    assert x_hat.shape == (2, 3, size, size) and x_hat.abs().max() <= 1
    assert posterior.mu.shape == posterior.kl().shape == posterior.std.shape == (2, *model.latent_shape)
    assert model.D == posterior.mu[0].numel() and model.downsampling == 4


@pytest.mark.parametrize("stem, levels", [(1, 1), (1, 3), (2, 2), (8, 1), (3, 2)])
def test_downsampling_is_the_stem_times_two_for_each_further_level(stem, levels):
    factor = stem * 2 ** (levels - 1)
    model = VAE(2 * factor, [8] * levels, (2, 2, 2), blocks=1, stem=stem, mid=0)
    assert model.downsampling == factor
    assert model.sample(3).shape == (3, 3, 2 * factor, 2 * factor)


@pytest.mark.parametrize("change, message", [
    (dict(size=30), r"size: expected a multiple of 4 .*got 30"),
    (dict(size=0), r"size: expected a multiple of 4"),
    (dict(latent=(3, 16, 16)), r"latent: .*\(C, 8, 8\) for images of 32 pixels and a downsampling of 4, got \[3, 16, 16\]"),
    (dict(latent=(0, 8, 8)), r"latent: expected"),
    (dict(latent=[8, 8]), r"latent: expected"),
    (dict(latent=-1), r"latent: expected a positive number"),
    (dict(latent="256"), r"latent: expected"),
    (dict(latent=None), r"latent: expected"),
    (dict(widths=[]), r"widths: expected"),
    (dict(widths=[8, 0]), r"widths: expected"),
    (dict(blocks=[1, 2, 3]), r"blocks: .*2 of them.*got \[1, 2, 3\]"),
    (dict(blocks=0), r"blocks: expected"),
    (dict(stem=0), r"stem >= 1 and mid >= 0, got stem=0"),
    (dict(mid=-1), r"mid=-1"),
])
def test_numbers_that_fit_no_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VAE(**dict(size=32, latent=5, **TINY) | change)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 16, 16), (2, 3, 32, 16)])
def test_images_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, 32, 32\), got"):
        VAE(32, latent=5, **TINY).encode(torch.zeros(shape))


@pytest.mark.parametrize("latent, shape", [(5, (2, 4)), (5, (5,)), ((3, 8, 8), (2, 192)), ((3, 8, 8), (3, 8, 8))])
def test_latents_of_the_wrong_shape_are_refused(latent, shape):
    with pytest.raises(ValueError, match=r"z: expected shape \(B, .*got"):
        VAE(32, latent=latent, **TINY).decode(torch.zeros(shape))


@pytest.mark.parametrize("latent", [5, (3, 8, 8)])
def test_hparams_survive_json_and_rebuild_the_model(latent):
    model = VAE(32, latent=latent, **TINY)
    again = VAE(**json.loads(json.dumps(model.hparams)))
    again.load_state_dict(model.state_dict())
    assert again.hparams == model.hparams
    x, seed = images(2, 32), torch.Generator()
    assert torch.equal(model(x, seed.manual_seed(1))[0], again(x, seed.manual_seed(1))[0])
    assert torch.equal(model.sample(2, seed.manual_seed(1)), again.sample(2, seed.manual_seed(1)))


@pytest.mark.parametrize("name, fewest, most", [("reference", 12.175, 12.185), ("default", 11.5, 12.5), ("demo", 3, 4)])
def test_presets_have_the_size_they_promise(name, fewest, most):
    model = VAE.preset(name)
    assert model.hparams == VAE(**PRESETS[name]).hparams
    assert fewest <= sum(p.numel() for p in model.parameters()) / 1e6 <= most


def test_the_default_needs_less_than_40_percent_of_the_reference_work():
    flop = {name: sum(row["flop"] for row in costs(VAE.preset(name))) for name in ("reference", "default")}
    assert round(flop["reference"] / 1e9, 1) == 24.0 and flop["default"] <= 9.6e9


def test_presets_fit_other_sizes_and_latents():
    assert VAE.preset("reference", size=64).latent_shape == (8, 8, 8)
    assert VAE.preset("default", size=64, latent=32).latent_shape == (32,)
    demo = VAE.preset("demo", size=32)
    side = 32 // demo.downsampling
    assert VAE.preset("demo", size=32, latent=(4, side, side)).latent_shape == (4, side, side)
    assert VAE.preset("default").hparams["latent"] == [8, 16, 16]  # a preset is not changed by those before it
    with pytest.raises(ValueError, match="preset: expected one of reference, default, demo, got 'large'"):
        VAE.preset("large")
    with pytest.raises(ValueError, match="size: expected a multiple of"):
        VAE.preset("default", size=100)


@pytest.mark.parametrize("latent", [5, (3, 8, 8)])
def test_channels_last_changes_nothing_but_the_memory(latent):
    model = VAE(32, latent=latent, **TINY).eval()
    x = images(2, 32)
    with torch.no_grad():
        before = model.encode(x)
        x_hat = model.decode(before.mode())
        model = model.to(memory_format=torch.channels_last)
        after = model.encode(x.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(after.logvar, before.logvar, atol=1e-4)
        assert torch.allclose(model.decode(after.mode()), x_hat, atol=1e-4)


@pytest.mark.parametrize("latent", [5, (3, 8, 8)])
def test_bfloat16_autocast_gives_float32_and_finite_gradients(latent):
    model = VAE(32, latent=latent, **TINY)
    x = images(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, posterior = model(x)
    assert x_hat.dtype == posterior.mu.dtype == posterior.logvar.dtype == posterior.kl().dtype == torch.float32
    ((x_hat - x).abs().mean() + posterior.kl().mean()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_absurd_features_still_give_a_finite_loss():
    model = VAE(32, latent=5, **TINY)
    with torch.no_grad():
        model.to_posterior[-1].weight.mul_(1e6)
        x_hat, posterior = model(images(2, 32))
    assert x_hat.isfinite().all() and posterior.kl().isfinite().all() and posterior.logvar.abs().max() <= 10


def test_sampling_leaves_no_graph_and_follows_its_generator():
    model = VAE(32, latent=5, **TINY)
    a, b, c = (model.sample(2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert not a.requires_grad and torch.equal(a, b) and not torch.equal(a, c)


def test_kl_is_exact_where_posterior_and_prior_almost_agree():
    "1 + logvar^2 / 4 would drown in rounding if exp(logvar) - 1 were computed in two steps"
    tiny = torch.tensor([1e-3, -1e-3])
    assert torch.allclose(Posterior(torch.zeros(2), tiny).kl(), tiny.double().pow(2).float() / 4, rtol=2e-3)


def test_an_unpatch_starts_smooth():
    "At the start only the base is painted: a flat input gives a flat picture, whatever the patch"
    for patch in (1, 2, 8):
        y = Unpatch(16, 3, patch)(torch.ones(1, 16, 8, 8))
        assert y.shape == (1, 3, 8 * patch, 8 * patch)
        assert y[..., 3 * patch:-3 * patch, 3 * patch:-3 * patch].std((2, 3)).max() < 1e-5


def test_a_retouched_picture_starts_as_its_draft_and_everything_learns_after_one_step():
    torch.manual_seed(0)
    last = FineUnpatch(16, 3, 8, width=8)
    y = last(torch.ones(1, 16, 8, 8))
    assert y.shape == (1, 3, 64, 64) and y[..., 24:-24, 24:-24].std((2, 3)).max() < 1e-5
    model, x = VAE(32, [16], 4, blocks=1, stem=8, mid=0, fine=8), images(4, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        x_hat, posterior = model(x)
        ((x_hat - x).abs().mean() + posterior.kl().mean()).backward()
        optimizer.step()
    assert model.downsampling == 8 and all(p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("fine, stem", [(8, 1), (8, 2), (8, 7), (-1, 8)])
def test_a_closer_look_needs_squares_to_fold_in_two_steps(fine, stem):
    with pytest.raises(ValueError, match=f"fine: expected 0, or a number of channels .* got fine={fine} and stem={stem}"):
        VAE(stem, [16], 4, stem=stem, fine=fine)


def test_groups_keep_both_limits_at_every_width():
    for c in range(1, 513):
        g = groups(c)
        assert c % g == 0 and g <= 32 and (g == 1 or c // g >= 4)
    with pytest.raises(ValueError, match="at least one channel, got 0"):
        groups(0)
