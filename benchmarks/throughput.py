"""Training speed, side by side: this library, a plain PyTorch loop, and pythae, all on the same network.

    OMP_NUM_THREADS=2 python benchmarks/throughput.py                             on the CPU
    python benchmarks/throughput.py --device cuda --steps 50 --preset default     on a GPU
    pip install --no-deps pythae cloudpickle                                      to have pythae in the race

Each round lets every contestant train for a few steps, in turn, and ratios are taken within a round: whatever else the
machine does hits all alike. What is kept is the median over the rounds, after one round of warm-up. The result goes to
benchmarks/results/throughput_DEVICE.json. Run it on a quiet machine.

The plain loop is how such projects are usually written: PNG files in a DataLoader with two workers, contiguous tensors, AdamW
as it comes, the lpips package, `.item()` for every term at every step; once in 32 bits, once under bf16 autocast. pythae knows
no LPIPS, so it is compared with this library without LPIPS.
"""
import argparse
import io
import json
import math
import platform
import tempfile
import time
import warnings
from contextlib import nullcontext, redirect_stderr
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median

import lpips
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from vae_nb.config import Config
from vae_nb.data import batches
from vae_nb.objective import Objective
from vae_nb.perceptual import LPIPS
from vae_nb.scenes import scenes
from vae_nb.train import new_state, pick_device, step
from vae_nb.vae import VAE

RESULTS = Path(__file__).parent / "results"


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


def ours(preset, images, folder, given, net):
    "This library's own step."
    config = Config(preset=preset, size=given.size, batch_size=given.batch, device=given.device)
    state = new_state(config)
    objective = Objective(0.02, LPIPS(net, given.trunk) if net else None).to(state.device)
    images = images.to(state.device)
    source = endless(lambda: batches(images, torch.arange(len(images)), given.batch, device=state.device, drop_last=True))

    def steps(n):
        for x in islice(source, n): step(state, objective, x, 100_000)
    return steps


def plain(preset, images, folder, given, net, precision):
    "A loop as it is usually written."
    device = pick_device(given.device)
    model = VAE.preset(preset, size=given.size).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge = lpips.LPIPS(net=net, pnet_rand=given.trunk == "random", verbose=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
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
                perceptual = judge(x_hat, x).mean()
                kl = -0.5 * (1 + q.logvar - q.mu ** 2 - q.logvar.exp()).mean()
                loss = l1 + perceptual + 0.02 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            [term.item() for term in (loss, l1, perceptual, kl)]
    return steps


def with_pythae(preset, images, folder, given):
    "pythae's BaseTrainer around the same encoder and decoder."
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as TheirVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    network = VAE.preset(preset, size=given.size)

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
                                 learning_rate=1e-4, no_cuda=given.device == "cpu", amp=given.device == "cuda")
    trainer = BaseTrainer(model, data, training_config=settings)
    trainer.prepare_training()
    loader = trainer.train_loader

    def steps(n):
        trainer.train_loader = Few(loader, n)
        with redirect_stderr(io.StringIO()): trainer.train_step(epoch=1)     # its progress bar
    return steps


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
    "FLOP for an image: network forward and backward (three times forward), LPIPS of x_hat (three times) and of x (once)."
    model, x = VAE.preset(preset, size=given.size), torch.zeros(1, 3, given.size, given.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(x)
    total, judge = 3 * counter.get_total_flops(), LPIPS(net, "random") if net else None
    if judge is not None:
        with FlopCounterMode(display=False) as counter, torch.no_grad(): judge(x, x)
        total += 2 * counter.get_total_flops()     # one half of it is the pass over x, which has no backward
    return total


def machine(device):
    "The kind of machine, in words."
    if device == "cuda": return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    maker = next((maker for maker in ("AMD EPYC", "Intel Xeon") if maker.split()[1] in name), name)
    return f"{maker}, {torch.get_num_threads()} threads"


def race(contestants, base, given):
    "Medians over the rounds: images/s of each, and how many times as fast as each of `base` it is."
    rows = []
    for _ in range(given.rounds + 1):
        rows.append({name: timed(steps, given.steps, given.device) / given.steps for name, steps in contestants.items()})
        print("  " + "  ".join(f"{name} {given.batch / s:.2f}" for name, s in rows[-1].items()), "images/s", flush=True)
    rows = rows[1:]
    return dict(images_per_second={name: round(given.batch / median(row[name] for row in rows), 2) for name in contestants},
                ratio={f"ours / {other}": round(median(row[other] / row["ours"] for row in rows), 2) for other in base})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["demo", "default", "reference"], nargs="+", default=["default", "reference"])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contestant in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--net", choices=["alex", "vgg", "squeeze"], default="alex", help="trunk of LPIPS")
    parser.add_argument("--trunk", choices=["imagenet", "random"], default="random", help="its weights; speed is the same")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()

    images, _ = scenes(max(256, 2 * given.batch), size=given.size)
    folder = Path(tempfile.mkdtemp())
    for i, image in enumerate(images): Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")

    def installed(name):
        try: return version(name)
        except PackageNotFoundError: return None

    roof = {name: ceiling(given.device, dtype) for name, dtype in dict(bf16=torch.bfloat16, fp32=torch.float32).items()}
    record = dict(machine=machine(given.device), date=date.today().isoformat(), size=given.size, batch=given.batch, net=given.net,
                  steps=given.steps, rounds=given.rounds, matmul_ceiling_tflops={k: round(v / 1e12, 3) for k, v in roof.items()},
                  versions={name: installed(name) for name in ("torch", "torchvision", "lpips", "pythae")}, presets={})
    for preset in given.preset:
        common = (preset, images, folder, given)
        print(f"{preset}, L1 + LPIPS + KL")
        full = race({"ours": ours(*common, given.net), "plain fp32": plain(*common, given.net, "fp32"),
                     "plain bf16": plain(*common, given.net, "bf16")}, ("plain fp32", "plain bf16"), given)
        flops = step_flops(preset, given, given.net)
        rate = full["images_per_second"]["ours"] * flops
        full |= dict(gflop_per_image=round(flops / 1e9, 2), achieved_tflops=round(rate / 1e12, 3),
                     share_of_ceiling=round(rate / max(roof.values()), 3),
                     roofline_images_per_second=math.floor(max(roof.values()) / flops * 10) / 10)
        record["presets"][preset] = dict(full=full)
        if find_spec("pythae"):
            print(f"{preset}, without LPIPS")
            pair = {"ours": ours(*common, None), "pythae": with_pythae(*common)}
            record["presets"][preset]["without_lpips"] = race(pair, ("pythae",), given)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"throughput_{given.device}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["presets"], indent=1))


if __name__ == "__main__":
    main()
