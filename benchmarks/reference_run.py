"""How far the network of twelve million parameters came: one record and the pictures of its page.

    vae-train scenes --beta-schedule warmup --epochs 1 --lpips squeeze --wandb disabled --threads 1 --out runs/scenes-default
    python benchmarks/reference_run.py runs/scenes-default

Reconstruction is measured on scenes that no run of 15,000 has seen (numbers 15,000 and up), beside the model that comes with the
package; samples come from N(0, I) and from a Gaussian fitted to the posteriors of 2,500 scenes. To
benchmarks/results/reference_run.json and nbs/images/reference_*.jpg.
"""
import argparse
import json
from pathlib import Path

import torch
from ready_model import IMAGES, picture, training
from record import RESULTS, header

from vae_nb.analysis.factors import factor_errors, read_factors, valid_scenes
from vae_nb.analysis.generate import decode_all, encode_all
from vae_nb.analysis.metrics import compare_sets, reconstruction_metrics, sample_images
from vae_nb.analysis.prior import encode_dataset, fit_prior, summarize_posterior
from vae_nb.data.dataset import load_images, to_float
from vae_nb.data.scenes import render, scene_factors
from vae_nb.export import load_pretrained
from vae_nb.loss.lpips import LPIPS
from vae_nb.train.checkpoint import load_model

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=200, help="unseen scenes, and samples of each prior")
    parser.add_argument("--known", type=int, default=2500, help="training scenes that the Gaussian is fitted to")
    given = parser.parse_args()
    torch.manual_seed(0)
    models = dict(default=load_model(given.run / "model.safetensors", "cpu"), web=load_pretrained("scenes"))
    lpips, truth = LPIPS("squeeze", "imagenet"), scene_factors(range(15_000, 15_000 + given.n))
    x = to_float(render(truth, models["default"].size))
    rebuilt = {name: decode_all(model, encode_all(model, x)) for name, model in models.items()}
    record = header("cpu", training=training(given.run), n=given.n, known=given.known)
    record["reconstruction"] = {name: reconstruction_metrics(x, x_hat, lpips) for name, x_hat in rebuilt.items()}
    record["factors"] = {name: factor_errors(read_factors(x_hat)[0], truth) for name, x_hat in rebuilt.items()}
    picture(torch.cat([x[:8], rebuilt["default"][:8], rebuilt["web"][:8]]), 8, IMAGES / "reference_reconstructions.jpg")
    known = torch.as_tensor(load_images("scenes", models["default"].size, given.known).images[:])
    mu, logvar = encode_dataset(models["default"], known, batch_size=50)
    record["posterior"] = summarize_posterior(mu, logvar)
    record["samples"] = {}
    for name, prior in {"N(0, I)": None, "gaussian": fit_prior(mu, logvar, "gaussian")}.items():
        made = sample_images(models["default"], given.n, prior).clamp(-1, 1)
        record["samples"][name] = dict(valid=valid_scenes(made).float().mean().item(), **compare_sets(x, made, "factors"))
        picture(made[:8], 8, IMAGES / f"reference_samples_{name.split('(')[0].lower()}.jpg")
    (RESULTS / "reference_run.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("reconstruction", "factors", "posterior", "samples")}, indent=1))


if __name__ == "__main__":
    main()
