"What the training experiments share: a clock that ends in time, a step that a GPU replays as one graph, files written whole."
import json
import os
import platform
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
from record import header
from torch.nn import functional as F

from vae_nb.data.dataset import load
from vae_nb.data.scenes import scenes

class Clock:
    "A budget of wall-clock time, which starts now."
    def __init__(self, minutes):
        self.start, self.seconds = time.perf_counter(), 60 * minutes

    @property
    def elapsed(self): return time.perf_counter() - self.start

    @property
    def left(self): return self.seconds - self.elapsed


class Record:
    "A JSON file that is rewritten, whole, whenever a part is done."
    def __init__(self, name, given, **settings):
        self.card = "cpu" if given.device == "cpu" else torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]
        self.path = Path(given.out) / f"{name}_{self.card}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        script, *words = (Path(word).name for word in sys.argv)   # names only: no folders of this machine
        command = shlex.join(["python", f"benchmarks/{script}", *words])
        self.clock, self.data = Clock(given.minutes), header(
            given.device, python=platform.python_version(), command=command, rehearsal=given.rehearse, **settings)

    def save(self, **parts):
        self.data.update(parts, wall_seconds=round(self.clock.elapsed, 1))
        write(self.path, (json.dumps(self.data, indent=1) + "\n").encode())


def write(path, data):
    "A file that is either whole or not there."
    draft = Path(path).with_name(f".{Path(path).name}.part")
    draft.write_bytes(data)
    os.replace(draft, path)


def arguments(parser, out="benchmarks/results", minutes=10.0):
    "The options of every training experiment."
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--minutes", type=float, default=minutes, help="wall-clock budget; what is done by then is kept")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes: every line runs, no figure means anything")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the results")
    return parser


def fast(device):
    "On a GPU: TF32 for matrix products (convolutions have it anyway), and the fastest convolutions that cuDNN finds."
    if device != "cuda": return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def captured(
    step,      # a function without arguments that reads and writes tensors which stay where they are
    device,
    warm=3,    # times it runs beforehand, on a GPU
):             # a function that does the same: on a GPU, a replay of its kernels as one CUDA graph
    "Launch a whole training step at once; or, where a kernel cannot be captured, one by one, and say so."
    if device != "cuda": return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm): step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph): step()
    except RuntimeError as error:
        print(f"not captured: {error}", file=sys.stderr, flush=True)
        torch.cuda.synchronize()
        return step
    return graph.replay


class Shuffled:
    "Rows 0..M-1 in random order, `batch` at a time and without end; all of it stays on the device, so that a graph can hold it."
    def __init__(self, M, batch, device):
        self.M, self.batch, self.per_epoch, self.taken = M, batch, M // batch, 0
        self.order = torch.randperm(M, device=device)
        self.place = torch.zeros((), dtype=torch.long, device=device)
        self.offsets = torch.arange(batch, device=device)

    def rows(self):   # (batch,) indices; part of the captured step
        found = self.order[self.place + self.offsets]
        self.place.add_(self.batch)
        return found

    def advance(self):
        "Call before every step: a new order when the old one is used up."
        if self.taken % self.per_epoch == 0:
            self.order.copy_(torch.randperm(self.M, device=self.order.device))
            self.place.zero_()
        self.taken += 1


def restart(model, optimizer, weights):
    "Begin anew in the same memory, which a captured step knows: these weights, and an optimiser without a past."
    model.load_state_dict(weights)
    for state in optimizer.state.values():
        for value in state.values(): value.zero_()


def small_scenes(n, size, device):   # (n,3,size,size) uint8 on the device
    "The first n scenes: rendered as they are; on a GPU, the 15,000 of 128 pixels that all runs share, averaged over squares."
    if device == "cpu": return scenes(n, size)[0]
    images = load("scenes", 128, n if n <= 1000 else None).images[:n]
    shrink = partial(F.avg_pool2d, kernel_size=128 // size)
    return torch.cat([shrink(part.to(device).float()).round().byte() for part in images.split(500)])


def wait(device):
    if device == "cuda": torch.cuda.synchronize()
