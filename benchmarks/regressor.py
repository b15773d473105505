"""Train the factor regressor on 15,000 scenes, measure it on others, and write the file that the package ships.

python benchmarks/regressor.py [--epochs 7 --stop 6] [--device cpu]
"""
import argparse
import time

import record
import torch
import torch.nn.functional as F

from vae_nb.analysis import factors as fr
from vae_nb.data.dataset import load, to_float
from vae_nb.data.scenes import scene_factors

def small(images):
    "Pictures of 128 pixels at the network's size, as bytes."
    return torch.cat([fr.at_side(part.float(), fr.FactorRegressor.SIDE).round().byte() for part in images.split(500)])


def roughened(x, generator):
    "Half of the pictures blurred by a random share, and noisy."
    share = torch.rand(len(x), 1, 1, 1, generator=generator).to(x) * 2 - 1
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    noise = 0.05 * torch.randn(x.shape, generator=generator).to(x)
    return torch.where(share > 0, torch.lerp(x, soft, share.clamp(min=0)) + share * noise, x)


def train(model, images, factors, epochs, stop, device="cpu", batch=64, lr=3e-3):
    "AdamW, one cycle of the learning rate, of which `stop` epochs are done; a mirrored scene is a scene."
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.15)
    generator, start = torch.Generator().manual_seed(0), time.perf_counter()
    for epoch in range(stop):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            if len(rows) < batch: continue
            x, f = to_float(images[rows]), factors[rows]
            flipped, mirrored = fr.mirrored(x, f)
            flip = torch.rand(len(x), generator=generator) < 0.5
            x, f = torch.where(flip[:, None, None, None], flipped, x), torch.where(flip[:, None], mirrored, f)
            loss = fr.regressor_loss(model(roughened(x.to(device), generator)).cpu(), f)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1:3}  loss {total / (len(images) // batch):.4f}  {seconds:.0f} s", flush=True)
    return seconds


def quantiles(model, n=1000, seed=2):
    "What 99 % of the scenes of another world stay within: the error of the repainted scene, the probability of the shape."
    x = to_float(small(load("scenes", 128, n, seed=seed).images))
    read, confidence = fr.read_factors(x, model)
    return fr.scene_error(x, read).quantile(0.99).item(), confidence.quantile(0.01).item()


def measured(model, n=400, seed=1):
    "Errors and the share of valid scenes in a third world, at 128 pixels averaged down, and rendered at 64."
    truth, found = scene_factors(range(n), seed=seed), {}
    for size in (128, 64):
        x = to_float(load("scenes", size, n, seed=seed).images)
        read = fr.read_factors(x, model)[0]
        found[f"{size} pixels"] = dict(errors=fr.factor_errors(read, truth),
                                       valid=fr.valid_scenes(x, model).float().mean().item())
    return found


def main(epochs, stop, device):
    torch.manual_seed(0)
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    images = small(load("scenes", 128).images)
    model = fr.FactorRegressor().to(device, memory_format=torch.channels_last)
    seconds = train(model.train(), images, scene_factors(range(len(images))), epochs, stop, device)
    finish(model, dict(epochs=stop, schedule=epochs), seconds, device)


def finish(model, training, seconds, device):
    "Thresholds, measurements, files."
    model = model.cpu().eval()
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    max_error, min_confidence = quantiles(model)
    model.facts = dict(max_error=max_error, min_confidence=min_confidence)
    found = measured(model)
    path = fr.WEIGHTS / "factor_regressor.safetensors"
    path.parent.mkdir(exist_ok=True)
    fr.save_factor_regressor(model, path, dict(model.facts, held_out=found))
    parameters = sum(p.numel() for p in model.parameters())
    record.save(record.header(device, parameters=parameters, **training, seconds=round(seconds), images=15_000,
                              bytes=path.stat().st_size, **model.facts, held_out=found), "factor_regressor", device)
    print(found, path.stat().st_size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--stop", type=int, default=6, help="epochs of this schedule that are done")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    main(arguments.epochs, min(arguments.stop, arguments.epochs), arguments.device)
