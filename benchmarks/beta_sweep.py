r"""What beta buys: one small VAE, six values of beta, three seeds each, the same number of steps for all.

    python benchmarks/beta_sweep.py                     about 20 minutes of one core; begun again, it goes on where it was

Scenes of 32x32 pixels, a vector of 16 latents, no flips (they would change two of the factors). The loss is the sum of absolute
errors over all pixel values of images in [-1,1] plus beta times the sum of the KL: the negative beta-ELBO, but for a constant, of
a Laplace likelihood with scale 1. (Equally, beta is the scale of the Laplace likelihood whose ELBO is maximised.)
Trained models stay in the folder given by --work; beta_sweep_cpu.json has rate, distortion, KL of every dimension, active units,
and MIG, SAP and DCI of one draw of z for each of 3,000 held-out scenes, and of those draws rotated at random; beta_sweep.jpg
eight of those scenes as the first seed shows them, beta_sweep_traversals.jpg what the dimensions of the model with the highest
MIG do.
"""
import argparse
import time
from pathlib import Path

import torch
from record import save_enlarged
from steps import Record, Shuffled, arguments, small_scenes

from vae_nb.analysis.disentanglement import disentanglement
from vae_nb.data.dataset import to_float
from vae_nb.data.scenes import scene_factors
from vae_nb.loss.objective import Objective, psnr
from vae_nb.model.vae import VAE
from vae_nb.train.config import Config
from vae_nb.train.loop import learning_rate

NETWORK = dict(size=32, widths=[32, 64], latent=16, blocks=1, patch_size=4, mid_blocks=0)


def train(images, beta, seed, given, network=NETWORK):
    "One model."
    torch.manual_seed(seed)
    model = VAE(**network).to(given.device, memory_format=torch.channels_last)
    objective = Objective(beta, pixels="sum", latents="sum")
    optimizer = torch.optim.Adam(model.parameters(), lr=given.lr)
    config, source = Config(lr=given.lr, warmup=given.steps // 10), Shuffled(len(images), given.batch, given.device)
    for i in range(given.steps):
        source.advance()
        x = to_float(images[source.rows()]).contiguous(memory_format=torch.channels_last)
        x_hat, posterior = model(x)
        loss = objective(x, x_hat, posterior)["loss"]
        optimizer.param_groups[0]["lr"] = learning_rate(i, given.steps, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def measured(model, images, batch=500):
    "Rate, distortion and the KL of each dimension on held-out scenes."
    torch.manual_seed(0)
    found = dict(l1=[], psnr=[], kl=[], mu=[])
    for part in images.split(batch):
        x = to_float(part)
        x_hat, q = model(x)
        row = dict(l1=(x_hat - x).abs().flatten(1).mean(1), psnr=psnr(x, x_hat), kl=q.kl(), mu=q.mu)
        for key, value in row.items():
            found[key].append(value)
    found = {key: torch.cat(value) for key, value in found.items()}
    kl, l1 = found["kl"].mean(0), found["l1"].mean().item()
    row = dict(rate=round(kl.sum().item(), 4), distortion=round(l1 * images[0].numel(), 3), l1=round(l1, 6),
               psnr=round(found["psnr"].mean().item(), 3), kl=[round(nats, 4) for nats in kl.tolist()],
               active_units=int((found["mu"].var(0) > 0.01).sum()))   # Burda et al. 2016, section 5.2
    return row


@torch.no_grad()
def draws(model, images):
    "One z for every image (M,D)."
    torch.manual_seed(1)
    return torch.cat([model.encode(to_float(part)).sample() for part in images.split(500)]).cpu()


def training_arguments(parser, work):
    "The options of a sweep of small models; its own come before."
    arguments(parser, minutes=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200, help="of every model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--test", type=int, default=3000, help="held-out scenes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--work", type=Path, default=Path(work), help="folder of the finished runs")


def settings(given):
    "What the record says of the options."
    return {key: value for key, value in vars(given).items() if key not in ("out", "work", "device", "rehearse")}


def rounded(scores):
    return {key: rounded(value) if isinstance(value, dict) else round(value, 4) for key, value in scores.items()}


@torch.no_grad()
def traversals(model, images, kl, dims=9, steps=9):
    "The dimensions of largest KL, each moved from -2 to 2 while the others stay where a held-out scene has them."
    z = model.encode(to_float(images[:1])).mode().repeat(dims * steps, 1)
    for row, j in enumerate(torch.tensor(kl).topk(dims).indices.tolist()):
        z[row * steps:(row + 1) * steps, j] = torch.linspace(-2, 2, steps).to(z)
    return model.decode(z).cpu()


@torch.no_grad()
def reconstructions(model, images):
    "From the posterior means."
    return model.decode(model.encode(to_float(images)).mode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, nargs="+", default=[1, 4, 8, 16, 32, 64])
    training_arguments(parser, "runs/beta_sweep")
    given = parser.parse_args()
    if given.rehearse:
        given.beta, given.seeds, given.steps, given.images, given.test, given.batch = [1, 64], 2, 4, 64, 300, 8
        given.work = given.out / "work_beta"

    record = Record("beta_sweep", given, **settings(given), network=NETWORK,
                    likelihood="Laplace, scale 1; distortion = sum |x_hat - x|")
    images = small_scenes(given.images + given.test, NETWORK["size"], given.device)
    factors, test = scene_factors(range(len(images)))[given.images:], images[given.images:]
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    given.work.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], [to_float(test[:8]).cpu()]
    for seed in range(given.seeds):
        for beta in given.beta:
            file = given.work / f"{beta:g}_{seed}.pt"
            if not file.is_file():
                start = time.perf_counter()
                model = train(images[:given.images], beta, seed, given)
                row = dict(beta=beta, seed=seed, **measured(model, test), seconds=round(time.perf_counter() - start, 1))
                torch.save(dict(row=row, weights=model.state_dict()), file)
                print({key: value for key, value in row.items() if key != "kl"}, flush=True)
            kept = torch.load(file)
            model = VAE(**NETWORK).to(given.device)
            model.load_state_dict(kept["weights"])
            model.eval()
            z = draws(model, test)
            rows.append(kept["row"] | rounded(disentanglement(z, factors)))
            rows[-1]["rotated"] = rounded(disentanglement(z @ rotation, factors))
            if seed == 0:
                pictures.append(reconstructions(model, test[:8]).cpu())
            if rows[-1]["mig"] == max(row["mig"] for row in rows):
                best = traversals(model, test, rows[-1]["kl"])
    shown = max(rows, key=lambda row: row["mig"])
    record.save(models=rows, parameters=sum(p.numel() for p in model.parameters()),
                rows=["original", *given.beta], traversals={key: shown[key] for key in ("beta", "seed")})
    for name, images, columns in (("beta_sweep", torch.cat(pictures), 8), ("beta_sweep_traversals", best, 9)):
        save_enlarged(images, columns, given.out / f"{name}.jpg")


if __name__ == "__main__":
    main()
