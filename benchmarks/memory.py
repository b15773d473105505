"""How much memory does training need? The peak of two steps, for several presets, precisions and sizes of batch.

    OMP_NUM_THREADS=1 python benchmarks/memory.py                 a minute
    python benchmarks/memory.py --device cuda

Each case begins from nothing: a fresh model, its average and AdamW, then two ordinary steps of the library's loop with L1 + LPIPS
(SqueezeNet) + beta*KL. The peak is that of PyTorch's allocator, of all tensors together: on a processor, every allocation and
release that the profiler saw, added up; on a GPU what the allocator says. It goes to benchmarks/results/memory_DEVICE.json.
"""
import argparse
import os
from functools import partial
from itertools import accumulate, product

os.environ.setdefault("KINETO_LOG_LEVEL", "5")   # the profiler is quiet
import torch
from record import header, save
from torch.profiler import ProfilerActivity, profile

from vae_nb.loss.lpips import LPIPS
from vae_nb.loss.objective import Objective
from vae_nb.train.config import Config
from vae_nb.train.loop import make_forward, new_state, noise, step

def train(preset, precision, batch, size, device):
    "Two steps from nothing."
    state = new_state(Config(preset=preset, precision=precision, size=size, device=device))
    forward = make_forward(state, Objective(0.02, LPIPS("squeeze", "random")).to(device))
    x = torch.zeros(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    for i in range(2): step(state, forward, x, noise(0, i, (batch, *state.model.latent_shape), state.device))


def peak_bytes(device, run):
    "The most that was allocated at a time while `run()` ran."
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched: run()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--presets", nargs="+", default=["default", "reference"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    given, rows = parser.parse_args(), []
    for preset, precision, batch in product(given.presets, ("fp32", "bf16"), given.batches):
        peak = peak_bytes(given.device, partial(train, preset, precision, batch, given.size, given.device))
        rows.append(dict(preset=preset, precision=precision, batch=batch, peak_mib=round(peak / 2**20, 1)))
        print(rows[-1], flush=True)
    save(header(given.device, size=given.size, rows=rows), "memory", given.device)


if __name__ == "__main__":
    main()
