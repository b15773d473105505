r"""What is each part worth? Losses, latents and designs with one part changed, each with its own learning rate and three seeds.

    python benchmarks/ablations.py --backbone squeezenet1_1_features.pth        some 20 minutes of one core; goes on where it was
    python benchmarks/ablations.py --device cuda --size 64 --narrow 1 --batch 64 --steps 1500 --images 14000 \
        --lr 3e-4 1e-3 2e-3 --backbone squeezenet1_1_features.pth                the networks as they are, on a GPU
    python benchmarks/ablations.py --arm default reference reference_16 --narrow 2 --steps 400 --images 6000 \
        --lr 5e-4 1e-3 2e-3 4e-3 --backbone squeezenet1_1_features.pth           against the reference; half an hour of one core
    python benchmarks/ablations.py --arm default no_refinement wider --narrow 1 --size 64 --steps 600 --images 6000 \
        --lr 5e-4 1e-3 2e-3 --backbone squeezenet1_1_features.pth                is the refinement worth it? two hours of one core

Every arm sees the same number of scenes (flipped at random; AdamW, a cosine, averaged weights). For each, one seed looks for the
best of the learning rates on held-out scenes, by the arm's own loss; two more seeds are trained with that one. What is reported
comes from other held-out scenes: L1, PSNR, LPIPS(squeeze) of reconstructions from one draw of z, and the rate. The arms of
GALLERY are trained once, for their pictures. Finished runs stay in the folder given by --work; ablations_CARD.json has the
figures, ablations.jpg four held-out scenes as each arm shows them (from the posterior means, best learning rate, first seed), and
beside them four samples, decoded from N(0, I).
"""
import argparse
import copy
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from record import save_enlarged
from steps import Record, Shuffled, arguments, small_scenes
from torch import nn

from vae_nb.data.dataset import to_float
from vae_nb.loss.lpips import LPIPS
from vae_nb.loss.objective import SCHEDULES, Objective, psnr, reduce
from vae_nb.model.layers import ResBlock
from vae_nb.model.vae import PRESETS, VAE, costs
from vae_nb.train.config import Config
from vae_nb.train.loop import learning_rate

DEFAULT, REFERENCE = PRESETS["default"], PRESETS["reference"]
FULL = dict(network=DEFAULT, lpips=True, beta=0.02, schedule="warmup", squared=False)
ARMS = {  # name: (what is changed, the arm)
    "default": ("the default preset, L1 + LPIPS + 0.02 KL, KL warm-up during the first quarter", FULL),
    "constant_beta": ("constant beta", FULL | dict(schedule="constant")),
    "no_refinement": ("no residual blocks at half resolution", FULL | dict(network=replace(DEFAULT, half_res_channels=0))),
    "l1": ("L1 + 0.02 KL", FULL | dict(lpips=False)),
    "mse": ("mean squared error + 0.002 KL (an error of 0.05 weighs as in L1 + 0.02 KL)",
            FULL | dict(lpips=False, squared=True, beta=0.002)),
    "no_kl": ("L1 + LPIPS, no KL", FULL | dict(beta=0.0)),
    "vector": ("a vector latent with as many numbers as the grid has", FULL | dict(vector=1)),
}
ON_REQUEST = {
    "wider": ("no residual blocks at half resolution, 336 channels instead of 256: 4 % more multiplications than the default",
              FULL | dict(network=replace(DEFAULT, half_res_channels=0, widths=(336,)))),
    "reference": ("the reference preset", FULL | dict(network=REFERENCE)),
    "reference_16": ("the reference preset, GroupNorm in groups of 16 channels as in the default",
                     FULL | dict(network=replace(REFERENCE, group_size=16))),
}
GALLERY = {  # one run each
    "no_norm": ("no GroupNorm anywhere", FULL | dict(without="norm")),
    "no_skip": ("residual blocks without their skip connection", FULL | dict(without="skip")),
    "beta_0.2": ("ten times the beta", FULL | dict(beta=0.2)),
    "beta_1": ("beta = 1, fifty times the default's", FULL | dict(beta=1.0)),
    "few": ("a vector of 4 numbers (beta divided like the dimensions: the same Laplace scale)",
            FULL | dict(vector=1 / 32, beta=0.02 / 32)),
}


class SquaredError(Objective):
    "Mean squared error + beta*KL."
    def forward(self, x, x_hat, posterior, beta_weight=1.0):
        terms = super().forward(x, x_hat, posterior, beta_weight)
        mse = reduce((x_hat.float() - x).square(), "mean").mean()
        return terms | dict(mse=mse, loss=mse + self.beta * beta_weight * terms["kl"])


def build(arm, size, narrow):
    "The network of an arm, for images of this size, with a `narrow`-th of the channels."
    network = arm["network"].resized(size)
    less = {name: getattr(network, name) // narrow for name in ("hourglass_channels", "half_res_channels")}
    network = replace(network, widths=tuple(width // narrow for width in network.widths), **less)
    if arm.get("vector"):
        network = replace(network, latent=int(arm["vector"] * np.prod(network.latent)))
    model = VAE(network)
    for module in list(model.modules()):
        if arm.get("without") == "norm":
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
        if arm.get("without") == "skip" and isinstance(module, ResBlock):
            module.skip = Nothing()
            module.conv2.weight.data *= 10   # begins at the scale that a plain convolution has
    return model


class Nothing(nn.Module):
    "Zero, in the place of a skip connection."
    def forward(self, x):
        return 0.0


def objective_of(arm, lpips):
    kind = SquaredError if arm["squared"] else Objective
    return kind(arm["beta"], lpips if arm["lpips"] else None)


def train(arm, lr, seed, images, lpips, given):
    "One run: averaged weights, and the loss of every tenth step."
    torch.manual_seed(seed)
    model = build(arm, given.size, given.narrow).to(given.device, memory_format=torch.channels_last)
    ema, objective = copy.deepcopy(model).requires_grad_(False).eval(), objective_of(arm, lpips)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.01), dict(params=others, weight_decay=0.0)], lr=lr)
    source, config = Shuffled(given.images, given.batch, given.device), Config(lr=lr, warmup=min(50, given.steps // 10))
    curve = []
    for i in range(given.steps):
        source.advance()
        x = to_float(images[source.rows()])
        flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
        x_hat, posterior = model(x)
        loss = objective(x, x_hat, posterior, SCHEDULES[arm["schedule"]](i / given.steps))["loss"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, given.steps, config)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.01)
        if i % 10 == 0:
            curve.append(round(loss.item(), 4) if math.isfinite(loss.item()) else None)
    return ema, curve


@torch.no_grad()
def measured(model, arm, images, lpips, batch=100):
    "Means over these scenes, with one draw of z each."
    torch.manual_seed(0)
    sums, objective = {}, objective_of(arm, lpips)
    for part in images.split(batch):
        x = to_float(part)
        x_hat, posterior = model(x)
        terms = objective(x, x_hat, posterior)
        found = dict(loss=terms["loss"], l1=(x_hat - x).abs().mean(), psnr=psnr(x, x_hat).mean(),
                     lpips=lpips(x_hat, x).mean(), rate=terms["rate"])
        for key, value in found.items():
            sums[key] = sums.get(key, 0) + value.item() * len(x) / len(images)
    return {key: round(value, 5) for key, value in sums.items()}


@torch.no_grad()
def pictures(model, images):
    "Four reconstructions and four samples, as bytes (8,3,S,S)."
    z = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(1)).to(images.device)
    shown = torch.cat([model.decode(model.encode(to_float(images)).mode()), model.decode(z)])
    return ((shown + 1) * 127.5).round().clamp(0, 255).byte().cpu()


def done(name, arm, lr, seed, images, val, test, lpips, given):
    "A run and its pictures: of the folder of finished ones, or trained now."
    file = given.work / f"{name}_{lr:g}_{seed}.pt"
    if not file.is_file():
        start = time.perf_counter()
        model, curve = train(arm, lr, seed, images, lpips, given)
        run = dict(arm=name, lr=lr, seed=seed, val=measured(model, arm, val, lpips), test=measured(model, arm, test, lpips),
                   curve=curve, seconds=round(time.perf_counter() - start, 1))
        network = dict(network=asdict(model.config), parameters=sum(p.numel() for p in model.parameters()),
                       gflop=round(sum(row["flop"] for row in costs(model)) / 1e9, 3))
        torch.save(dict(run=run, network=network, pictures=pictures(model, test[:4])), file)
        print(name, lr, seed, run["test"], run["seconds"], flush=True)
    return torch.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, minutes=90)
    parser.add_argument("--arm", nargs="+", choices=[*ARMS, *ON_REQUEST, *GALLERY], default=[*ARMS, *GALLERY])
    parser.add_argument("--backbone", default="random", help="ImageNet weights of SqueezeNet 1.1 (a path), or random")
    parser.add_argument("--steps", type=int, default=300, help="of every run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--narrow", type=int, default=4, help="divides the channels of all networks")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=300, help="scenes to choose a learning rate by, and to report")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="folder of the finished runs")
    given = parser.parse_args()
    if given.rehearse:
        given.steps, given.batch, given.size, given.images, given.held_out = 1, 2, 32, 16, 8
        given.lr, given.seeds, given.work = given.lr[:2], 2, given.out / "work_ablations"

    hidden = "out", "work", "device", "rehearse", "backbone", "arm", "minutes"
    settings = {key: value for key, value in vars(given).items() if key not in hidden}
    settings["backbone"] = "random" if given.backbone == "random" else "ImageNet"
    record = Record("ablations", given, **settings)
    images = small_scenes(given.images + 2 * given.held_out, given.size, given.device)
    val, test = images[given.images:].split(given.held_out)
    lpips = LPIPS("squeeze", given.backbone).to(given.device)
    given.work.mkdir(parents=True, exist_ok=True)
    runs, arms, rows = [], {}, [test[:4].cpu().new_full((8, 3, given.size, given.size), 255)]
    rows[0][:4] = test[:4].cpu()

    for name in given.arm:
        says, arm = (ARMS | ON_REQUEST | GALLERY)[name]
        rates, seeds = ([arms["default"]["lr"]], 1) if name in GALLERY else (given.lr, given.seeds)
        found = []
        for lr in rates:
            if record.clock.left > 0:
                found.append(done(name, arm, lr, 0, images, val, test, lpips, given))
        if len(found) < len(rates):
            break
        best = min(found, key=lambda part: part["run"]["val"]["loss"])
        for seed in range(1, seeds):
            if record.clock.left > 0:
                found.append(done(name, arm, best["run"]["lr"], seed, images, val, test, lpips, given))
        runs += [part["run"] for part in found]
        arms[name] = dict(changed=says, lr=best["run"]["lr"], schedule=arm["schedule"], beta=arm["beta"], lpips=arm["lpips"],
                          squared=arm["squared"], **best["network"])
        rows.append(best["pictures"])
        record.save(arms=arms, runs=runs, rows=["original", *arms])
        save_enlarged(torch.cat(rows), 8, given.out / "ablations.jpg")


if __name__ == "__main__":
    main()
