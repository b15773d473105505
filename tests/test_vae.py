"The model in more combinations than its notebook has room for."
import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch.nn import functional as F

from vae_nb.analysis.generate import draw_codes
from vae_nb.model.distributions import Posterior
from vae_nb.model.layers import Down, PatchEmbed, PixelShuffleHead, ResBlock, Up, conv, groups
from vae_nb.model.refinements import HalfResHead, Hourglass
from vae_nb.model.vae import PRESETS, VAE, VAEConfig, costs
from vae_nb.train.config import CHOICES, RECIPES, recipe

TINY = dict(widths=[8, 16], blocks=1, patch_size=2, mid_blocks=1)  # downsampling 4


pytestmark = pytest.mark.usefixtures("one_thread")


def images(n, size):
    "Noise in the range of pixels: (n,3,size,size) in [-1,1]."
    return torch.rand(n, 3, size, size) * 2 - 1


@pytest.mark.parametrize("size", [4, 20, 64])
@pytest.mark.parametrize("kind", ["vector", "spatial"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_multiple_of_the_downsampling_works(size, kind, symmetric):
    latent = 5 if kind == "vector" else (3, size // 4, size // 4)
    model = VAE(size=size, latent=latent, symmetric=symmetric, **TINY)
    x_hat, posterior = model(images(2, size))
    assert x_hat.shape == (2, 3, size, size) and x_hat.abs().max() <= 1
    assert posterior.mu.shape == posterior.kl().shape == posterior.std.shape == (2, *model.latent_shape)
    assert model.D == posterior.mu[0].numel() and model.config.downsampling == 4


@pytest.mark.parametrize("patch_size, levels", [(1, 1), (1, 3), (2, 2), (8, 1), (3, 2)])
def test_downsampling_is_the_patch_times_two_for_each_further_level(patch_size, levels):
    factor = patch_size * 2 ** (levels - 1)
    model = VAE(size=2 * factor, widths=[8] * levels, latent=(2, 2, 2), blocks=1, patch_size=patch_size, mid_blocks=0)
    assert model.config.downsampling == factor
    assert model.sample(3).shape == (3, 3, 2 * factor, 2 * factor)


@pytest.mark.parametrize("change, message", [
    (dict(size=30), r"size: expected a multiple of 4 .*got 30"),
    (dict(size=0), r"size: expected a multiple of 4"),
    (dict(latent=(3, 16, 16)), r"latent: .*\(C, 8, 8\) for images of 32 pixels and a downsampling of 4, got \(3, 16, 16\)"),
    (dict(latent=(0, 8, 8)), r"latent: expected"),
    (dict(latent=[8, 8]), r"latent: expected"),
    (dict(latent=-1), r"latent: expected a positive number"),
    (dict(latent="256"), r"latent: expected"),
    (dict(latent=None), r"latent: expected"),
    (dict(widths=[]), r"widths: expected"),
    (dict(widths=[8, 0]), r"widths: expected"),
    (dict(blocks=[1, 2, 3]), r"blocks: .*2 of them.*got \(1, 2, 3\)"),
    (dict(blocks=0), r"blocks: expected"),
    (dict(patch_size=0), r"patch_size: expected a whole number >= 1, got 0"),
    (dict(patch_size=True), r"patch_size: expected a whole number"),
    (dict(mid_blocks=-1), r"mid_blocks: expected a whole number >= 0, got -1"),
    (dict(group_size=0), r"group_size: expected a whole number >= 1"),
    (dict(full_res_channels=8, half_res_channels=8, patch_size=4), r"full_res_channels: expected 0 unless"),
    (dict(decoder=dict(stem=2)), r"decoder: expected some of widths, .*got stem"),
    (dict(decoder=dict(latent=2)), r"decoder: expected some of widths, .*got latent"),
    (dict(decoder=dict(patch_size=4)), r"decoder: expected the encoder's downsampling of 4, got 8"),
    (dict(decoder=dict(widths=[8, -1])), r"widths: expected"),
])
def test_numbers_that_fit_no_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**dict(size=32, latent=5, **TINY) | change)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 16, 16), (2, 3, 32, 16)])
def test_images_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, 32, 32\), got"):
        VAE(size=32, latent=5, **TINY).encode(torch.zeros(shape))


@pytest.mark.parametrize("latent, shape", [(5, (2, 4)), (5, (5,)), ((3, 8, 8), (2, 192)), ((3, 8, 8), (3, 8, 8))])
def test_latents_of_the_wrong_shape_are_refused(latent, shape):
    with pytest.raises(ValueError, match=r"z: expected shape \(B, .*got"):
        VAE(size=32, latent=latent, **TINY).decode(torch.zeros(shape))


@pytest.mark.parametrize("latent", [5, (3, 8, 8)])
def test_hparams_survive_json_and_rebuild_the_model(latent):
    model = VAE(size=32, latent=latent, **TINY)
    again = VAE(**json.loads(json.dumps(model.hparams)))
    again.load_state_dict(model.state_dict())
    assert again.hparams == model.hparams
    x, seed = images(2, 32), torch.Generator()
    assert torch.equal(model(x, seed.manual_seed(1))[0], again(x, seed.manual_seed(1))[0])
    assert torch.equal(model.sample(2, seed.manual_seed(1)), again.sample(2, seed.manual_seed(1)))


@pytest.mark.parametrize("name, fewest, most", [("reference", 12.175, 12.185), ("default", 11.5, 12.5), ("web", 1, 4),
                                                ("demo", 0.55, 0.65)])
def test_presets_have_the_size_they_promise(name, fewest, most):
    model = VAE.from_preset(name)
    assert model.config == PRESETS[name] == VAEConfig(**json.loads(json.dumps(model.hparams)))
    assert fewest <= sum(p.numel() for p in model.parameters()) / 1e6 <= most


def test_the_default_needs_less_than_40_percent_of_the_reference_work():
    flop = {name: sum(row["flop"] for row in costs(VAE.from_preset(name))) for name in ("reference", "default")}
    assert round(flop["reference"] / 1e9, 1) == 24.0 and flop["default"] <= 9.6e9


def test_web_can_be_decoded_in_a_browser():
    "0.8 GFLOP for a decode and 8 MB in half precision are what one core and a page can bear"
    model = VAE.from_preset("web")
    flop = sum(row["flop"] for row in costs(model) if row["part"] in ("from_latent", "decoder"))
    assert flop <= 0.8e9 and 2 * sum(p.numel() for p in model.parameters()) <= 8e6 and model.size == 128


def test_every_preset_has_a_recipe_and_can_be_chosen():
    assert set(PRESETS) == set(RECIPES) == set(CHOICES["preset"])
    for name in PRESETS:
        assert recipe(name).size == PRESETS[name].size


def test_presets_fit_other_sizes_and_latents():
    assert VAE.from_preset("reference", size=64).latent_shape == (8, 8, 8)
    assert VAE.from_preset("default", size=64, latent=32).latent_shape == (32,)
    demo = VAE.from_preset("demo", size=32)
    side = 32 // demo.config.downsampling
    assert VAE.from_preset("demo", size=32, latent=(4, side, side)).latent_shape == (4, side, side)
    assert VAE.from_preset("default").hparams["latent"] == [8, 16, 16]  # a preset is not changed by those before it
    with pytest.raises(ValueError, match="preset: expected one of reference, default, web, demo, got 'large'"):
        VAE.from_preset("large")
    with pytest.raises(ValueError, match="size: expected a multiple of"):
        VAE.from_preset("default", size=100)
    for latent in (None, 5):
        with pytest.raises(ValueError, match="size: expected a multiple of 8 .*got 0"):
            VAE.from_preset("default", size=0, latent=latent)


@pytest.mark.parametrize("latent", [5, (3, 8, 8)])
def test_channels_last_changes_nothing_but_the_memory(latent):
    model = VAE(size=32, latent=latent, **TINY).eval()
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
    model = VAE(size=32, latent=latent, **TINY)
    x = images(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, posterior = model(x)
    assert x_hat.dtype == posterior.mu.dtype == posterior.logvar.dtype == posterior.kl().dtype == torch.float32
    ((x_hat - x).abs().mean() + posterior.kl().mean()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_absurd_features_still_give_a_finite_loss():
    model = VAE(size=32, latent=5, **TINY)
    with torch.no_grad():
        model.to_posterior[-1].weight.mul_(1e6)
        x_hat, posterior = model(images(2, 32))
    assert x_hat.isfinite().all() and posterior.kl().isfinite().all() and posterior.logvar.abs().max() <= 10


def test_sampling_leaves_no_graph_and_follows_its_generator():
    model = VAE(size=32, latent=5, **TINY)
    a, b, c = (model.sample(2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert not a.requires_grad and torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("given", [dict(n=0), dict(n=1, temperature=-1.0), dict(n=1, temperature=float("nan"))])
@pytest.mark.parametrize("draw", [VAE.sample, draw_codes])
def test_no_image_and_no_negative_temperature_are_refused_by_whatever_draws(draw, given):
    with pytest.raises(ValueError, match="temperature" if "temperature" in given else "at least one image"):
        draw(VAE(size=32, latent=5, **TINY), **given)


def test_a_configuration_and_its_fields_at_once_are_refused():
    with pytest.raises(TypeError, match="dataclasses.replace"): VAE(PRESETS["demo"], latent=256)
    assert VAE(replace(PRESETS["demo"], latent=256)).latent_shape == (256,)


def test_kl_is_exact_where_posterior_and_prior_almost_agree():
    "1 + logvar^2 / 4 would drown in rounding if exp(logvar) - 1 were computed in two steps"
    tiny = torch.tensor([1e-3, -1e-3])
    assert torch.allclose(Posterior(torch.zeros(2), tiny).kl(), tiny.double().pow(2).float() / 4, rtol=2e-3)


def test_a_pixel_shuffle_head_starts_smooth():
    "At the start there is only the base: a flat input gives a flat picture, whatever the patch"
    for patch in (1, 2, 8):
        y = PixelShuffleHead(16, 3, patch)(torch.ones(1, 16, 8, 8))
        assert y.shape == (1, 3, 8 * patch, 8 * patch)
        assert y[..., 3 * patch:-3 * patch, 3 * patch:-3 * patch].std((2, 3)).max() < 1e-5


def test_a_refined_picture_starts_as_its_base_and_everything_learns_after_one_step():
    torch.manual_seed(0)
    last = HalfResHead(16, 3, 8, width=8)
    y = last(torch.ones(1, 16, 8, 8))
    assert y.shape == (1, 3, 64, 64) and y[..., 24:-24, 24:-24].std((2, 3)).max() < 1e-5
    model, x = VAE(size=32, widths=[16], latent=4, blocks=1, patch_size=8, mid_blocks=0, half_res_channels=8), images(4, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        x_hat, posterior = model(x)
        ((x_hat - x).abs().mean() + posterior.kl().mean()).backward()
        optimizer.step()
    assert model.config.downsampling == 8 and all(p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("channels, patch", [(8, 1), (8, 2), (8, 7), (-1, 8)])
def test_a_half_resolution_branch_needs_patches_to_fold_in_two_steps(channels, patch):
    with pytest.raises(ValueError, match="half_res_channels: expected .*got"):
        VAEConfig(size=patch, widths=[16], latent=4, patch_size=patch, half_res_channels=channels)


def test_groups_keep_both_limits_at_every_width():
    for c in range(1, 513):
        g = groups(c)
        assert c % g == 0 and g <= 32 and (g == 1 or c // g >= 4)
    with pytest.raises(ValueError, match="at least one channel, got 0"):
        groups(0)


# ---- what shapes and parameter counts do not show: activations, bounds, groups, types, scales

def silu_norm(x, groups, norm):
    "SiLU after GroupNorm, from torch's own functions and with the number of groups given."
    return F.silu(F.group_norm(x, groups, norm.weight, norm.bias))


def same_conv(x, layer):
    "A 3x3 convolution of stride 1 that keeps the size, with the weights of a layer."
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize("c_in, c_out", [(32, 32), (32, 48)])
def test_a_residual_block_is_its_formula(c_in, c_out):
    torch.manual_seed(0)
    block, x = ResBlock(c_in, c_out, group_size=16), torch.randn(2, c_in, 7, 7)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight, 1, 0.1)
        torch.nn.init.normal_(norm.bias, 0, 0.1)
    h = same_conv(silu_norm(x, 2, block.norm1), block.conv1)
    h = same_conv(silu_norm(h, c_out // 16, block.norm2), block.conv2)
    skip = x if c_in == c_out else F.conv2d(x, block.skip.weight, block.skip.bias)
    assert torch.allclose(block(x), skip + h, atol=1e-5)


def test_convolutions_start_with_the_scale_they_promise():
    torch.manual_seed(0)
    for layer, std in [(conv(64, 64), 1 / 24), (conv(64, 64, kernel=1), 1 / 8), (conv(64, 64, gain=0.5), 1 / 48),
                       (ResBlock(64).conv1, 1 / 24), (ResBlock(64).conv2, 0.1 / 24), (Hourglass(64, 64).project, 0.1 / 24)]:
        assert abs(layer.weight.std() / std - 1) < 0.05 and not layer.bias.any()


def test_resolution_changes_by_stride_and_by_repeating():
    torch.manual_seed(0)
    x, down, up = torch.randn(2, 8, 6, 6), Down(8, 4), Up(8, 4)
    assert torch.allclose(down(x), same_conv(x, down.conv)[..., ::2, ::2], atol=1e-6)
    twice = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(up(x), same_conv(twice, up.conv), atol=1e-6)


def test_an_hourglass_is_its_formula():
    torch.manual_seed(0)
    layer, x = Hourglass(8, 32, group_size=16), torch.randn(2, 8, 6, 6)
    down, block, norm, _ = layer.low_res
    h = silu_norm(block(down(x)), 2, norm).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(layer(x), x + same_conv(h, layer.project), atol=1e-5)


def test_heads_and_stems_are_their_formulas():
    torch.manual_seed(0)
    x, stem, head = torch.randn(2, 3, 8, 8), PatchEmbed(3, 8, 2), PixelShuffleHead(8, 3, 2)
    torch.nn.init.normal_(head.detail.weight)
    assert torch.allclose(stem(x), same_conv(F.pixel_unshuffle(x, 2), stem.conv), atol=1e-6)
    h = torch.randn(2, 8, 8, 8)
    base = F.interpolate(same_conv(h, head.base), scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(head(h), base + F.pixel_shuffle(same_conv(h, head.detail), 2), atol=1e-5)


def test_features_end_in_silu_not_in_another_activation():
    "SiLU's lowest value is -0.2785; ReLU's is 0, GELU's -0.17, none at all goes far below"
    torch.manual_seed(0)
    model = VAE(size=32, latent=5, **TINY)
    assert -0.27847 < model.encoder(images(64, 32)).min() < -0.2784
    before_head = model.decoder.layers[:-1](torch.randn(64, 16, 8, 8))
    assert -0.27847 < before_head.min() < -0.2784


def test_means_are_free_and_log_variances_bounded_by_ten():
    model = VAE(size=32, latent=5, **TINY)
    with torch.no_grad():
        model.to_posterior[-1].weight.mul_(30)
        assert model.encode(images(8, 32)).mu.abs().max() > 10
        model.to_posterior[-1].weight.mul_(1e4)
        logvar = model.encode(images(8, 32)).logvar
    assert logvar.max() == 10 and logvar.min() == -10


@pytest.mark.parametrize("options", [dict(), dict(half_res_channels=16), dict(full_res_channels=8)])
def test_pixels_are_finer_than_bfloat16(options):
    model = VAE(size=32, widths=[16], latent=5, patch_size=4, **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x_hat, posterior = model(images(2, 32))
    for found in (x_hat, posterior.logvar):
        assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


def norms(module):
    "(channels, groups) of every GroupNorm."
    return {(m.num_channels, m.num_groups) for m in module.modules() if isinstance(m, torch.nn.GroupNorm)}


def test_group_sizes_reach_both_halves():
    wide = VAE(size=32, widths=[32, 64], latent=5, patch_size=2, group_size=16, hourglass_channels=48)
    assert norms(wide.encoder) == norms(wide.decoder) == {(32, 2), (64, 4), (48, 3)}
    other = VAE(size=32, widths=[32, 64], latent=5, patch_size=2, group_size=16, decoder=dict(group_size=8))
    assert norms(other.encoder) == {(32, 2), (64, 4)} and norms(other.decoder) == {(32, 4), (64, 8)}
    assert norms(VAE(size=32, widths=[32, 64], latent=5, patch_size=2).decoder) == {(32, 8), (64, 16)}


def test_the_decoder_is_what_its_fields_say_and_the_encoder_stays():
    plain = VAE(size=32, widths=[16, 32], latent=5, patch_size=4, blocks=1)
    other = VAE(size=32, widths=[16, 32], latent=5, patch_size=4, blocks=1,
                decoder=dict(widths=[8, 16, 64], patch_size=2, blocks=[3, 2, 1], mid_blocks=0, full_res_channels=6))
    shapes = [{name: p.shape for name, p in model.encoder.named_parameters()} for model in (plain, other)]
    assert shapes[0] == shapes[1]
    blocks = [m.conv1.weight.shape[:2] for m in other.decoder.modules() if isinstance(m, ResBlock)]
    assert blocks == [(16, 64), (16, 16), (8, 16), (8, 8), (8, 8), (8, 8)]   # (out, in), from the latent to the pixels
    assert other.decoder.layers[-1][0].weight.shape == (24, 8, 3, 3) and other.sample(2).shape == (2, 3, 32, 32)
    assert VAE(**json.loads(json.dumps(other.hparams))).config == other.config


def count_blocks(module):
    "Number of residual blocks."
    return sum(isinstance(m, ResBlock) for m in module.modules())


def test_every_field_makes_the_blocks_it_says():
    both = dict(size=32, widths=[16, 16], latent=5, patch_size=4)
    for change, encoder, decoder in [(dict(blocks=3, mid_blocks=1), 7, 7), (dict(blocks=[1, 2], mid_blocks=0), 3, 3),
                                     (dict(blocks=1, hourglass_channels=8), 5, 5),
                                     (dict(blocks=1, half_res_channels=8), 5, 14),
                                     (dict(blocks=1, half_res_channels=8, half_res_blocks=3), 5, 7)]:
        model = VAE(**both, **change)
        assert (count_blocks(model.encoder), count_blocks(model.decoder)) == (encoder, decoder), change


def test_the_decoder_narrows_before_or_after_upsampling():
    for symmetric, width in [(True, 8), (False, 16)]:
        model = VAE(size=32, widths=[8, 16], latent=5, patch_size=2, blocks=1, mid_blocks=0, symmetric=symmetric)
        [up] = [m for m in model.decoder.modules() if isinstance(m, Up)]
        assert up.conv.weight.shape[:2] == (width, width)


def test_a_configuration_cannot_be_changed_only_replaced():
    config = VAEConfig(size=64, widths=[16, 32], latent=[4, 32, 32])
    with pytest.raises(FrozenInstanceError):
        config.size = 32
    assert config.widths == (16, 32) and config.latent == (4, 32, 32)
    assert config.resized(32) == replace(config, size=32, latent=(4, 16, 16))
