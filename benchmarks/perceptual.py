"""LPIPS against the lpips package: forward and backward, side by side.

    OMP_NUM_THREADS=2 python benchmarks/perceptual.py                    every network, on the CPU
    python benchmarks/perceptual.py --device cuda --compile              the same on a GPU, and compiled
    python benchmarks/perceptual.py --net alex --rounds 9                one network, more rounds
    python benchmarks/perceptual.py --mode "backbone alone"              one mode (and the package), added to the others

Each round times every mode once, in turn, on the same images, and its ratios are taken within the round: whatever else
the machine does hits all modes alike. What is kept is the median over the rounds, after one round of warm-up. The result
goes to benchmarks/results/lpips_DEVICE.json, which the page loss/02_lpips shows. Run it on a quiet machine.

"backbone alone" is no LPIPS at all, only the two forward passes and the one backward pass of the network: what would
remain if all the rest were free.
"""
import argparse
import json
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import lpips
import torch
from record import RESULTS, header, save

from vae_nb.loss.lpips import LPIPS, NETS

def official(ours):
    "The lpips package with our backbone's weights, as its users get it: in evaluation mode, 32 bits."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = lpips.LPIPS(net=ours.net, pnet_rand=True, verbose=False)
    own = {name.split(".", 1)[1]: parameter for name, parameter in package.net.named_parameters()}
    for name, weight in ours.layers.named_buffers(): own[name].data.copy_(weight)
    return package


def modes(net, x, y, device, compiled):
    "Name -> function that runs forward and backward once."
    ours = LPIPS(net, "random")
    theirs, ours = official(ours).to(device), ours.to(device)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, y)]
    half = lambda: torch.autocast(device, torch.bfloat16)

    def run(module, x, y, precision=nullcontext):
        def once():
            leaf = x.detach().requires_grad_()
            with precision(): loss = module(leaf, y).mean()
            loss.backward()
        return once

    def backbone(x, y):
        ours.activations(y)
        return ours.activations(x)[-1]

    seen = ours.activations(last[1])
    with half(): seen16 = ours.activations(last[1])
    found = {"package fp32": run(theirs, x, y), "package fp32 channels_last": run(theirs, *last),
             "fp32": run(ours, x, y), "fp32 channels_last": run(ours, *last),
             "fp32 channels_last, target seen": run(ours, last[0], seen), "backbone alone": run(backbone, *last),
             "package bf16 channels_last": run(theirs, *last, half), "bf16 channels_last": run(ours, *last, half),
             "bf16 channels_last, target seen": run(ours, last[0], seen16, half)}
    if compiled:
        graph = torch.compile(ours, fullgraph=True)
        found |= {"fp32, compiled": run(graph, *last), "bf16 channels_last, compiled": run(graph, *last, half)}
    return found


def timed(once, device):
    "Seconds."
    if device == "cuda": torch.cuda.synchronize()
    start = time.perf_counter()
    once()
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(net, batch, size, rounds, device, compiled, only):
    "Medians over the rounds: milliseconds of each mode, and how many times as fast as the package it is."
    g = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, size, size, generator=g) * 2 - 1
    y = (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(-1, 1)
    runs = modes(net, x.to(device), y.to(device), device, compiled)
    runs = {name: once for name, once in runs.items() if not only or name == "package fp32" or name in only}
    rows = [{name: timed(once, device) for name, once in runs.items()} for _ in range(rounds + 1)][1:]
    return dict(ms={name: round(1000 * median(row[name] for row in rows), 1) for name in runs}, rounds=rounds,
                ratio={name: round(median(row["package fp32"] / row[name] for row in rows), 3) for name in runs})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETS), nargs="+", default=list(NETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mode", nargs="+", default=[], help="only these modes; what was measured of others is kept")
    parser.add_argument("--compile", action="store_true", help="also time the compiled module")
    parser.add_argument("--out", default=RESULTS, help="folder of the record")
    given = parser.parse_args()

    file = Path(given.out) / f"lpips_{given.device}.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    record |= header(given.device, batch=given.batch, size=given.size)
    record.setdefault("nets", {})
    for net in given.net:
        found = measure(net, given.batch, given.size, given.rounds, given.device, given.compile, given.mode)
        before = record["nets"].get(net, {}) if given.mode else {}
        found = {key: {**before.get(key, {}), **value} if isinstance(value, dict) else value for key, value in found.items()}
        record["nets"][net] = found
        save(record, "lpips", given.device, given.out)
        print(net)
        for name, ms in found["ms"].items():
            print(f"  {name:34} {ms:9.1f} ms   {found['ratio'][name]:>6} times as fast")


if __name__ == "__main__":
    main()
