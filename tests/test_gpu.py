"""What only a GPU can show. Where there is none, every test here is skipped by name.

    python -m pytest -m gpu -q tests/test_gpu.py
"""
import copy
import socket

import pytest
import torch
import torch.distributed as dist

from vae_nb.data.scenes import render, scene_factors
from vae_nb.loss.lpips import LPIPS
from vae_nb.loss.objective import Objective
from vae_nb.train.checkpoint import load_state, save_state
from vae_nb.train.config import recipe
from vae_nb.train.distributed import DDP, SINGLE
from vae_nb.train.loop import Reporter, fit, new_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
IMAGES = render(scene_factors(range(64)), 32)
INDEX = torch.arange(64)


def tiny(**given):
    return recipe("demo", **{**dict(size=32, latent="16", batch_size=8, epochs=4, warmup=5, device="cuda", lpips="none",
                                    compile="off", log_every=1, beta_schedule="warmup"), **given})


class Watch(Reporter):
    "Calls a function after every step."
    def __init__(self, watch): self.step = watch


def trained(state, images=IMAGES, objective=None, process=SINGLE):
    "The loss of every step."
    losses = []
    watch = Watch(lambda state, terms: losses.append(terms["loss"].clone()))
    fit(state, objective or Objective(), images, INDEX, reporter=watch, process=process)
    return torch.stack(losses).cpu()


def test_a_recorded_step_does_what_an_ordinary_one_does():
    ordinary, recorded = (new_state(tiny(precision="fp32", cuda_graph=choice, deterministic=True)) for choice in ("off", "on"))
    a, b = trained(ordinary), trained(recorded)
    assert torch.allclose(a, b, rtol=1e-4), (a - b).abs().max()
    assert a[-1] < 0.8 * a[0]
    for p, q in zip(ordinary.ema.parameters(), recorded.ema.parameters()): assert torch.allclose(p, q, atol=1e-3)


def test_a_compiled_step_follows_the_same_curve():
    a, b = (trained(new_state(tiny(compile=choice, epochs=8))) for choice in ("off", "on"))
    assert torch.allclose(a[-8:].mean(), b[-8:].mean(), rtol=0.05), (a / b)


@pytest.mark.parametrize("choice", ["off", "on"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, choice):
    config = tiny(deterministic=True, cuda_graph=choice)
    whole = new_state(config)
    trained(whole)
    half = new_state(config)
    fit(half, Objective(), IMAGES, INDEX, stop=lambda: half.step == 17)
    save_state(half, tmp_path / "checkpoint.safetensors")
    rest = load_state(tmp_path / "checkpoint.safetensors")
    assert rest.step == 17
    trained(rest)
    for p, q in zip(whole.model.parameters(), rest.model.parameters()): assert torch.equal(p, q)
    for p, q in zip(whole.ema.parameters(), rest.ema.parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize("choice", ["off", "on"])
def test_fp16_scales_its_loss(choice):
    state = new_state(tiny(precision="fp16", cuda_graph=choice, epochs=8))
    losses = trained(state)
    assert losses.isfinite().all() and losses[-1] < 0.8 * losses[0] and 1 < state.loss_scale < 2 ** 17
    assert state.nonfinite_steps == 0


def test_a_broken_step_changes_no_weight_even_when_recorded():
    state = new_state(tiny())
    class Spoilt(Objective):
        def forward(self, *given):
            terms = super().forward(*given)
            return {**terms, "loss": terms["loss"] * self.spoil}
    objective = Spoilt().to("cuda")
    objective.spoil = torch.ones((), device="cuda")
    seen = []
    def watch(state, terms):
        seen.append((state.step, bool(terms["skipped"]), copy.deepcopy([p.detach() for p in state.model.parameters()])))
        objective.spoil.fill_(float("nan") if state.step == 12 else 1.0)
    fit(state, objective, IMAGES, INDEX, reporter=Watch(watch))
    skipped = [step for step, broken, _ in seen if broken]
    assert skipped == [13]
    assert all(torch.equal(p, q) for p, q in zip(seen[11][2], seen[12][2]))
    assert not all(torch.equal(p, q) for p, q in zip(seen[12][2], seen[13][2]))


def test_memory_does_not_grow():
    state, used = new_state(tiny(epochs=12)), []
    fit(state, Objective(), IMAGES, INDEX, reporter=Watch(lambda *_: used.append(torch.cuda.memory_allocated())))
    assert used[-1] == used[10]


def test_fit_takes_the_objective_along():
    objective = Objective(lpips=LPIPS("squeeze", "random"))
    losses = trained(new_state(tiny(epochs=1)), objective=objective)
    assert losses.isfinite().all() and next(objective.buffers()).is_cuda


def test_lpips_is_the_same_on_both_devices():
    net, a, b = LPIPS("squeeze", "random"), torch.rand(4, 3, 64, 64) * 2 - 1, torch.rand(4, 3, 64, 64) * 2 - 1
    on_cpu, on_gpu = net(a, b), net.to("cuda")(a.cuda(), b.cuda()).cpu()
    assert torch.allclose(on_cpu, on_gpu, rtol=1e-2)


def test_scenes_are_the_same_on_both_devices():
    factors = scene_factors(range(24))
    a, b = render(factors, 64), render(factors, 64, device="cuda")
    apart = (a.float() - b.float()).abs()
    assert apart.mean() < 0.1 and (apart > 8).float().mean() < 0.002   # a contour pixel may fall on the other side


def test_nccl_with_one_process():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try: shared = trained(new_state(tiny(precision="fp32", cuda_graph="off", epochs=2)), process=DDP())
    finally: dist.destroy_process_group()
    alone = trained(new_state(tiny(precision="fp32", cuda_graph="off", epochs=2)))
    assert torch.allclose(shared, alone, rtol=1e-3)
