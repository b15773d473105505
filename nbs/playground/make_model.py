"""Write what the playground needs of a trained model with a flow prior: python nbs/playground/make_model.py scenes

encoder.onnx, decoder.onnx and prior.onnx (weights in 16 bits), latents.json (statistics of the aggregate posterior, the regression of
its means on the known factors, example latents), examples.webp (their decodes by PyTorch, lossless, side by side).
"""
import base64
import json
import math
from pathlib import Path

import numpy as np
import torch
from fastcore.script import call_parse
from PIL import Image

from vae_nb.data.dataset import load, split
from vae_nb.data.scenes import FACTORS, SHAPES, scene_factors
from vae_nb.export import export_onnx, load_pretrained
from vae_nb.model.distributions import gaussian_kl
from vae_nb.plots import RECORDS

HUES = {"floor_hue": "floor", "wall_hue": "wall", "object_hue": "object"}


def packed(x):
    "Numbers as little-endian float16 in base64, with their shape."
    x = np.asarray(x, "<f2")
    return dict(shape=list(x.shape), half=base64.b64encode(x.tobytes()).decode())


def features(name, v):  # (M,) -> (M,k)
    "What a factor adds up from: harmonics of an angle, one column a shape, powers of anything else."
    if name in HUES:
        a = np.deg2rad(v)
        return np.stack([np.cos(a), np.sin(a), np.cos(2 * a), np.sin(2 * a)], 1)
    if name == "shape": return np.eye(len(SHAPES))[v.astype(int)]
    low, high = FACTORS[name][:2]
    t = 2 * (v - low) / (high - low) - 1
    return np.stack([t, t * t, t**3], 1)


def readings(name, v):  # (M,) -> (M,k)
    "What is read back from z by a linear map: cos and sin of an angle, one score a shape, else the value in [-1,1]."
    return features(name, v)[:, :{"shape": len(SHAPES)}.get(name, 2 if name in HUES else 1)]


def solve(X, Y, ridge=1.0):
    "Least squares with a small ridge; columns of X are centred by the caller."
    return np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ Y)


@torch.no_grad()
def encode_all(model, images, batch=32):
    "Posterior means and log-variances (M,D) of bytes (M,3,S,S)."
    out = []
    for x in images.split(batch):
        q = model.encode(x.float() / 127.5 - 1)
        out.append(torch.stack([q.mu.flatten(1), q.logvar.flatten(1)]))
    return torch.cat(out, 1).double().numpy()


def additive(blocks, shape, mu, split):
    "mu = c[shape] + sum over factors of W[shape] @ features: a common W first, then for every shape what is left to explain."
    X = np.concatenate(blocks, 1)
    one, seen = np.eye(len(SHAPES))[shape], np.arange(len(mu)) < split
    common = solve(np.concatenate([X, one], 1)[seen], mu[seen])
    W = np.repeat(common[None], len(SHAPES), 0)
    left = mu - np.concatenate([X, one], 1) @ common
    for s in range(len(SHAPES)):
        rows = seen & (shape == s)
        W[s, :X.shape[1]] += solve(X[rows], left[rows], 20.0)
    return W[:, :X.shape[1]], common[X.shape[1]:], X


def regression(factors, mu, split):
    "The means of z from the factors, and the factors back from z by one linear map; R^2 on the held-out rows."
    smooth = [(i, name) for i, name in enumerate(FACTORS) if name != "shape"]
    blocks = [features(name, factors[:, i]) for i, name in smooth]
    means = {name: X[:split].mean(0) for (_, name), X in zip(smooth, blocks)}
    blocks = [X - mean for X, mean in zip(blocks, means.values())]
    shape = factors[:, list(FACTORS).index("shape")].astype(int)
    W, offsets, X = additive(blocks, shape, mu, split)
    centre = mu[:split].mean(0)
    predicted = np.einsum("mk,mkd->md", X[split:], W[shape[split:]]) + offsets[shape[split:]]
    explained = 1 - ((mu[split:] - predicted) ** 2).sum() / ((mu[split:] - centre) ** 2).sum()
    columns = dict(zip([name for _, name in smooth], np.split(np.arange(X.shape[1]), np.cumsum([b.shape[1] for b in blocks])[:-1])))
    out = []
    for i, (name, f) in enumerate(FACTORS.items()):
        Y = readings(name, factors[:, i])
        offset = Y[:split].mean(0)
        R = solve(mu[:split] - centre, Y[:split] - offset, 10.0)
        error = Y[split:] - offset - (mu[split:] - centre) @ R
        r2 = 1 - (error**2).sum() / ((Y[split:] - offset) ** 2).sum()
        directions = W[:, columns[name]] if name in columns else offsets   # (shapes,k,D) or (shapes,D)
        out.append(dict(name=name, low=f.low, high=f.high, unit=f.unit, r2=round(float(r2), 3),
                        kind="hue" if name in HUES else "number" if name in columns else "shape",
                        directions=packed(directions), feature_means=means.get(name, np.zeros(0)).round(5).tolist(),
                        read=packed(R.T), read_offset=offset.round(5).tolist()))
    return out, float(explained)


@call_parse
def main(
    run: str,                   # packaged model, or run folder with a prior in it
    out: str = None,            # folder to write; None: model/ beside this file
    n: int = 4000,              # training scenes that the statistics are taken from
    examples: int = 12,         # example latents, of held-out scenes
    note: str = "",             # one sentence on the training, shown under the page; empty: what the record of `scenes` says
):
    "Write the model files of the playground."
    if run == "scenes" and not note:
        record = json.loads((RECORDS / "ready_model.json").read_text(encoding="utf-8"))
        about, psnr = record["training"], record["reconstruction"]["psnr"][0]
        note = (f"Trained for {about['config']['epochs']} epochs on {about['train']:,} rendered scenes with L1, LPIPS and KL. "
                f"Reconstructions of {record['n']} unseen ones, from the posterior means: {psnr:.1f} dB.")
    out = Path(out) if out else Path(__file__).parent / "model"
    out.mkdir(parents=True, exist_ok=True)
    model = load_pretrained(run).to(memory_format=torch.contiguous_format)
    prior = model.prior
    if getattr(prior, "kind", "") != "flow" or prior.axes is not None:
        raise ValueError(f"{run}: expected a model whose latents are a grid, with a flow as its prior; got {prior}")
    store = load("scenes", model.size)
    train, held_out = split(store.names)
    chosen = torch.cat([train[:n], held_out])
    mu, logvar = encode_all(model, store.images[chosen])
    factors = scene_factors(chosen.numpy()).double().numpy()
    n = len(train[:n])
    seen, new = slice(None, n), slice(n, n + examples)
    kl = gaussian_kl(torch.from_numpy(mu[seen]), torch.from_numpy(logvar[seen])).mean(0).numpy()
    covariance = np.cov(mu[seen].T) + np.diag(np.exp(logvar[seen]).mean(0))
    variances, vectors = np.linalg.eigh(covariance)
    order = np.argsort(-variances)
    factor = vectors[:, order] * np.sqrt(variances[order])
    table, explained = regression(factors, mu, n)
    z = torch.from_numpy(mu[new].astype("<f2").astype(np.float32))
    with torch.no_grad(): pictures = model.decode(z.view(-1, *model.latent_shape))
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()  # (E,S,S,3)
    Image.fromarray(np.concatenate(list(pixels), 1)).save(out / "examples.webp", lossless=True, quality=100, method=6)
    files = export_onnx(model, out)
    facts = dict(
        size=model.size, latent=list(model.latent_shape), D=model.D, images=n, note=note,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes={name: path.stat().st_size for name, path in files.items()}, held_out=len(held_out),
        mean=packed(mu[seen].mean(0)), std=packed(np.sqrt(np.diag(covariance))), factor=packed(factor),
        prior=dict(mean=packed(prior.mean), std=packed(prior.std), parameters=sum(p.numel() for p in prior.network.parameters())),
        share=(variances[order] / variances.sum())[:16].round(4).tolist(), kl=kl.round(4).tolist(),
        explained=round(explained, 3), factors=table, shapes=list(SHAPES),
        examples=dict(z=packed(mu[new]), factors=factors[new].round(3).tolist()))
    (out / "latents.json").write_text(json.dumps(facts), encoding="utf-8")
    for path in sorted(out.iterdir()): print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    print(f"KL {kl.sum():.1f} nats, {int((kl > .1).sum())} of {model.D} dimensions above 0.1; "
          f"factors explain {explained:.1%} of the variance of the means")
    for row in table: print(f"  {row['name']}: read back with R2 {row['r2']}")
    assert math.isfinite(explained)
