"""What the size of the groups costs: one training step of `reference` with groups of 4 channels and of 16, in turn.

    OMP_NUM_THREADS=1 python benchmarks/group_norm.py

Forward, backward and AdamW under bf16 autocast, channels last, L1 + 0.02 KL. Each round takes the processor time of one step of
both, and their ratio; what is kept is the median over the rounds, after one of warm-up, and the share of GroupNorm's backward
pass in one more step. The result goes to benchmarks/results/group_norm_cpu.json.
"""
import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from record import header, save

from vae_nb.model.vae import PRESETS, VAE

def stepper(group_size, batch):
    "A function that trains one step."
    torch.manual_seed(0)
    model = VAE(replace(PRESETS["reference"], group_size=group_size)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x = (torch.rand(batch, 3, 128, 128) * 2 - 1).to(memory_format=torch.channels_last)

    def step():
        with torch.autocast("cpu", torch.bfloat16): x_hat, q = model(x)
        loss = (x_hat - x).abs().mean() + 0.02 * q.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def seconds(step):
    "Of processor time, so that other work on the machine counts for little."
    start = time.process_time()
    step()
    return time.process_time() - start


def share_of_backward(step):
    "GroupNorm's backward pass, as a share of the processor time of a step."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched: step()
    spent = {event.key: event.self_cpu_time_total for event in watched.key_averages()}
    return spent["aten::native_group_norm_backward"] / sum(spent.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    steps, rows = {size: stepper(size, given.batch) for size in (4, 16)}, []
    for _ in range(given.rounds + 1):
        rows.append({size: seconds(step) for size, step in steps.items()})
        print({size: round(s, 2) for size, s in rows[-1].items()}, flush=True)
    ratio = median(row[4] / row[16] for row in rows[1:])
    shares = {size: round(share_of_backward(step), 3) for size, step in steps.items()}
    save(header("cpu", **vars(given), ratio=round(ratio, 2), share_of_backward=shares), "group_norm", "cpu")


if __name__ == "__main__":
    main()
