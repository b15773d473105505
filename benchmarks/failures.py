r"""Five ways to fail, each made on purpose: what they look like in curves and in pictures.

    python benchmarks/failures.py                                       three minutes of one core

One small VAE on scenes of 32x32 pixels, L1 + 0.02 KL, Adam; and the same with one mistake: a learning rate a thousand times too
large, for Adam and for plain gradient descent; the KL summed where the pixels are averaged, with beta = 1; images left in
0..255; and a validation split that leaks (every scene is there in six slightly different views, and the views are split at
random). failures_cpu.json has the curves, failures.jpg six reconstructions and four samples of each run, failures_leak.jpg
twelve pictures of the leaking one above their reconstructions.
"""
import argparse
import math

import torch
from record import save_enlarged
from steps import Record, Shuffled, arguments, small_scenes

from vae_nb.data.dataset import to_float
from vae_nb.data.scenes import FACTORS, render, scene_factors
from vae_nb.loss.objective import Objective
from vae_nb.model.vae import VAE
from vae_nb.train.config import Config
from vae_nb.train.loop import learning_rate

NETWORK = dict(size=32, widths=[32, 64], latent=16, blocks=1, patch_size=4, mid_blocks=0)
VIEWS = 6   # of each scene, in the set whose split leaks


def train(images, steps, given, lr=2e-3, objective=None, scale=to_float, optimizer=torch.optim.Adam, watch=None):
    "One run: the model, and a row for every tenth step; `watch(model)` adds to a row every fiftieth."
    torch.manual_seed(0)
    model, objective = VAE(**NETWORK), objective or Objective()
    optimizer = optimizer(model.parameters(), lr=lr)
    config, source, rows = Config(lr=lr, warmup=20), Shuffled(len(images), given.batch, "cpu"), []
    for i in range(steps):
        source.advance()
        x = scale(images[source.rows()])
        terms = objective(x, *model(x))
        optimizer.param_groups[0]["lr"] = learning_rate(i, steps, config)
        if i % 10 == 0 or i == steps - 1:
            row = {name: value.item() for name, value in terms.items()}
            row = {name: round(value, 5) if math.isfinite(value) else None for name, value in row.items()}
            rows.append(dict(step=i, **row, **(watch(model) if watch and i % 50 == 0 else {})))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    return model.eval(), rows


@torch.no_grad()
def pictures(model, images, scale=to_float):
    "Six reconstructions and four samples, as bytes; a value that is not a number is shown as magenta."
    z = torch.randn(4, model.D, generator=torch.Generator().manual_seed(0))
    shown = torch.cat([model.decode(model.encode(scale(images)).mode()), model.decode(z)])
    lost = shown.isnan().any(1, keepdim=True)
    shown = torch.where(lost, torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1), shown.nan_to_num())
    return ((shown + 1) * 127.5).round().clamp(0, 255).byte()


def views(scenes, seed):
    "Every scene VIEWS times, with the eye and the lamp moved a little: (scenes * VIEWS,3,32,32), in order."
    factors = scene_factors(range(scenes), seed=seed).repeat_interleave(VIEWS, 0)
    names, g = list(FACTORS), torch.Generator().manual_seed(seed)
    for name, step in dict(azimuth=3.0, elevation=1.0, light=6.0).items():
        column = names.index(name)
        moved = factors[:, column] + step * (2 * torch.rand(len(factors), generator=g) - 1)
        factors[:, column] = moved.clamp(FACTORS[name].low, FACTORS[name].high)
    return render(factors, 32)


def leaking(given):
    "Training, held-out views of the same scenes, and scenes that are new."
    every, new = views(given.scenes, seed=5), views(given.scenes // 3, seed=6)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    held, seen = every[order[:len(every) // 5]], every[order[len(every) // 5:]]

    @torch.no_grad()
    def watch(model):
        sets = dict(l1_seen=seen[:len(held)], l1_leaking=held, l1_new=new)
        return {name: round((model.decode(model.encode(to_float(x)).mode()) - to_float(x)).abs().mean().item(), 5)
                for name, x in sets.items()}

    model, rows = train(seen, 2 * given.steps, given, watch=watch)
    rows[-1] |= watch(model)
    shown = torch.cat([seen[:4], held[:4], new[::VIEWS][:4]])
    with torch.no_grad():
        x_hat = model.decode(model.encode(to_float(shown)).mode())
    return rows, torch.cat([shown, ((x_hat + 1) * 127.5).round().byte()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--steps", type=int, default=400, help="of every run; twice as many of the one that leaks")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--scenes", type=int, default=150, help="different ones, in the set whose split leaks")
    given = parser.parse_args()
    if given.rehearse:
        given.steps, given.images, given.scenes = 20, 64, 12

    record = Record("failures", given, steps=given.steps, batch=given.batch, images=given.images, scenes=given.scenes,
                    views=VIEWS, network=NETWORK)
    images = small_scenes(given.images + 6, 32, "cpu")
    test = images[given.images:]
    mistakes = dict(healthy={}, learning_rate=dict(lr=2.0), nan=dict(lr=10.0, optimizer=torch.optim.SGD),
                    collapse=dict(objective=Objective(1.0, pixels="mean", latents="sum")), scale=dict(scale=torch.Tensor.float))
    rows, curves = [test, torch.full((4, 3, 32, 32), 255, dtype=torch.uint8)], {}
    for name, mistake in mistakes.items():
        model, curves[name] = train(images[:given.images], given.steps, given, **mistake)
        rows.append(pictures(model, test, mistake.get("scale", to_float)))
        print(name, curves[name][-1], flush=True)
    curves["leak"], leak = leaking(given)
    print("leak", curves["leak"][-1], flush=True)
    record.save(curves=curves, rows=["original", *mistakes])
    for name, pixels, columns in (("failures", torch.cat(rows), 10), ("failures_leak", leak, 12)):
        save_enlarged(pixels, columns, given.out / f"{name}.jpg")


if __name__ == "__main__":
    main()
