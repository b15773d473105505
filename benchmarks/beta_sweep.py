r"""What beta buys: one small VAE, several values of beta, three seeds each, the same number of steps for all.

    python benchmarks/beta_sweep.py --device cuda --minutes 1.5                     on a GPU
    python benchmarks/beta_sweep.py --steps 400 --seeds 1 --minutes 30              something of it on a CPU

Scenes of 64x64 pixels, a vector of 10 latents, no flips (they would change two of the factors). The loss is the sum of absolute
errors over all pixel values of images in [-1,1] plus beta times the sum of the KL: the negative beta-ELBO, but for a constant, of
a Laplace likelihood with scale 1. (Equally, beta is the scale of the Laplace likelihood whose ELBO is maximised.)
beta_sweep_CARD.json has the rate, the distortion and the KL of every dimension on 3,000 held-out scenes;
beta_sweep_codes_CARD.npz their posteriors (mu, logvar: models x scenes x 10, float16) and factors;
beta_sweep_pictures_CARD.npz eight of them as the first seed of every beta shows them; beta_sweep_BETA.safetensors (float16) the
first seed of three values of beta, with the arguments of `VAE` in its metadata.
"""
import argparse
import io
import json
import time

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from steps import Record, Shuffled, arguments, captured, fast, restart, small_scenes, wait, write

from vae_nb.data.dataset import to_float
from vae_nb.data.scenes import FACTORS, scene_factors
from vae_nb.loss.objective import Objective, psnr
from vae_nb.model.vae import VAE
from vae_nb.train.config import Config
from vae_nb.train.loop import learning_rate

NETWORK = dict(size=64, widths=[32, 64, 128], latent=10, blocks=1, patch_size=2, mid_blocks=0)   # 0.7 M parameters


class Trainer:
    "A model, and the step that trains it: captured once, and used for every beta and seed."
    def __init__(self, images, given):
        device, self.given = given.device, given
        self.model = VAE(**NETWORK).to(device, memory_format=torch.channels_last)
        self.beta = torch.ones((), device=device)
        self.objective = Objective(self.beta, pixels="sum", latents="sum").to(device)
        self.lr = torch.full((), given.lr, device=device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=True, capturable=device == "cuda")
        self.images, self.source = images, Shuffled(given.images, given.batch, device)
        self.source.advance()
        self.run = captured(self.step, device)
        self.source.taken = 0

    def start(self, beta, seed):
        "Begin anew, in the same memory."
        torch.manual_seed(seed)
        restart(self.model, self.optimizer, VAE(**NETWORK).state_dict())
        self.beta.fill_(beta)
        self.source.taken = 0

    def step(self):
        x = to_float(self.images[self.source.rows()]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            x_hat, posterior = self.model(x)
            loss = self.objective(x, x_hat, posterior)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def train(self, steps, total):
        "The first steps of `total`."
        config = Config(lr=self.given.lr, warmup=min(100, total // 10))
        for i in range(steps):
            self.lr.fill_(learning_rate(i, total, config))
            self.source.advance()
            self.run()
        wait(self.given.device)


@torch.no_grad()
def measured(model, images, batch=500):
    "Rate, distortion and the KL of each dimension on held-out scenes, and their posteriors."
    torch.manual_seed(0)
    rows = dict(l1=[], psnr=[], kl=[], mu=[], logvar=[])
    for part in images.split(batch):
        x = to_float(part).contiguous(memory_format=torch.channels_last)
        x_hat, q = model(x)
        for key, value in dict(l1=(x_hat - x).abs().flatten(1).mean(1), psnr=psnr(x, x_hat), kl=q.kl(), mu=q.mu,
                               logvar=q.logvar).items(): rows[key].append(value.cpu())
    found = {key: torch.cat(value) for key, value in rows.items()}
    kl, l1 = found["kl"].mean(0), found["l1"].mean().item()
    row = dict(rate=round(kl.sum().item(), 4), distortion=round(l1 * x[0].numel(), 3), l1=round(l1, 6),
               psnr=round(found["psnr"].mean().item(), 3), kl=[round(nats, 4) for nats in kl.tolist()])
    return row, found["mu"], found["logvar"]


@torch.no_grad()
def shown(model, images):
    "Reconstructions from the posterior means, as bytes (M,3,S,S)."
    x_hat = model.decode(model.encode(to_float(images)).mode())
    return ((x_hat + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def npz(path, **arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write(path, buffer.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, minutes=1.5)
    parser.add_argument("--beta", type=float, nargs="+", default=[1, 8, 32, 64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="of every model; fewer, if the minutes allow only fewer")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--test", type=int, default=3000, help="held-out scenes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--keep", type=float, nargs="+", default=[1, 64, 256], help="values of beta whose weights are kept")
    given = parser.parse_args()
    if given.rehearse:
        given.beta, given.seeds, given.steps, given.images, given.test, given.batch = [1, 64], 2, 4, 64, 40, 8

    fast(given.device)
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "device", "rehearse")}
    record = Record("beta_sweep", given, **settings, network=NETWORK, likelihood="Laplace, scale 1; distortion = sum |x_hat - x|")
    images = small_scenes(given.images + given.test, NETWORK["size"], given.device)
    factors = scene_factors(range(len(images)))
    test, pictures = images[given.images:], {"input": images[given.images:given.images + 8].cpu().numpy()}
    record.save(render_seconds=round(record.clock.elapsed, 1))

    trainer, rows, mus, logvars = Trainer(images, given), [], [], []
    file = lambda name: given.out / f"beta_sweep_{name}"
    probe = min(given.steps, 200 if given.device == "cuda" else 5)   # how many steps do the minutes allow?
    start = time.perf_counter()
    trainer.train(probe, given.steps)
    pace = (time.perf_counter() - start) / probe
    steps = max(1, min(given.steps, int(0.85 * record.clock.left / (given.seeds * len(given.beta)) / pace)))
    for seed in range(given.seeds):
        for beta in given.beta:
            if record.clock.left < 1.1 * steps * pace: break
            start = time.perf_counter()
            trainer.start(beta, seed)
            trainer.train(steps, steps)
            row, mu, logvar = measured(trainer.model, test)
            rows.append(dict(beta=beta, seed=seed, steps=steps, **row, seconds=round(time.perf_counter() - start, 2)))
            mus.append(mu.half().numpy())
            logvars.append(logvar.half().numpy())
            if seed == 0: pictures[f"beta {beta:g}"] = shown(trainer.model, test[:8])
            if seed == 0 and beta in given.keep:
                weights = {key: value.half().cpu().contiguous() for key, value in trainer.model.state_dict().items()}
                about = dict(hparams=json.dumps(NETWORK), beta=f"{beta:g}", seed=str(seed), steps=str(steps))
                write(file(f"{beta:g}.safetensors"), to_safetensors(weights, about))
            record.save(steps=steps, models=rows, parameters=sum(p.numel() for p in trainer.model.parameters()))
            print(rows[-1], flush=True)
        if not rows: raise SystemExit("beta_sweep: no time was left after the scenes were rendered")
        npz(file(f"codes_{record.card}.npz"), mu=np.stack(mus), logvar=np.stack(logvars), beta=[row["beta"] for row in rows],
            seed=[row["seed"] for row in rows], factors=factors[given.images:].numpy(), names=list(FACTORS))
        npz(file(f"pictures_{record.card}.npz"), **pictures)


if __name__ == "__main__":
    main()
