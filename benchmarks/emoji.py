r"""Real images: what a run on the Fluent Emoji 3D set has learned, and where it fails.

    vae-train fluent --preset web --beta-schedule warmup --size 64 --latent 8x4x4 --epochs 5 --batch-size 32 --lpips squeeze \
        --ema 0.99 --wandb disabled --val-every 2 --out runs/emoji
    python benchmarks/emoji.py runs/emoji

The set has many pictures five or six times, in different skin tones, and a split by the hash of each name takes no notice. So
held-out pictures are counted twice: with a sibling among the training pictures, and without; and training pictures, for
comparison, by whether they come in several tones. Samples come from N(0, I), and from
a Gaussian fitted to the codes of the training pictures. To benchmarks/results/emoji.json and emoji_*.jpg.
"""
import argparse
import json
import platform
import re
from pathlib import Path

import torch
from record import RESULTS, header

from vae_nb.analysis.generate import decode_all, encode_all
from vae_nb.analysis.metrics import compare_sets, reconstruction_metrics
from vae_nb.analysis.prior import encode_dataset, fit_prior, nearest_neighbours
from vae_nb.data.dataset import load, split, to_float
from vae_nb.loss.lpips import LPIPS
from vae_nb.plots import grid
from vae_nb.train.checkpoint import load_model

TONES = r"-1f3f[b-f]"   # the five skin tones, in the name of a file


def group(name):
    "What an emoji shows, roughly, by its first code point."
    first = int(name.split("-")[0].split(".")[0], 16)
    if re.search(TONES, name):
        return "people and hands"
    if 0x1F600 <= first <= 0x1F64F or 0x1F910 <= first <= 0x1F92F or 0x1F970 <= first <= 0x1F97A:
        return "faces"
    if 0x1F1E6 <= first <= 0x1F1FF or first == 0x1F3F4:
        return "flags"
    if first < 0x2600 or 0x1F170 <= first <= 0x1F265 or 0x1F500 <= first <= 0x1F524 or 0x1F532 <= first <= 0x1F567:
        return "signs, letters, clocks"
    return "things, animals, others"


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def training(run):
    "What the run's own files say."
    facts = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {key: value for key, value in facts["config"].items() if key != "backbone"}
    held_out = [{key: value for key, value in row.items() if key.endswith("_val") or key in ("step", "epoch")}
                for row in rows if "psnr_val" in row]
    seen = [{key: row[key] for key in ("step", "l1", "lpips", "kl")} for row in rows if "l1" in row]
    return dict(config=kept, train=facts["train"], parameters=facts["parameters"], curve=seen, held_out=held_out)


def save(images, columns, name):
    grid(images, columns=columns, pad=1).save(RESULTS / f"emoji_{name}.jpg", quality=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=600, help="samples of each prior, and training pictures to compare them with")
    given = parser.parse_args()
    torch.manual_seed(0)
    model, lpips = load_model(given.run, "cpu"), LPIPS("squeeze", "imagenet")
    config = json.loads((given.run / "config.json").read_text())["config"]
    store = load("fluent", model.size)
    train, held = split(store.names, config["val_fraction"])
    bare = [re.sub(TONES, "", name) for name in store.names]
    known = {bare[i] for i in train}
    sibling = torch.tensor([bare[i] in known for i in held])
    x = to_float(store.images[held])
    x_hat = decode_all(model, encode_all(model, x)).clamp(-1, 1)
    few = train[torch.randperm(len(train))[:3 * len(held)]]
    some = to_float(store.images[few])
    tones = torch.tensor([bare.count(bare[i]) > 1 for i in few])

    counts = dict(images=len(store.names), different=len(set(bare)), held_out=len(held), sibling=int(sibling.sum()),
                  trained_on=len(few), tones=int(tones.sum()))
    record = header("cpu", python=platform.python_version(), command=f"python benchmarks/emoji.py {given.run.name}",
                    rehearsal=False, training=training(given.run), counts=counts)
    seen = decode_all(model, encode_all(model, some)).clamp(-1, 1)
    sets = {"trained on": (some, seen), "trained on, several tones": (some[tones], seen[tones]),
            "trained on, one picture": (some[~tones], seen[~tones]), "held out": (x, x_hat),
            "held out, with a sibling": (x[sibling], x_hat[sibling]),
            "held out, without": (x[~sibling], x_hat[~sibling])}
    record["reconstruction"] = {name: reconstruction_metrics(*pair, lpips) for name, pair in sets.items()}
    with torch.no_grad():
        each = torch.cat([lpips(a, b) for a, b in zip(x_hat.split(50), x.split(50))])
    kinds = [group(store.names[i]) for i in held]
    record["groups"] = {}
    for kind in sorted(set(kinds)):
        rows = torch.tensor([one == kind for one in kinds])
        record["groups"][kind] = dict(images=int(rows.sum()), lpips=each[rows].mean().item(),
                                      l1=(x_hat - x)[rows].abs().mean().item())
    order = each.argsort()
    record["worst"] = [store.names[held[i]] for i in order.flip(0)[:10].tolist()]
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:20]
    save(torch.cat([part for pair in zip(x[mixed].split(10), x_hat[mixed].split(10)) for part in pair]), 10, "reconstructions")
    save(torch.cat([x[order[-10:].flip(0)], x_hat[order[-10:].flip(0)]]), 10, "worst")

    mu, logvar = encode_dataset(model, store.images[train])
    record["latents"] = dict(D=model.D, variance_of_means=mu.flatten(1).var(0).mean().item(),
                             posterior_width=(logvar / 2).exp().mean().item())
    real = to_float(store.images[train][torch.randperm(len(train))[:given.n]])
    record["samples"], shown = {}, []
    for kind in ("standard", "gaussian"):
        prior = fit_prior(mu, logvar, kind)
        made = decode_all(model, prior.sample(given.n, torch.Generator().manual_seed(0))).clamp(-1, 1)
        record["samples"][kind] = compare_sets(real, made, "squeeze")
        shown.append(made[:10])
    near = nearest_neighbours(shown[-1], store.images[train])[1][:, 0]
    again = decode_all(model, encode_all(model, real)).clamp(-1, 1)
    record["samples"]["reconstructions"] = compare_sets(real, again, "squeeze")
    save(torch.cat(shown), 10, "samples")
    save(torch.cat([shown[-1], to_float(store.images[train][near])]), 10, "neighbours")
    (RESULTS / "emoji.json").write_text(json.dumps(rounded(record), indent=1) + "\n")
    print(json.dumps(rounded({key: record[key] for key in ("reconstruction", "groups", "samples", "latents")}), indent=1))


if __name__ == "__main__":
    main()
