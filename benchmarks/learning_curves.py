r"""Is the fast network as good? Presets and other designs, trained on the same images, in the same order, to the same number.

    python benchmarks/learning_curves.py --device cuda --batch-size 32 --images 14000 --passes 20 --lr 1e-4 3e-4 1e-3 \
        --beta-schedule constant warmup                                                  on a GPU
    python benchmarks/learning_curves.py                                                 what two cores can do in an hour
    python benchmarks/learning_curves.py --size 64 --design reference default pixels4    other stems, smaller images
    python benchmarks/learning_curves.py --size 64 --images 9600 --passes 3 --every 200 --lr 1e-3 \
        --beta-schedule constant warmup --start 0 1 --out benchmarks/results/learning_curves_64_cpu_long.json
                                                                                         a longer run, two ways, twice

Held-out L1, LPIPS, KL and PSNR against the images seen and the seconds of training go to
benchmarks/results/learning_curves_SIZE_DEVICE.json, after every measurement; the .jpg beside it has held-out images, and below
them what each design makes of them in the end. LPIPS, in the loss and in the measurement, uses the SqueezeNet backbone;
--backbone names its ImageNet weights, or says random.
"""
import argparse
import json
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from record import RESULTS, header
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from vae_nb.data.dataset import to_float
from vae_nb.data.scenes import scenes
from vae_nb.loss.lpips import LPIPS
from vae_nb.loss.objective import Objective
from vae_nb.model.vae import PRESETS, VAE, VAEConfig, costs
from vae_nb.plots import grid
from vae_nb.train.config import CHOICES, RECIPES, recipe
from vae_nb.train.loop import Reporter, fit, new_state, validate

DEFAULT = PRESETS["default"]
GRID = dict(size=128, latent=(8, 16, 16))
PIXELS8 = VAEConfig(**GRID, widths=(272,), blocks=2, patch_size=8, mid_blocks=2)
NO_BRANCH = replace(DEFAULT, half_res_channels=0)
NARROW = replace(PIXELS8, widths=(256,))
DESIGNS = {  # name: what it tries; all have about 12 M parameters and the latent of the presets
    "pixels8": PIXELS8,
    "pixels4": VAEConfig(**GRID, widths=(128, 288), blocks=(1, 2), patch_size=4, mid_blocks=2),
    "pixels2": VAEConfig(**GRID, widths=(32, 64, 304), blocks=(1, 1, 2), patch_size=2, mid_blocks=2),
    "deep": VAEConfig(**GRID, widths=(184,), blocks=5, patch_size=8, mid_blocks=4),
    "wide": VAEConfig(**GRID, widths=(376,), blocks=1, patch_size=8, mid_blocks=1),
    "hourglass_only": NO_BRANCH,
    "branch_only": replace(DEFAULT, widths=(272,), blocks=4, hourglass_channels=0),
    "branch2": replace(DEFAULT, half_res_blocks=2),
    "branch_in_encoder": replace(DEFAULT, decoder=dict(half_res_channels=0)),
    "branch_in_decoder": replace(NO_BRANCH, decoder=dict(half_res_channels=DEFAULT.half_res_channels)),
    "unfold2": replace(NARROW, decoder=dict(widths=(32, 64, 256), blocks=(1, 1, 2), patch_size=2)),
    "unfold1": replace(NARROW, decoder=dict(widths=(8, 32, 64, 256), blocks=(1, 1, 1, 2), patch_size=1)),
}


def work(name):
    "Parameters and FLOP (one image, forward, at 128x128) of a design."
    rows = costs(VAE(PRESETS[name].resized(128)))
    total = lambda key: sum(row[key] for row in rows)
    return dict(name=name, design=asdict(PRESETS[name]), parameters=total("parameters"), gflop=round(total("flop") / 1e9, 2))


@torch.no_grad()
def channels(model, images):
    "Nats an image that each latent channel carries, the busiest first."
    kl = model.encode(to_float(images).to(next(model.parameters()).device)).kl()   # (B,C,h,w)
    return [round(nats, 1) for nats in kl.mean(0).sum((1, 2)).sort(descending=True).values.tolist()]


def train(name, lr, schedule, start, images, given, keep):
    """A trained design, and its loss on 400 of the training images. `keep` is called with a row of held-out terms, with images
    seen and seconds, at every measurement."""
    config = recipe(name, size=given.size, batch_size=given.batch_size, lr=lr, warmup=given.warmup, epochs=given.passes,
                    beta_schedule=schedule, device=given.device, seed=given.seed, ema=0.99)
    state = replace(new_state(replace(config, seed=start)), config=config)   # the same order and noise from other weights
    objective = Objective(config.beta, LPIPS("squeeze", given.backbone)).to(state.device)
    train, val = torch.arange(given.images), torch.arange(given.images, len(images))
    clock = dict(seconds=0.0, since=time.perf_counter())

    def measure(state, terms):
        if state.device.type == "cuda": torch.cuda.synchronize()
        clock["seconds"] += time.perf_counter() - clock["since"]
        found = validate(state, objective, images, val)
        keep(dict(images=state.step * given.batch_size, seconds=round(clock["seconds"], 1),
                  **{key: round(value, 5) for key, value in found.items()}, channels=channels(state.ema, images[val[:64]])))
        clock["since"] = time.perf_counter()

    class Measure(Reporter):
        def step(self, state, terms):
            if state.step % given.every == 0: measure(state, terms)
    fit(state, objective, images, train, reporter=Measure())
    known = validate(state, objective, images, train[:400])
    return state.ema, {key.removesuffix("_val"): round(value, 4) for key, value in known.items() if key != "psnr_val"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PRESETS.update(DESIGNS)
    RECIPES.update({name: {} for name in PRESETS if name not in RECIPES})
    CHOICES["preset"] = tuple(PRESETS)
    parser.add_argument("--design", choices=list(PRESETS), nargs="+", default=["default", "reference"])
    parser.add_argument("--images", type=int, default=6400, help="to train on; 200 more are held out")
    parser.add_argument("--passes", type=int, default=1, help="over the training images")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4], help="peaks; every design is trained with every one")
    parser.add_argument("--beta-schedule", choices=CHOICES["beta_schedule"], nargs="+", default=["constant"], help="likewise")
    parser.add_argument("--start", type=int, nargs="+", default=[0], help="seeds of the initial weights; likewise")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", default="imagenet")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--add", action="store_true", help="to the runs that are in the file, which had the same settings")
    parser.add_argument("--out", type=Path, help="where the figures go, if not to results/")
    given = parser.parse_args()

    images, _ = scenes(given.images + 200, size=given.size, seed=given.seed)
    out = given.out or RESULTS / f"learning_curves_{given.size}_{given.device}.json"
    own = ("design", "lr", "beta_schedule", "start", "out", "backbone", "add")   # of a run, or of nobody
    settings = {key: value for key, value in vars(given).items() if key not in own}
    settings["backbone"] = "random" if given.backbone == "random" else "ImageNet"
    record, shown = header(given.device, **settings, runs=[]), to_float(images[given.images:given.images + 8])
    before, rows = json.loads(out.read_text()) if given.add else record, [shown]
    if other := [key for key in settings if before[key] != settings[key]]: raise SystemExit(f"{out}: other {', '.join(other)}")
    record["runs"] = before["runs"]
    if given.add: rows = [pil_to_tensor(Image.open(out.with_suffix(".jpg")))]
    for name, lr, schedule, start in product(given.design, given.lr, given.beta_schedule, given.start):
        found = work(name) | dict(lr=lr, beta_schedule=schedule, initial_weights=start, machine=record["machine"], curve=[])
        record["runs"].append(found)

        def keep(row, found=found, said=f"{name}, {lr:g}, {schedule}, {start}"):
            found["curve"].append(row)
            out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{said:29}", "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        network, found["on_400_training_images"] = train(name, lr, schedule, start, images, given, keep)
        out.write_text(json.dumps(record, indent=1) + "\n")
        with torch.no_grad(): rows.append(network.decode(network.encode(shown.to(given.device)).mode()).cpu())
        picture(rows).save(out.with_suffix(".jpg"), quality=95, subsampling=0)


def picture(rows):
    "Rows of images below each other; the first may be a picture that was made before."
    whole = [row if row.ndim == 3 else pil_to_tensor(grid(row)) for row in rows]
    return to_pil_image(torch.cat([row[:, 2 * (i > 0):] for i, row in enumerate(whole)], 1))   # one margin between two rows


if __name__ == "__main__":
    main()
