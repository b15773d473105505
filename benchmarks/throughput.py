"""Training speed, side by side: this library, a plain PyTorch loop, and pythae, all on the same network.

    OMP_NUM_THREADS=2 python benchmarks/throughput.py                             on the CPU
    python benchmarks/throughput.py --device cuda --steps 50 --compile            on a GPU
    python benchmarks/throughput.py --until 0.1 --size 64 --preset default        seconds to a held-out L1, instead
    python benchmarks/throughput.py --profile                                     where our time goes, instead
    pip install --no-deps pythae cloudpickle                                      to have pythae in the race

Each round lets every contestant train for a few steps, in turn, and ratios are taken within a round: whatever else the
machine does hits all alike. What is kept is the median over the rounds, after one round of warm-up. The result goes to
benchmarks/results/throughput_DEVICE.json. Run it on a quiet machine.

With --until, each contestant is trained from fresh weights until its mean absolute error on 128 held-out images is as low as
that; only the seconds of training count. To benchmarks/results/seconds_to_l1_DEVICE.json. With --profile, the operations that
take most of our own step go to benchmarks/results/profile_DEVICE.json.

The plain loop is how such projects are usually written: PNG files in a DataLoader with two workers, contiguous tensors, AdamW
as it comes, the lpips package, `.item()` for every term at every step; once in 32 bits, once under bf16 autocast. pythae knows
no LPIPS, so it is compared with this library without LPIPS.
"""
import argparse
import io
import json
import math
import tempfile
import time
import warnings
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median

import lpips
import torch
from PIL import Image
from record import header, save
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from vae_nb.data.dataset import batches, to_float
from vae_nb.data.scenes import scenes
from vae_nb.loss.lpips import LPIPS
from vae_nb.loss.objective import Objective
from vae_nb.model.vae import VAE
from vae_nb.train.config import Config
from vae_nb.train.device import backend_flags, pick_device
from vae_nb.train.loop import learning_rate, new_state, noise, prepare_step, set_lr, update_ema

class Pictures(Dataset):
    "A folder of PNG files, as most tutorials read it."
    def __init__(self, folder):
        self.files = sorted(Path(folder).glob("*.png"))
        self.prepare = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                           transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self): return len(self.files)
    def __getitem__(self, i): return self.prepare(Image.open(self.files[i]).convert("RGB"))


def endless(make):
    while True: yield from make()


def one_step(state, compute, x, total=1_000_000):
    "What `fit` does in a step; `compute` comes from `prepare_step`."
    set_lr(state.optimizer, learning_rate(state.step, total, state.config))
    eps = noise(state.config.seed, state.step, (len(x), *state.model.latent_shape), state.device)
    terms = compute(x, eps, torch.ones((), device=state.device))
    state.step += 1
    update_ema(state)
    return terms


def ours(preset, images, folder, given, net):
    "This library's own step."
    config = Config(preset=preset, size=given.size, batch_size=given.batch, device=given.device, lr=given.lr, warmup=0,
                    compile="on" if given.compile else "off", cuda_graph="off")
    state = new_state(config)
    objective = Objective(0.02, LPIPS(net, given.backbone) if net else None).to(state.device)
    compute = prepare_step(state, objective, 1_000_000)
    images = images.to(state.device)
    source = endless(lambda: batches(images, torch.arange(len(images)), given.batch, device=state.device, drop_last=True))

    def steps(n):
        for x in islice(source, n): one_step(state, compute, x)
    return steps, lambda x: state.model(x)[0]


def plain(preset, images, folder, given, net, precision):
    "A loop as it is usually written."
    device = pick_device(given.device)
    model = VAE.from_preset(preset, size=given.size).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distance = lpips.LPIPS(net=net, pnet_rand=given.backbone == "random", verbose=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr)
    loader = DataLoader(Pictures(folder), given.batch, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True,
                        pin_memory=device.type == "cuda")
    half = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    source = endless(lambda: loader)

    def steps(n):
        for x in islice(source, n):
            x = x.to(device)
            with half:
                x_hat, q = model(x)
                l1 = (x_hat - x).abs().mean()
                perceptual = distance(x_hat, x).mean()
                kl = -0.5 * (1 + q.logvar - q.mu ** 2 - q.logvar.exp()).mean()
                loss = l1 + perceptual + 0.02 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            [term.item() for term in (loss, l1, perceptual, kl)]
    return steps, lambda x: model(x)[0]


def with_pythae(preset, images, folder, given):
    "pythae's BaseTrainer around the same encoder and decoder."
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as TheirVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    network = VAE.from_preset(preset, size=given.size)

    class TheirEncoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.body, self.head = network.encoder, network.to_posterior

        def forward(self, x):
            mu, logvar = self.head(self.body(x)).chunk(2, 1)
            return ModelOutput(embedding=mu.flatten(1), log_covariance=logvar.flatten(1))

    class TheirDecoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.head, self.body = network.from_latent, network.decoder

        def forward(self, z): return ModelOutput(reconstruction=self.body(self.head(z.view(-1, *network.latent_shape))))

    config = VAEConfig(input_dim=(3, given.size, given.size), latent_dim=network.D)
    model = TheirVAE(config, encoder=TheirEncoder(), decoder=TheirDecoder())
    data = BaseDataset((images / 127.5 - 1).float(), torch.zeros(len(images)))
    settings = BaseTrainerConfig(output_dir=tempfile.mkdtemp(), num_epochs=1, per_device_train_batch_size=given.batch,
                                 learning_rate=given.lr, no_cuda=given.device == "cpu", amp=given.device == "cuda")
    trainer = BaseTrainer(model, data, training_config=settings)
    trainer.prepare_training()
    loader = trainer.train_loader

    def steps(n):
        trainer.train_loader = Few(loader, n)
        with redirect_stderr(io.StringIO()): trainer.train_step(epoch=1)     # its progress bar
    return steps, lambda x: network(x)[0]


class Few:
    "The first n batches of a loader."
    def __init__(self, loader, n): self.loader, self.n, self.dataset = loader, n, loader.dataset
    def __iter__(self): return islice(endless(lambda: self.loader), self.n)
    def __len__(self): return self.n


def timed(steps, n, device):
    "Seconds."
    if device == "cuda": torch.cuda.synchronize()
    start = time.perf_counter()
    steps(n)
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def ceiling(device, dtype, seconds=2.0):
    "FLOP/s of a large matrix product: what this machine can do at best."
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end: rates.append(2 * n ** 3 / timed(lambda k: a @ a, 1, device))
    return max(rates)


def step_flops(preset, given, net):
    "FLOP for an image: the network three times (backward goes to activations and to weights), LPIPS of x_hat twice, of x once."
    model, x = VAE.from_preset(preset, size=given.size), torch.zeros(1, 3, given.size, given.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(x)
    total, distance = 3 * counter.get_total_flops(), LPIPS(net, "random") if net else None
    if distance is not None:
        with FlopCounterMode(display=False) as counter, torch.no_grad(): distance(x, x)
        total += 1.5 * counter.get_total_flops()     # x and x_hat once; the frozen backbone's backward goes to x_hat only
    return total


def race(contestants, base, given):
    "Medians over the rounds: images/s of each, and how many times as fast as each of `base` it is."
    rows = []
    for _ in range(given.rounds + 1):
        rows.append({name: timed(steps, given.steps, given.device) / given.steps for name, (steps, _) in contestants.items()})
        print("  " + "  ".join(f"{name} {given.batch / s:.2f}" for name, s in rows[-1].items()), "images/s", flush=True)
    rows = rows[1:]
    return dict(images_per_second={name: round(given.batch / median(row[name] for row in rows), 2) for name in contestants},
                ratio={f"ours / {other}": round(median(row[other] / row["ours"] for row in rows), 2) for other in base})


def to_the_mark(make, held_out, given):
    "Images, and seconds of training, until the held-out L1 is as low as asked; measured after every few steps."
    torch.manual_seed(0)
    steps, reconstruct = make()
    done, seconds, x = 0, 0.0, to_float(held_out.to(given.device))
    while True:
        seconds, done = seconds + timed(steps, given.steps, given.device), done + given.steps
        with torch.no_grad(), torch.autocast(given.device, torch.bfloat16): l1 = (reconstruct(x) - x).abs().mean().item()
        if done % (10 * given.steps) == 0: print(f"    {done * given.batch:6,} images  {seconds:5.0f} s  L1 {l1:.3f}", flush=True)
        if l1 <= given.until: return dict(images=done * given.batch, seconds=round(seconds, 1))


def contestants(preset, images, folder, given, with_lpips):
    "Name -> how to make it, of all that train on this loss."
    common = (preset, images, folder, given)
    if with_lpips:
        return {"ours": lambda: ours(*common, given.net), "plain fp32": lambda: plain(*common, given.net, "fp32"),
                "plain bf16": lambda: plain(*common, given.net, "bf16")}
    return {"ours": lambda: ours(*common, None), "pythae": lambda: with_pythae(*common)} if find_spec("pythae") else {}


def speed(preset, images, folder, given, roof):
    "Images/s of everybody, and how far ours is from what the machine can do."
    found = {}
    for key, with_lpips in dict(full=True, without_lpips=False).items():
        print(f"{preset}, L1 {'+ LPIPS ' * with_lpips}+ KL")
        made = {name: make() for name, make in contestants(preset, images, folder, given, with_lpips).items()}
        if made: found[key] = race(made, list(made)[1:], given)
    flops, best = step_flops(preset, given, given.net), max(roof.values())
    rate = found["full"]["images_per_second"]["ours"] * flops
    found["full"] |= dict(gflop_per_image=round(flops / 1e9, 2), achieved_tflops=round(rate / 1e12, 3),
                          share_of_ceiling=round(rate / best, 3), roofline_images_per_second=math.floor(best / flops * 10) / 10)
    return found


def marks(preset, images, folder, given, roof):
    "Images and seconds that everybody needs to the mark."
    held_out, _ = scenes(128, size=given.size, seed=1)
    found = {}
    for with_lpips in (True, False):
        for name, make in contestants(preset, images, folder, given, with_lpips).items():
            print(f"{preset}, L1 {'+ LPIPS ' * with_lpips}+ KL: {name}")
            found[name if with_lpips else f"{name} without LPIPS"] = to_the_mark(make, held_out, given)
    return found


def profile(preset, images, folder, given, roof):
    "The operations that take most of our own step, and their shares of it."
    steps, _ = ours(preset, images, folder, given, given.net)
    steps(2)
    kind = torch.profiler.ProfilerActivity.CUDA if given.device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as watched: timed(steps, 3, given.device)
    spent = {event.key: event.self_device_time_total if given.device == "cuda" else event.self_cpu_time_total
             for event in watched.key_averages()}
    largest = sorted(spent, key=spent.get, reverse=True)[:8]
    return {name: round(spent[name] / sum(spent.values()), 3) for name in largest}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["demo", "default", "reference"], nargs="+", default=["default", "reference"])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contestant in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=256, help="scenes to train on")
    parser.add_argument("--until", type=float, help="the held-out L1 to be reached, in [0,2]")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compile", action="store_true", help="ours, as in long runs on a GPU")
    parser.add_argument("--net", choices=["alex", "vgg", "squeeze"], default="alex", help="network of LPIPS")
    parser.add_argument("--backbone", choices=["imagenet", "random"], default="random", help="its weights; speed is the same")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()

    images, _ = scenes(max(given.images, 2 * given.batch), size=given.size)
    folder = Path(tempfile.mkdtemp())
    for i, image in enumerate(images): Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")

    roof = {name: ceiling(given.device, dtype) for name, dtype in dict(bf16=torch.bfloat16, fp32=torch.float32).items()}
    what, measure = ("profile", profile) if given.profile else ("seconds_to_l1", marks) if given.until else ("throughput", speed)
    settings = {name: value for name, value in vars(given).items() if name not in ("profile", "preset", "device")}
    record = header(given.device, **settings, matmul_ceiling_tflops={k: round(v / 1e12, 3) for k, v in roof.items()}, presets={})
    for preset in given.preset:
        with backend_flags(pick_device(given.device)): record["presets"][preset] = measure(preset, images, folder, given, roof)
        save(record, what, given.device)
    print(json.dumps(record["presets"], indent=1))


if __name__ == "__main__":
    main()
