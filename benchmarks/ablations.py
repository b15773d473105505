r"""What is each part worth? Losses, latents and designs with one part changed, each with its own learning rate and three seeds.

    python benchmarks/ablations.py --device cuda --minutes 5 --backbone squeezenet1_1_features.pth          on a GPU
    python benchmarks/ablations.py --size 32 --narrow 4 --batch 16 --steps 240 --images 3840 --held-out 300 \
        --lr 1e-3 2e-3 4e-3 --minutes 60 --backbone squeezenet1_1_features.pth           a scale model, on a CPU

Every arm sees the same number of scenes (64x64 pixels, flipped at random; AdamW, a cosine, averaged weights). For each, one seed
looks for the best of the learning rates on held-out scenes, by the arm's own loss; two more seeds are trained with that one.
What is reported comes from other held-out scenes: L1, PSNR, LPIPS(squeeze) of reconstructions from one draw of z, and the rate.
The number of steps is the same for all arms, and as large as the minutes allow. Figures go to ablations_CARD.json, eight
held-out scenes as each arm shows them (from the posterior means, best learning rate, first seed) to ablations_pictures_CARD.npz.
"""
import argparse
import copy
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from beta_sweep import npz, shown
from steps import Record, Shuffled, arguments, captured, fast, restart, small_scenes, wait

from vae_nb.data.dataset import to_float
from vae_nb.loss.lpips import LPIPS
from vae_nb.loss.objective import SCHEDULES, Objective, psnr, reduce
from vae_nb.model.vae import PRESETS, VAE, costs
from vae_nb.train.config import Config
from vae_nb.train.device import autocast
from vae_nb.train.loop import learning_rate

DEFAULT, REFERENCE = PRESETS["default"], PRESETS["reference"]
PATCH4 = replace(DEFAULT, patch_size=4, widths=(128, 288), blocks=(1, 2), half_res_channels=0)
FULL = dict(network=DEFAULT, lpips=True, beta=0.02, schedule="warmup", squared=False)
ARMS = {  # name: (what is changed, the arm)
    "default": ("the default preset, L1 + LPIPS + 0.02 KL, beta comes in during the first quarter", FULL),
    "no_refinement": ("no residual blocks at half resolution", FULL | dict(network=replace(DEFAULT, half_res_channels=0))),
    "constant_beta": ("the whole of beta from the first step", FULL | dict(schedule="constant")),
    "patch4": ("patches of 4, two levels, no refinement", FULL | dict(network=PATCH4)),
    "reference_g16": ("the reference network, norms with groups of 16 channels",
                      FULL | dict(network=replace(REFERENCE, group_size=16))),
    "reference": ("the reference network, norms with groups of 4 or more", FULL | dict(network=REFERENCE)),
    "l1": ("L1 + 0.02 KL", FULL | dict(lpips=False)),
    "mse": ("mean squared error + 0.002 KL (an error of 0.05 weighs as in L1 + 0.02 KL)",
            FULL | dict(lpips=False, squared=True, beta=0.002)),
    "no_kl": ("L1, no KL", FULL | dict(lpips=False, beta=0.0)),
    "vector": ("a vector latent with as many numbers as the grid has", FULL | dict(vector=True)),
}


class SquaredError(Objective):
    "Mean squared error + beta*KL."
    def forward(self, x, x_hat, posterior, beta_weight=1.0):
        terms = super().forward(x, x_hat, posterior, beta_weight)
        mse = reduce((x_hat.float() - x).square(), "mean").mean()
        return terms | dict(mse=mse, loss=mse + self.beta * beta_weight * terms["kl"])


def network_of(arm, size, narrow):
    "The configuration of an arm's network, for images of this size, with a `narrow`-th of the channels."
    network = arm["network"].resized(size)
    less = {name: getattr(network, name) // narrow for name in ("hourglass_channels", "half_res_channels")}
    network = replace(network, widths=tuple(width // narrow for width in network.widths), **less)
    return replace(network, latent=int(np.prod(network.latent))) if arm.get("vector") else network


class Trainer:
    "One arm: a model and the step that trains it, captured once and used for every run of the arm."
    def __init__(self, arm, images, lpips, given):
        device, self.arm, self.given = given.device, arm, given
        self.network = network_of(arm, given.size, given.narrow)
        self.model = VAE(self.network).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        kind = SquaredError if arm["squared"] else Objective
        self.objective = kind(arm["beta"], lpips if arm["lpips"] else None).to(device)
        self.lr, self.beta_weight = torch.full((), 1e-4, device=device), torch.ones((), device=device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.01), dict(params=others, weight_decay=0.0)],
                                           lr=self.lr, fused=True, capturable=device == "cuda")
        self.images, self.source = images, Shuffled(given.images, given.batch, device)
        self.source.advance()
        self.run = captured(self.step, device)
        self.source.taken = 0

    def step(self):
        x = to_float(self.images[self.source.rows()])
        flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
        with autocast(x.device):
            x_hat, posterior = self.model(x)
            loss = self.objective(x, x_hat, posterior, self.beta_weight)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad(): torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 0.01)

    def start(self, seed):
        "Begin anew, in the same memory."
        torch.manual_seed(seed)
        fresh = VAE(self.network).state_dict()
        restart(self.model, self.optimizer, fresh)
        self.ema.load_state_dict(fresh)
        self.source.taken = 0

    def train(self, lr, steps, total, clock):
        "These steps of `total`; False if time ran out."
        config = Config(lr=lr, warmup=min(50, total // 10))
        for i in range(steps):
            self.lr.fill_(learning_rate(i, total, config))
            self.beta_weight.fill_(SCHEDULES[self.arm["schedule"]](i / total))
            self.source.advance()
            self.run()
            if i % 50 == 49:
                wait(self.given.device)
                if clock.left < 1: return False
        wait(self.given.device)
        return True

    @torch.no_grad()
    def measured(self, images, lpips, batch=100):
        "Means over these scenes, with averaged weights and one draw of z each."
        torch.manual_seed(0)
        sums = {}
        for part in images.split(batch):
            x = to_float(part).contiguous(memory_format=torch.channels_last)
            x_hat, posterior = self.ema(x)
            terms = self.objective(x, x_hat, posterior)
            found = dict(loss=terms["loss"], l1=(x_hat - x).abs().mean(), psnr=psnr(x, x_hat).mean(),
                         lpips=lpips(x_hat, x).mean(), rate=terms["rate"])
            for key, value in found.items(): sums[key] = sums.get(key, 0) + value.item() * len(x) / len(images)
        return {key: round(value, 5) for key, value in sums.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, minutes=5)
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--backbone", default="random", help="ImageNet weights of SqueezeNet 1.1 (a path), or random")
    parser.add_argument("--steps", type=int, default=1500, help="of every run; fewer, if the minutes allow only fewer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--narrow", type=int, default=1, help="divides the channels of all networks")
    parser.add_argument("--images", type=int, default=14000)
    parser.add_argument("--held-out", type=int, default=500, help="scenes to choose a learning rate by, and to report")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if given.rehearse:
        given.steps, given.batch, given.size, given.images, given.held_out = 1, 2, 32, 16, 8
        given.lr, given.seeds = given.lr[:2], 2

    fast(given.device)
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "device", "rehearse", "backbone")}
    settings["backbone"] = "random" if given.backbone == "random" else "ImageNet"
    record = Record("ablations", given, **settings)
    images = small_scenes(given.images + 2 * given.held_out, given.size, given.device)
    val, test = images[given.images:].split(given.held_out)
    lpips = LPIPS("squeeze", given.backbone).to(given.device)
    pictures, arms, trainers = {"input": test[:8].cpu().numpy()}, {}, {}

    each = len(given.lr) + given.seeds - 1                       # runs of an arm
    for name in given.arm:                                       # how long does a step take?
        says, arm = ARMS[name]
        trainers[name] = trainer = Trainer(arm, images, lpips, given)
        probe = min(given.steps, 30 if given.device == "cuda" else 2)
        start = time.perf_counter()
        trainer.train(1e-4, probe, given.steps, record.clock)
        pace = round((time.perf_counter() - start) / probe * 1000, 3)
        parameters, flop = (sum(row[key] for row in costs(trainer.model)) for key in ("parameters", "flop"))
        arms[name] = dict(changed=says, network=asdict(trainer.network), schedule=arm["schedule"], beta=arm["beta"],
                          lpips=arm["lpips"], squared=arm["squared"], parameters=parameters,
                          gflop=round(flop / 1e9, 3), milliseconds_a_step=pace)
    pace = each * sum(arm["milliseconds_a_step"] for arm in arms.values()) / 1000   # seconds for one step of every run
    steps = max(1, min(given.steps, int(0.85 * record.clock.left / pace)))
    record.save(steps=steps, arms=arms, runs=[])

    runs = []
    for name in given.arm:
        trainer, best = trainers.pop(name), None
        for seed, lr in [(0, lr) for lr in given.lr] + [(seed, None) for seed in range(1, given.seeds)]:
            lr, begin = best["lr"] if lr is None else lr, time.perf_counter()
            trainer.start(seed)
            if not trainer.train(lr, steps, steps, record.clock): break
            run = dict(arm=name, lr=lr, seed=seed, val=trainer.measured(val, lpips), test=trainer.measured(test, lpips),
                       seconds=round(time.perf_counter() - begin, 2))
            runs.append(run)
            if seed == 0 and not (best and best["val"]["loss"] <= run["val"]["loss"]):
                best, pictures[name] = run, shown(trainer.ema, test[:8])
            record.save(runs=runs)
            print(name, lr, seed, run["test"], flush=True)
        if best:
            arms[name]["lr"] = best["lr"]
            record.save(arms=arms)
            npz(given.out / f"ablations_pictures_{record.card}.npz", **pictures)
        if record.clock.left < 1: break


if __name__ == "__main__":
    main()
