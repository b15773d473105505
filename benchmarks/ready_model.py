r"""What the model that comes with the package can do: one record and the pictures of its page.

    vae-train scenes --preset web --beta-schedule warmup --lr 2e-3 --batch-size 16 --epochs 3 --lpips squeeze \
        --wandb disabled --out runs/scenes
    python benchmarks/ready_model.py runs/scenes                  the run; the packaged weights are measured

Reconstruction is measured on scenes that no run of 15,000 has seen (numbers 15,000 and up). Samples come from N(0, I) and
from each prior that lies in the run's folder. To benchmarks/results/ready_model.json and nbs/images/ready_*.jpg.
"""
import argparse
import json
from pathlib import Path

import torch
from record import RESULTS, header

from vae_nb.analysis.factors import factor_errors, read_factors, valid_scenes
from vae_nb.analysis.generate import decode_all, encode_all, factor_rows
from vae_nb.analysis.metrics import compare_sets, reconstruction_metrics, sample_images
from vae_nb.analysis.prior import load_prior
from vae_nb.data.dataset import load_images, to_float
from vae_nb.data.scenes import render, scene_factors
from vae_nb.export import load_pretrained
from vae_nb.loss.lpips import LPIPS
from vae_nb.plots import grid

COOL = (0.85, 0.7)  # temperatures
IMAGES = RESULTS.parents[1] / "nbs" / "images"


def picture(x, columns, path):
    grid(x, columns=columns).save(path, quality=92, subsampling=0)


def training(run):
    "What the run's own files say."
    facts, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "summary"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {key: value for key, value in facts["config"].items() if key != "backbone"}
    seen = [row for row in rows if "l1" in row]
    seconds = sum(20 * facts["config"]["batch_size"] / row["images_per_second"] for row in seen)
    curve = [{key: round(row[key], 5) for key in ("step", "lr", "l1", "lpips", "kl")} for row in seen[::3]]
    held_out = [{key: round(value, 5) for key, value in row.items()} for row in rows if "psnr_val" in row]
    return dict(config=kept, train=facts["train"], parameters=facts["parameters"], seconds=round(seconds), curve=curve,
                held_out=held_out, summary={key: round(value, 5) for key, value in summary.items() if key != "seconds"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--priors", type=Path, nargs="*", default=[], help="files of fitted priors")
    parser.add_argument("--n", type=int, default=500, help="unseen scenes, and samples of each prior")
    given = parser.parse_args()
    torch.manual_seed(0)
    model, lpips = load_pretrained("scenes"), LPIPS("squeeze", "imagenet")
    truth = scene_factors(range(15_000, 15_000 + given.n))
    x = to_float(render(truth, model.size))
    x_hat = decode_all(model, encode_all(model, x))
    record = header("cpu", training=training(given.run), n=given.n)
    record["reconstruction"] = reconstruction_metrics(x, x_hat, lpips)
    picture(torch.cat([row for pair in zip(x[:16].split(8), x_hat[:16].split(8)) for row in pair]), 8,
            IMAGES / "ready_reconstructions.jpg")
    read = {"original": read_factors(x)[0], "reconstruction": read_factors(x_hat)[0]}
    record["factors"] = {name: factor_errors(factors, truth) for name, factors in read.items()}
    known = load_images("scenes", model.size, 2000)
    numbers = [int(name.split("_")[1]) for name in known.names]
    rows = factor_rows(model, to_float(known.images), scene_factors(numbers), x[6:7], steps=8)
    rows.save(IMAGES / "ready_factors.jpg", quality=92, subsampling=0)
    priors = {"N(0, I)": None} | {load_prior(path).kind: load_prior(path, model) for path in given.priors}
    record["samples"] = {}
    cases = [(name, prior, 1.0) for name, prior in priors.items()]
    cases += [(f"{name}, temperature {cool}", prior, cool) for name, prior in priors.items() if name == "flow" for cool in COOL]
    for name, prior, temperature in cases:
        made = sample_images(model, given.n, prior, temperature).clamp(-1, 1)
        record["samples"][name] = dict(valid=valid_scenes(made).float().mean().item(), **compare_sets(x, made, "factors"))
        if temperature == 1: picture(made[:16], 8, IMAGES / f"ready_samples_{name.split('(')[0].lower()}.jpg")
    record["samples"]["real scenes"] = dict(valid=valid_scenes(x).float().mean().item())
    (RESULTS / "ready_model.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("reconstruction", "factors", "samples")}, indent=1))


if __name__ == "__main__":
    main()
