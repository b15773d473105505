"""Priors that match: encode the training images, fit every kind of prior to their posteriors, draw from each, and measure.

    python benchmarks/prior.py runs/scenes-default/model.safetensors --minutes 1 --device cuda --out runs/scenes-default/priors
    python benchmarks/prior.py MODEL --latents latents.npz --kind flow --minutes 5     from posteriors that were saved
    python benchmarks/prior.py MODEL --rehearse                                        a few images and steps, on the CPU

MODEL is a file that `save_model` wrote. The images are those of --source (15,000 scenes by default) less the held-out part,
each also mirrored; --latents names a file with mu and logvar instead, which is written if it is not there. To --out go
prior_KIND.safetensors, samples.npz (64 pictures of each kind, uint8), prior.json, and where Pillow is installed samples.jpg, with
two rows of each kind in the order of prior.json.

prior.json: how wide the posteriors are, and for every kind the seconds, the bytes, the nats of held-out latents, the distance of
its pictures to the nearest training image (beside that of held-out images and of reconstructions), and Fréchet distances to the
training images: always of thumbnails (4x4 pixels, no network, blind to sharpness), and of the last layer of SqueezeNet if
--backbone names its ImageNet weights.
"""
import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from record import header
from torch.nn import functional as F

from vae_nb.analysis.metrics import frechet_distance
from vae_nb.analysis.prior import (
    KINDS,
    as_float,
    encode_dataset,
    fit_prior,
    model_fingerprint,
    nearest_neighbours,
    summarize_posterior,
)
from vae_nb.data.dataset import load, split
from vae_nb.train.checkpoint import load_model

def posteriors(model, images, train, val, given):
    "mu and logvar of the training images (with their mirror images) and of the held-out ones: from --latents, or computed."
    file = given.latents
    if file and file.exists():
        print(f"posteriors from {file}", flush=True)
        found = np.load(file)
        parts = [torch.as_tensor(found[name]).float() for name in ("mu", "logvar", "mu_val", "logvar_val")]
        return [part.to(given.device) for part in parts]
    parts = [*encode_dataset(model, images[train], flip=not given.no_flip, batch_size=given.batch),
             *encode_dataset(model, images[val], batch_size=given.batch)]
    if file:
        names = ("mu", "logvar", "mu_val", "logvar_val")
        np.savez(file, **{name: part.half().cpu().numpy() for name, part in zip(names, parts)})
    return parts


@torch.no_grad()
def decode(model, z, batch):
    "(n,3,H,W) uint8 on the CPU."
    parts = [model.decode(part) for part in z.split(batch)]
    return torch.cat([((x + 1) * 127.5).round().clamp(0, 255).byte().cpu() for x in parts])


def thumbnails(x):
    "(B,3,H,W) in [-1,1] to (B,48): 4x4 pixels."
    return F.adaptive_avg_pool2d(x, 4).flatten(1)


def squeezenet(path, device):
    "A function from images in [-1,1] to (B,512): SqueezeNet's last layer, averaged over positions."
    from vae_nb.loss.lpips import LPIPS
    net = LPIPS("squeeze", str(path)).to(device)

    def features(x): return net.activations(x.clamp(-1, 1))[-1].mean((2, 3))
    return features


@torch.no_grad()
def features_of(images, network, device, batch, flip=False):
    "(M,F) features of images, and of their mirror images, on the CPU."
    parts = []
    for part in images.split(batch):
        x = as_float(part.to(device))
        parts += [network(x), *([network(x.flip(-1))] if flip else [])]
    return torch.cat(parts).cpu()


def distance(pictures, network, truth, given):
    "Fréchet distance of pictures to features of the training images; None of too few pictures, as in a rehearsal."
    found = features_of(pictures, network, given.device, given.batch)
    return round(frechet_distance(found, truth), 4) if len(found) > found.shape[1] else None


def nats(prior, mu, logvar, n=256):
    "Mean and standard error of -log p(z), over held-out draws z ~ q(z|x), in nats a latent dimension."
    g = torch.Generator().manual_seed(1)
    mu, logvar = mu[:n].cpu(), logvar[:n].cpu()
    z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=g)
    device = prior.mean.device
    values = []
    for part in z.to(device).split(64):
        more = dict(probes=4, generator=g) if prior.kind == "flow" else {}
        values.append(-prior.log_prob(part, **more).cpu().double() / mu[0].numel())
    values = torch.cat(values)
    return [round(values.mean().item(), 4), round((values.std() / len(values) ** 0.5).item(), 4)]


def distances(samples, images, batch):
    "Root mean square pixel difference to the nearest training image, mirrored or not: quantiles over the samples."
    samples = samples.to(images.device)
    as_they_are, mirrored = (nearest_neighbours(x, images, batch_size=batch)[0] for x in (samples, samples.flip(-1)))
    d = torch.minimum(as_they_are, mirrored).flatten().cpu()
    return {name: round(d.quantile(q).item(), 4) for name, q in (("least", 0), ("median", 0.5), ("most", 1))}


def draw(prior, n, batch, temperature=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([prior.sample(min(batch, n - i), g, temperature) for i in range(0, n, batch)])


def measured(prior, model, train_images, latents_val, known, given):
    "Pictures of a prior, and all that prior.json says of them."
    start = time.perf_counter()
    z = draw(prior.to(given.device), given.samples, given.batch)
    seconds = time.perf_counter() - start
    pictures = decode(model, z, given.batch)
    found = dict(nats_per_dimension=nats(prior, *latents_val, n=given.likelihoods), sampling_seconds=round(seconds, 2),
                 nearest_training_image=distances(pictures[:64], train_images, given.batch))
    for name, (features, truth) in known.items():
        found[f"frechet_{name}"] = distance(pictures, features, truth, given)
    return pictures[:64], found


def show(samples, path):
    "Two rows of eight pictures for each kind, where Pillow is installed."
    if not find_spec("PIL"): return
    from PIL import Image
    rows = torch.stack([pictures[:16] for pictures in samples.values()])   # (kinds,16,3,S,S)
    kinds, _, c, size, _ = rows.shape
    rows = F.pad(rows.view(kinds, 2, 8, c, size, size), [1] * 4, value=255)
    wall = rows.permute(0, 1, 4, 2, 5, 3).reshape(-1, 8 * (size + 2), c)
    Image.fromarray(wall.contiguous().numpy()).save(path, quality=92, subsampling=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.safetensors, or the folder of a run")
    parser.add_argument("--source", default="scenes", help="the images the model was trained on")
    parser.add_argument("--images", type=int, default=None, help="use so many of them")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of all draws")
    parser.add_argument("--latents", type=Path, help=".npz with mu, logvar, mu_val, logvar_val: read, or written if not there")
    parser.add_argument("--no-flip", action="store_true", help="leave the mirror images out")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all", help="one kind; N(0, I) is always measured, too")
    parser.add_argument("--minutes", type=float, default=1.0, help="for the training of the flow")
    parser.add_argument("--steps", type=int, default=30000, help="of the flow, if they take less than that")
    parser.add_argument("--flow-batch", type=int, default=None, help="latents a step; 2,048 vectors or 512 grids")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--components", type=int, default=32, help="of the mixture")
    parser.add_argument("--samples", type=int, default=5000, help="of each kind, for the Fréchet distances")
    parser.add_argument("--likelihoods", type=int, default=256, help="held-out latents for the nats")
    parser.add_argument("--batch", type=int, default=250, help="images at a time")
    parser.add_argument("--backbone", type=Path, help="ImageNet weights of SqueezeNet 1.1's features")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("priors"))
    parser.add_argument("--rehearse", action="store_true", help="small numbers: does it run to its end?")
    given = parser.parse_args()
    if given.rehearse:
        given.images, given.minutes, given.samples = min(given.images or 300, 300), 0.1, 64
        given.batch, given.flow_batch, given.components, given.likelihoods = 32, 32, 4, 16
    given.out.mkdir(parents=True, exist_ok=True)

    clock = time.perf_counter()
    model = load_model(given.model, given.device)
    store = load(given.source, size=model.size, n=given.images, seed=given.seed)
    train, val = split(store.names)
    images = torch.as_tensor(np.asarray(store.images))
    print(f"{len(train)} training images, {len(val)} held out  {time.perf_counter() - clock:.1f} s", flush=True)
    given.flow_batch = given.flow_batch or (512 if len(model.latent_shape) == 3 else 2048)
    mu, logvar, *latents_val = posteriors(model, images, train, val, given)
    summary = summarize_posterior(mu, logvar)
    print(f"encoded  {time.perf_counter() - clock:.1f} s\n{json.dumps(summary, indent=1)}", flush=True)

    train_images = images[train].to(given.device)   # 15,000 at 128x128: 0.7 GB
    features = dict(thumbnails=thumbnails)
    if given.backbone: features["squeezenet"] = squeezenet(given.backbone, given.device)
    known = {name: (f, features_of(train_images, f, given.device, given.batch, not given.no_flip))
             for name, f in features.items()}
    record = header(given.device, source=given.source, images=len(train), flip=not given.no_flip, latent=list(model.latent_shape),
                    fingerprint=model_fingerprint(model), samples=given.samples, rehearsal=given.rehearse,
                    aggregate_posterior=summary, kinds={})

    rebuilt = decode(model, mu[:min(len(train), given.samples)], given.batch)
    held_out = images[val]
    record["reference"] = {
        name: dict(nearest_training_image=distances(x[:64].to(given.device), train_images, given.batch),
                   **{f"frechet_{k}": distance(x, f, truth, given)
                      for k, (f, truth) in known.items()})
        for name, x in (("held-out images", held_out), ("reconstructions of training images", rebuilt))}

    samples = {}   # kind: (64,3,S,S) uint8
    for kind in ["standard", *([k for k in KINDS if k != "standard"] if given.kind == "all" else {given.kind} - {"standard"})]:
        start = time.perf_counter()
        options = dict(batch_size=given.flow_batch, lr=given.lr, ema=given.ema) if kind == "flow" else {}
        prior = fit_prior(mu, logvar, kind, steps=given.steps, seconds=60 * given.minutes, seed=given.seed, device=given.device,
                          fingerprint=record["fingerprint"], components=given.components, **options)
        seconds, path = time.perf_counter() - start, given.out / f"prior_{kind}.safetensors"
        prior.save(path)
        samples[kind], found = measured(prior, model, train_images, latents_val, known, given)
        record["kinds"][kind] = dict(fit_seconds=round(seconds, 2), bytes=path.stat().st_size, **found, **prior.info)
        np.savez_compressed(given.out / "samples.npz", **{k: v.numpy() for k, v in samples.items()})
        (given.out / "prior.json").write_text(json.dumps(record, indent=1) + "\n")
        said = "  ".join(f"{k} {v}" for k, v in record["kinds"][kind].items() if k != "history")
        print(f"{kind}  {said}  ({time.perf_counter() - clock:.1f} s in all)", flush=True)
    show(samples, given.out / "samples.jpg")


if __name__ == "__main__":
    main()
