r"""Are the figures of the literature reached? Burda et al. 2016 on MNIST; the linear VAE against exact pPCA on Frey faces.

    python benchmarks/literature.py --only mnist --device cuda --minutes 5 --data mnist.npz                 on a GPU
    python benchmarks/literature.py --only frey --minutes 5 --frey freyfaces.npz                            a CPU, minutes
    python benchmarks/literature.py --only "VAE k=1" --minutes 20 --reserve 300 --test 2000 --data mnist.npz   one core

MNIST: binarised anew in every epoch (pixel intensity = probability of a 1), one stochastic layer of 50 units, two layers of 200
tanh units on either side, Xavier initialisation, output bias from the mean image, Adam with epsilon 1e-4. The paper trains
batches of 20 for 3^i epochs at 0.001 * 10^(-i/7), i = 0...7, 3,280 epochs in all. Here every model gets a share of the minutes,
the eight stages take the same parts of it as in the paper, and batch and learning rate are larger. The test NLL is minus the
IWAE bound with k = 5,000 on the test images, binarised once from a seed. Figures go to literature_CARD.json and frey_CARD.json.
"""
import argparse
import math

import numpy as np
import torch
from steps import Clock, Record, Shuffled, arguments, captured, fast, wait
from torch import nn
from torch.nn import functional as F

from vae_nb.model.linear_vae import LinearVAE

PAPER = {"VAE k=1": 86.76, "IWAE k=5": 85.54, "IWAE k=50": 84.78}   # nats; Burda et al. 2016, table 1, one stochastic layer
SHARES = {"VAE k=1": 0.25, "IWAE k=5": 0.3, "IWAE k=50": 0.45}      # of the minutes
STAGES = 8


class Burda(nn.Module):
    "The network of Burda et al. 2016 with one stochastic layer."
    def __init__(self, mean, latent=50, hidden=200):   # mean (784,) of the training images, in [0,1]
        super().__init__()
        def body(inputs): return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.encoder, self.to_q = body(len(mean)), nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Sequential(*body(latent), nn.Linear(hidden, len(mean)))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.decoder[-1].bias.data = torch.logit(mean.clamp(0.001, 0.999))

    def log_weights(self, x, k):   # x (B,784) zeros and ones -> (k,B) nats
        "log p(x,z) - log q(z|x) for k draws of z from q."
        mu, log_std = self.to_q(self.encoder(x)).chunk(2, dim=1)             # (B,D)
        eps = torch.randn(k, *mu.shape, device=x.device)                     # (k,B,D)
        z = mu + log_std.exp() * eps
        log_ratio = (0.5 * (eps.square() - z.square()) + log_std).sum(2)     # log p(z) - log q(z|x); 2 pi cancels
        logits = self.decoder(z)                                             # (k,B,784)
        log_x = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(2)
        return log_x + log_ratio


def bound(log_weights):   # (k,B) -> (B,)
    "The importance-weighted bound (Burda et al. 2016, eq. 8); k = 1 is the ELBO."
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def stage_lr(progress, peak):
    "The paper's rate at this share of the run: stage i has 3^i of 3,280 parts, at 10^(-i/7) of the peak."
    parts = progress * (3 ** STAGES - 1) / 2
    stage = min(STAGES - 1, int(math.log(2 * parts + 1, 3) + 1e-9))
    return peak * 10 ** (-stage / 7)


@torch.no_grad()
def test_nll(model, images, k, seed, rows):   # images (M,784) in [0,1]
    "Minus the bound with k draws, a mean over the test images, and its standard error over images."
    torch.set_float32_matmul_precision("highest")
    x = torch.bernoulli(images.cpu(), generator=torch.Generator().manual_seed(seed)).to(images.device)
    torch.manual_seed(seed)
    few = max(1, rows // k)
    found = torch.cat([bound(torch.cat([model.log_weights(part, min(k, rows)) for _ in range(max(1, k // rows))]))
                       for part in x.split(few)]).double()
    return -found.mean().item(), found.std().item() / len(found) ** 0.5


def train(name, seconds, train_x, test_x, given):
    "One model: trained until its time (or its number of epochs) is over, then tested."
    k, device, clock = int(name.split("=")[1]), given.device, Clock(seconds / 60)
    fast(device)
    torch.manual_seed(given.seed)
    model = Burda(train_x.float().mean(0).cpu() / 255).to(device)
    lr = torch.full((), given.lr, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-4, fused=True, capturable=device == "cuda")
    source, mean_bound = Shuffled(len(train_x), given.batch, device), torch.zeros((), device=device)

    def step():
        shade = train_x[source.rows()]                                       # (B,784) bytes
        x = (torch.rand(shade.shape, device=device) * 255 < shade).float()   # dynamic binarisation
        loss = -bound(model.log_weights(x, k)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        mean_bound.lerp_(-loss.detach(), 1e-3)

    source.advance()
    run, done, total = captured(step, device), 0, given.epochs * source.per_epoch
    source.taken, few = 0, 100 if device == "cuda" else 10   # steps between looks at the clock
    while (progress := done / total if total else clock.elapsed / clock.seconds) < 1 and clock.left > 0:
        lr.fill_(stage_lr(progress, given.lr))
        for _ in range(few):
            source.advance()
            run()
        done += few
        wait(device)
    trained = clock.elapsed
    nll, error = test_nll(model, test_x, given.test_k, given.seed, given.rows)
    test_elbo, _ = test_nll(model, test_x, 1, given.seed, given.rows)
    return dict(model=name, k=k, nll=round(nll, 3), standard_error=round(error, 3), paper=PAPER[name],
                test_bound_k1=round(-test_elbo, 3), training_bound=round(mean_bound.item(), 3), steps=done,
                epochs=round(done / source.per_epoch, 2), paper_epochs=3280, finished=round(min(1.0, progress), 3),
                train_seconds=round(trained, 1), test_seconds=round(clock.elapsed - trained, 1))


def mnist(given, record):
    names = [name for name in PAPER if given.only in ("all", "mnist", name)]
    data = np.load(given.data)
    known, unseen = (torch.from_numpy(data[key]).flatten(1) for key in ("train_images", "test_images"))
    train_x = known[:2000 if given.rehearse else None].to(given.device)
    test_x = unseen[::len(unseen) // given.test][:given.test].to(given.device) / 255
    rows, total = [], sum(SHARES[name] for name in names)
    for name in names:
        share = SHARES[name] / total
        total -= SHARES[name]
        rows.append(train(name, share * max(1, record.clock.left - given.reserve), train_x, test_x, given))
        record.save(mnist=rows)
        print(rows[-1], flush=True)


def fit_linear(x, D, steps, given, clock):
    "Gradient ascent on the exact ELBO of a linear VAE: decoder, noise and a linear encoder, in float64."
    torch.manual_seed(given.seed)
    N, mean = x.shape[1], x.mean(0)
    draw = lambda *shape: (torch.randn(*shape, dtype=torch.float64) * 0.01).requires_grad_()
    W, encoder = draw(N, D), draw(D, N)
    logvar, log_sigma = torch.zeros(D, dtype=torch.float64, requires_grad=True), x.std().log().clone().requires_grad_()
    optimizer = torch.optim.Adam([W, encoder, logvar, log_sigma], lr=given.frey_lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve, marks = [], {round(steps ** (j / 60)) for j in range(61)}   # steps at equal distances on a logarithmic axis
    for i in range(steps):
        if clock.left < 2: break
        model = LinearVAE(W, mean, log_sigma.exp())
        loss = -model.elbo(x, (x - mean) @ encoder.T, logvar.expand(len(x), D)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i + 1 in marks: curve.append([i + 1, round(-loss.item(), 4)])
    return LinearVAE(W.detach(), mean, log_sigma.detach().exp()), curve


def exact(x, D):
    "pPCA by eigendecomposition of the covariance (Tipping & Bishop 1999): W, sigma and the mean log p(x)."
    M, N = x.shape
    values, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)) / M)
    values, vectors = values.flip(0), vectors.flip(1)
    variance = values[D:].mean()
    log_p = -0.5 * (N * math.log(2 * math.pi) + values[:D].log().sum() + (N - D) * variance.log() + N)
    return vectors[:, :D] * (values[:D] - variance).sqrt(), variance.sqrt().item(), log_p.item()


def frey(given, record):
    x = torch.from_numpy(np.load(given.frey)["x"]).flatten(0, 1).double() / 255   # (1965,560)
    steps, D = (30 if given.rehearse else given.frey_steps), given.frey_latent
    W, sigma, log_p = exact(x, D)
    found, curve = fit_linear(x, D, steps, given, record.clock)
    ours, elbo = found.log_p(x).mean().item(), curve[-1][1]
    angles = torch.linalg.svdvals(torch.linalg.qr(W)[0].T @ torch.linalg.qr(found.W)[0]).clamp(max=1).acos()
    row = dict(images=len(x), values=x.shape[1], latent=D, steps=steps, log_p_exact=round(log_p, 4), log_p=round(ours, 4),
               elbo=elbo, relative_error=abs(ours - log_p) / abs(log_p), relative_gap=abs(elbo - log_p) / abs(log_p),
               sigma_exact=round(sigma, 6), sigma=round(found.s.item(), 6),
               largest_angle_degrees=round(math.degrees(angles.max().item()), 3), curve=curve)
    record.save(frey=row)
    print({key: value for key, value in row.items() if key != "curve"}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, minutes=5)
    parser.add_argument("--data", default="mnist.npz", help="train_images and test_images, bytes (M,28,28)")
    parser.add_argument("--frey", default="freyfaces.npz", help="x, bytes (1,1965,560)")
    parser.add_argument("--only", choices=["all", "mnist", "frey", *PAPER], default="all")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=4e-3, help="of the first stage; the paper's is 1e-3, for batches of 20")
    parser.add_argument("--epochs", type=int, default=0, help="0: as many as the minutes allow")
    parser.add_argument("--test", type=int, default=10000, help="test images, evenly spaced over all 10,000")
    parser.add_argument("--test-k", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=100000, help="codes decoded at a time in the test")
    parser.add_argument("--reserve", type=float, default=15, help="seconds kept for what is not training")
    parser.add_argument("--frey-latent", type=int, default=20)
    parser.add_argument("--frey-steps", type=int, default=3000)
    parser.add_argument("--frey-lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.rehearse: given.minutes, given.test, given.test_k, given.rows, given.reserve = 0.15, 100, 50, 1000, 1

    settings = {key: value for key, value in vars(given).items() if key not in ("out", "data", "frey", "device", "rehearse")}
    of_frey = {key: settings.pop(key) for key in ("frey_latent", "frey_steps", "frey_lr")}
    if given.only in ("all", "frey"): frey(given, Record("frey", given, seed=given.seed, **of_frey))
    if given.only != "frey": mnist(given, Record("literature", given, **settings))


if __name__ == "__main__":
    main()
