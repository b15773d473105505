"What the pages about shapes and scenes do not check: that the standard set never changes, memory, odd sizes, broken runs."
import hashlib
import math
import subprocess
import sys

import pytest
import torch

from vae_nb.data import scenes as S
from vae_nb.data.scenes import FACTORS, SDF, SHAPES, _trace, render, scene_factors, scenes

def test_standard_set_is_what_it_was():
    "Reconstructions, caches and reported scores refer to these numbers and pictures: a change here is a new data set."
    factors = scene_factors(range(15_000))
    assert hashlib.sha256(factors.numpy().tobytes()).hexdigest()[:16] == "58913d8cf03cea92"
    coarse = torch.nn.functional.avg_pool2d(render(factors[:6], 64).float(), 32).round().int()
    expected = torch.tensor([
        [151, 163, 156, 135, 189, 200, 224, 196, 205, 216, 207, 189],
        [147, 144, 176, 159, 204, 201, 220, 201, 192, 188, 162, 148],
        [190, 189, 142, 178, 183, 182, 161, 201, 236, 227, 210, 243],
        [178, 198, 175, 150, 174, 191, 209, 182, 195, 216, 200, 175],
        [179, 187, 216, 189, 177, 189, 192, 167, 178, 188, 164, 144],
        [118, 131, 177, 149, 187, 198, 195, 167, 199, 211, 237, 212]])
    assert (coarse.flatten(1) - expected).abs().max() <= 1
    assert S.SCENES_VERSION == 1  # the name of these pictures: other pictures, another number


def test_factors_fill_their_ranges():
    factors = scene_factors(range(15_000))
    for (name, f), v in zip(FACTORS.items(), factors.T):
        assert f.low <= v.min() and v.max() <= f.high
        if name != "shape":
            assert v.min() < f.low + .01 * (f.high - f.low) and v.max() > f.high - .01 * (f.high - f.low)
    counts = torch.bincount(factors[:, 3].long(), minlength=len(SHAPES))
    assert (counts - 2500).abs().max() < 5 * math.sqrt(15_000 * (1 / 6) * (5 / 6))
    assert len(factors.unique(dim=0)) == 15_000


@pytest.mark.parametrize("index", [torch.tensor([2, 9]), [2, 9], range(2, 10, 7), (2, 9)])
def test_any_list_of_integers_is_an_index(index):
    assert torch.equal(scene_factors(index, seed=-1), scene_factors(range(10), seed=-1)[[2, 9]])


def test_far_images_and_large_seeds_have_factors_too():
    assert scene_factors([2**40], seed=2**63).isfinite().all()
    assert not torch.equal(scene_factors([0], seed=0), scene_factors([0], seed=1))


@pytest.mark.parametrize("size", [8, 9, 100, 257])
def test_any_size(size):
    small, large = render(scene_factors(range(3)), size), render(scene_factors(range(3)), 4 * size)
    assert small.shape == (3, 3, size, size)
    shrunk = torch.nn.functional.avg_pool2d(large.float(), 4)
    assert (small - shrunk).abs().mean() < (6 if size < 16 else 1.5)  # the same picture, whatever its size


def test_no_factors_no_pictures():
    assert render(torch.empty(0, len(FACTORS)), 16).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("name", FACTORS)
def test_ends_of_every_range_can_be_painted_and_more_cannot(name):
    k, factors = list(FACTORS).index(name), scene_factors([0, 1])
    factors[0, k], factors[1, k] = FACTORS[name].low, FACTORS[name].high
    assert render(factors, 16).float().std() > 5
    for v in (FACTORS[name].low - 1, FACTORS[name].high + 1, math.nan, math.inf):
        factors[1, k] = v
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            render(factors, 16)


def rays(count=20_000):
    "Unit rays from all around, aimed into and past the object."
    g = torch.Generator().manual_seed(0)
    o = torch.randn(3, count, generator=g)
    o[1] = o[1].abs()
    o = 4 * o / o.norm(dim=0)
    aim = torch.rand(3, count, generator=g) * 2.4 - 1.2 + torch.tensor([[0], [.7], [0]])
    return o, (aim - o) / (aim - o).norm(dim=0)


@pytest.mark.parametrize("name", SHAPES)
def test_rays_find_the_first_surface_and_nothing_else(name):
    sdf, (o, d) = SDF[name], rays()
    t = _trace(sdf, o, d, careful=name == "torus")
    deepest, before = torch.full_like(t, 9), torch.full_like(t, 9)
    for s in torch.linspace(1.5, 7, 1100):
        h = sdf(*(o + s * d))
        deepest = torch.minimum(deepest, h)
        before = torch.where(s < t - .01, torch.minimum(before, h), before)
    assert t.isfinite()[deepest < -.005].all() and t.isinf()[deepest > .005].all()
    assert before.min() > -.005
    assert sdf(*(o + t * d)[:, t.isfinite()]).abs().max() < 5e-4


def test_torus_needs_careful_steps():
    o, d = rays()
    careful, bold = (_trace(SDF["torus"], o, d, careful=c) for c in (True, False))
    assert (careful.isfinite() & ((bold - careful).abs() > .1)).any()


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_mirror_scenes_make_mirror_pictures(shape):
    turns = [(azimuth, elevation, light) for azimuth in (0, 27) for elevation in (10, 26) for light in (20, 60)]
    f = torch.tensor([[30., 200, 280, shape, 1.2, azimuth, elevation, light] for azimuth, elevation, light in turns])
    mirrored = f * torch.tensor([1, 1, 1, 1, 1, -1, 1, -1])
    wrong = (render(f, 128).float() - render(mirrored, 128).float().flip(3)).abs().amax(1)
    assert wrong.mean() < .3 and wrong.max() < 60  # the eight rays at an edge are not their own mirror image


def test_threads_are_given_back_when_a_batch_fails(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of paint")
    monkeypatch.setattr(S, "_paint", broken)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="out of paint"):
        render(scene_factors(range(20)), 16)
    assert torch.get_num_threads() == before


def test_working_memory_is_small():
    "300 pictures at 128x128 take 15 MB; painting them takes at most 100 MB more on one thread."
    code = """
        import resource, torch
        torch.set_num_threads(1)
        from vae_nb.data.scenes import scenes
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scenes(1, 8); before = peak(); scenes(300); print(peak() - before)"""
    said = subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
                          capture_output=True, text=True, check=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    assert int(said) * unit < 115e6


def test_scenes_are_prefixes_of_each_other():
    few, many = scenes(3, size=32, seed=7), scenes(11, size=32, seed=7)
    assert all(torch.equal(a, b[:3]) for a, b in zip(few, many))
