"What a model learned: metrics, the factor regressor, latent directions, and the commands that use them."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.script import CliError
from PIL import Image

from vae_nb import commands
from vae_nb.analysis import disentanglement, generate, metrics
from vae_nb.analysis import factors as fr
from vae_nb.analysis.prior import fit_prior, model_fingerprint
from vae_nb.data.dataset import to_float
from vae_nb.data.scenes import render, scene_factors
from vae_nb.model.vae import VAE
from vae_nb.train.checkpoint import save_model

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def truth(): return scene_factors(range(120), seed=31337)


@pytest.fixture(scope="module")
def pictures(truth): return to_float(render(truth, 64))


@pytest.fixture(scope="module", params=["vector", "grid"])
def model(request):
    torch.manual_seed(0)
    latent = 8 if request.param == "vector" else (2, 4, 4)
    return VAE(size=32, widths=(16, 16), latent=latent, blocks=1, patch_size=4, mid_blocks=0, group_size=8).eval()


@pytest.fixture(scope="module")
def small(pictures): return fr.at_side(pictures, 32)


class Prior:
    "A stand-in for a fitted prior."
    def __init__(self, shape, mean=0.0): self.shape, self.mean = shape, mean
    def sample(self, n, generator=None, temperature=1.0):
        return self.mean + temperature * torch.randn(n, *self.shape, generator=generator)


# ---- the factor regressor

def test_weights_are_small_and_their_record_is_in_the_file():
    path = ROOT / "vae_nb/weights/factor_regressor.safetensors"
    model = fr.load_factor_regressor()
    assert path.stat().st_size <= 1_000_000 and sum(p.numel() for p in model.parameters()) <= 500_000
    record = json.loads((ROOT / "benchmarks/results/factor_regressor_cpu.json").read_text())
    assert record["bytes"] == path.stat().st_size and record["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.facts == {key: record[key] for key in ("max_error", "min_confidence", "held_out")}


@pytest.mark.parametrize("size", [64, 128])
def test_factors_are_read_off_unseen_scenes(truth, size):
    errors = fr.factor_errors(fr.read_factors(to_float(render(truth[:60], size)))[0], truth[:60])
    assert max(errors[name] for name in fr.HUES) < 8 and errors["shape"] > 0.95
    assert min(errors[name] for name in fr.NUMBERS) > 0.95


def test_what_is_read_can_be_rendered(pictures):
    noise = torch.rand(8, 3, 64, 64) * 2 - 1
    factors, confidence = fr.read_factors(torch.cat([noise, pictures[:4]]))
    assert render(factors, 16).shape == (12, 3, 16, 16) and confidence.min() >= 0 and confidence.max() <= 1


def test_scenes_are_valid_and_ghosts_are_not(pictures):
    other = pictures.roll(1, 0)
    half = torch.cat([pictures[..., :32], other[..., 32:]], 3)
    rates = [fr.valid_scenes(x).float().mean() for x in (pictures, (pictures + other) / 2, half, torch.zeros(20, 3, 64, 64))]
    assert rates[0] > 0.92 and max(rates[1:]) < 0.1


def test_a_missing_file_of_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"): fr.load_factor_regressor(tmp_path / "x.safetensors")


# ---- metrics

def test_evaluation_is_plain_json_and_cards_have_one_layout(model, small, truth):
    result = metrics.evaluate(model, small, truth, Prior(model.latent_shape), scale=0.1, k=2)
    assert json.loads(json.dumps(result))["latents"] == result["latents"]
    assert result["reconstruction"].keys() == {"model", "mean image", "blurred, equal L1"}
    assert len(result["latents"]["kl"]) == model.D and result["bounds"]["elbo"] <= result["bounds"]["iwae"] + 1e3
    assert result["samples"]["images"] == [120, 120] and "Fréchet" in result["samples"]["name"]
    card = metrics.evaluation_card(model, small, result)
    assert [len(part.axes) for part in card.subfigs] == [2, 2, 1] and tuple(card.get_size_inches()) == (11, 9.6)
    without = metrics.evaluate(model, small)
    assert without["factors"] is None and "missing" in without["samples"]
    other = metrics.evaluation_card(model, small, without)
    assert [len(part.axes) for part in other.subfigs] == [2, 2, 1]


def test_perfect_reconstructions_beat_every_baseline(small):
    table = metrics._of_reconstructions(small, small + 0.01 * torch.randn_like(small), None)
    assert table["model"]["ssim"][0] > table["mean image"]["ssim"][0] + 0.2
    assert table["model"]["l1"][1] < table["model"]["l1"][0] < table["model"]["l1"][2]
    assert table["model"]["l1"][0] == pytest.approx(0.008, abs=0.0005)


def test_distances_fall_as_pictures_come_nearer(pictures):
    near, far = (pictures + noise * torch.randn_like(pictures) for noise in (0.02, 0.3))
    assert metrics.compare_sets(pictures, near)["frechet"] < metrics.compare_sets(pictures, far)["frechet"] / 3


@pytest.mark.parametrize("wrong, said", [
    (lambda x, m: metrics.evaluate(m, x[:9]), "at least 20 images, got 9"),
    (lambda x, m: metrics.compare_sets(x[:50], x[:50]), "more than 96 images .* got 50"),
    (lambda x, m: metrics.precision_recall(x[:3].flatten(1), x.flatten(1)), "more than 3 images, got 3"),
    (lambda x, m: metrics.feature_network("vgg"), "factors, squeeze or inception"),
    (lambda x, m: metrics.evaluate(m, x, prior=Prior((3, 3))), "prior: it is of another model"),
    (lambda x, m: generate.traversal(m, torch.zeros(m.latent_shape), [m.D]), "indices from 0 to "),
    (lambda x, m: generate.latent_map(m, x[:2]), "at least 3 images"),
    (lambda x, m: generate.FactorDirections(torch.zeros(50, 4), torch.zeros(50, 8)), "at least 100 scenes, got 50"),
    (lambda x, m: generate.with_factor(torch.zeros(1, 8), "colour", 1), "floor_hue"),
    (lambda x, m: generate.save_gif(x, "way.png"), "ends in .gif"),
    (lambda x, m: generate.save_latents(m, x, [], "codes.pt"), "ends in .npz"),
])
def test_bad_input_gets_one_clear_line(model, small, wrong, said):
    with pytest.raises(ValueError, match=said) as error: wrong(small, model)
    assert "\n" not in str(error.value)


# ---- generate

def test_a_temperature_of_zero_is_the_middle_of_the_prior(model):
    assert (generate.draw_codes(model, 3, Prior(model.latent_shape, 2.0), temperature=0) == 2).all()
    assert torch.equal(generate.draw_codes(model, 3, seed=5), generate.draw_codes(model, 3, seed=5))


@pytest.mark.parametrize("spherical", [False, True])
def test_both_ways_end_at_the_reconstructions(model, small, spherical):
    frames = generate.interpolation_frames(model, small[0], small[1], 5, spherical)
    assert torch.allclose(frames[[0, -1]], generate.reconstruct(model, small[:2]), atol=1e-4)


def test_arithmetic_is_undone_by_its_opposite(model, small, truth):
    z = generate.encode_all(model, small)
    directions = generate.FactorDirections(z, truth)
    turned = generate.with_factor(truth, "light", 50.0)
    there = directions.move(z, truth, turned)
    assert there.shape == z.shape and not torch.allclose(there, z)
    assert torch.allclose(directions.move(there, turned, truth), z, atol=1e-4)


def test_most_active_dimensions_have_the_largest_kl(model, small):
    kl = model.encode(small).kl().flatten(1).mean(0)
    assert generate.most_active(model, small, 3) == kl.topk(3).indices.tolist()


def test_codes_and_names_are_read_back(model, small, tmp_path):
    images = (small[:5] * 127.5 + 127.5).round().byte()
    generate.save_latents(model, images, list("abcde"), tmp_path / "z.npz")
    kept = np.load(tmp_path / "z.npz")
    assert kept["names"].tolist() == list("abcde") and kept["mu"].shape == (5, *model.latent_shape)
    assert np.allclose(kept["mu"], model.encode(images / 127.5 - 1).mu.detach(), atol=1e-5)


def test_an_evaluation_leaves_the_model_where_it_is(model, small, monkeypatch):
    "Bounds are computed on the CPU, of a copy: the model itself may be in use on a GPU."
    moved, cpu = [], torch.nn.Module.cpu
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: (moved.append(self), cpu(self))[1])
    assert metrics.evaluate(model, small[:20], scale=0.5, k=2)["bounds"]["k"] == 2
    assert moved and not any(module is model for module in moved)


# ---- commands

@pytest.fixture
def saved(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def folder(tmp_path, pictures):
    "Twenty-four pictures of a user's own."
    place = tmp_path / "mine"
    place.mkdir()
    for i, x in enumerate(pictures[:24]): generate.grid(x[None], pad=0).save(place / f"{i:02}.png")
    return place


def test_a_folder_of_ones_own_is_evaluated_mapped_and_encoded(saved, folder, capsys):
    commands.vae_evaluate(str(saved), data=str(folder), device="cpu")
    result = json.loads((saved / "evaluation.json").read_text())
    assert result["images"] == 24 and result["factors"] is None and (saved / "card.png").is_file()
    commands.vae_map(str(saved), data=str(folder), out=str(saved / "map.png"), device="cpu")
    commands.vae_traverse(str(saved), data=str(folder), out=str(saved / "t.png"), dims=3, steps=5, device="cpu")
    assert Image.open(saved / "t.png").size == (5 * 34 + 2, 3 * 34 + 2)
    commands.vae_encode(str(saved), str(folder), out=str(saved / "z.npz"), device="cpu")
    assert len(np.load(saved / "z.npz")["names"]) == 24


def test_samples_are_drawn_from_the_prior_beside_the_model(model, saved, folder, capsys):
    z = generate.encode_all(model, torch.rand(40, 3, 32, 32) * 2 - 1)
    fit_prior(z, torch.zeros_like(z) - 4, "gaussian", fingerprint=model_fingerprint(model)).save(saved / "prior.safetensors")
    prior = {}
    for how in ({}, dict(prior="none"), dict(prior=str(saved / "prior.safetensors"))):
        commands.vae_evaluate(str(saved), data=str(folder), device="cpu", **how)
        prior[how.get("prior", "auto")] = json.loads((saved / "evaluation.json").read_text())["prior"]
    assert list(prior.values()) == ["a fitted prior (gaussian)", "N(0, I)", "a fitted prior (gaussian)"]
    assert capsys.readouterr().out.count("samples are drawn from a fitted prior (gaussian)") == 2


@pytest.mark.parametrize("call, said", [
    (lambda run, mine: commands.vae_evaluate("nowhere"), "nowhere"),
    (lambda run, mine: commands.vae_evaluate(run), "give --data SOURCE"),
    (lambda run, mine: commands.vae_evaluate(run, data=mine, n=10), "at least 20 images, got 10"),
    (lambda run, mine: commands.vae_evaluate(run, run, data=mine, out="x"), "two runs"),
    (lambda run, mine: commands.vae_traverse(run, data=mine, out="t.doc"), "ends in .png"),
    (lambda run, mine: commands.vae_traverse(run, data=mine, factors=True), "known for scenes alone"),
    (lambda run, mine: commands.vae_map(run, data=mine, kind="tsne"), "expected pca or umap"),
    (lambda run, mine: commands.vae_encode(run, mine, out="z.txt"), "ends in .npz"),
    (lambda run, mine: commands.vae_encode(run), "which images"),
])
def test_commands_refuse_in_one_line(saved, folder, call, said):
    with pytest.raises(CliError, match=said) as error: call(str(saved), str(folder))
    assert str(error.value).startswith("vae-") and "\n" not in str(error.value)


# ---- disentanglement

def test_scores_tell_a_perfect_code_from_a_rotated_one():
    v = scene_factors(range(1500), seed=3).float()
    g = torch.Generator().manual_seed(0)
    perfect = disentanglement.standardize(v) + 0.02 * torch.randn(v.shape, generator=g)
    rotated = perfect @ torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    good, bad = (disentanglement.disentanglement(z, v) for z in (perfect, rotated))
    assert json.loads(json.dumps(good)) == good and len(good["of_factors"]["mig"]) == 8
    for key in ("mig", "sap", "dci_disentanglement", "dci_completeness"):
        assert good[key] > 0.75 and bad[key] < 0.5 * good[key], key


def test_one_dimension_for_two_factors_is_half_disentangled():
    assert disentanglement.dci(torch.eye(3)) == pytest.approx((1, 1))
    assert disentanglement.dci(torch.tensor([[1.0, 1.0], [0.0, 0.0]])) == pytest.approx((0, 1))


@pytest.mark.parametrize("wrong, said", [
    (lambda z, v: disentanglement.mig(z[:5], v), r"codes \(M,D\) and factors \(M,K\)"),
    (lambda z, v: disentanglement.sap(z[:, :1], v), "at least 2 latent dimensions, got 1"),
    (lambda z, v: disentanglement.binned(z, 200), "at least 200 rows"),
])
def test_codes_that_cannot_be_scored_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said): wrong(torch.randn(100, 4), torch.rand(100, 8))
