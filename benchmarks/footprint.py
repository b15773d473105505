"""How soon a run starts, and how much memory it takes: `vae-train` watched from outside.

    python benchmarks/footprint.py

Start-up: seconds from the command to the first line of the progress bar (one step is done by then), with the images cached.
Memory: the most that the process owns (its anonymous memory; the cache of images is a mapped file, which the system keeps in
RAM as long as there is room for it) with a small and a large set. Needs /proc, that is, Linux. Figures go to
benchmarks/results/footprint_cpu.json. Run it on a quiet machine.
"""
import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from record import header, save

from vae_nb.data.dataset import load

def started(folder, given, images):
    "A run, and the seconds until its first progress line."
    program, start = Path(sys.executable).with_name("vae-train"), time.perf_counter()
    words = [program, "scenes", "--size", given.size, "--images", images, "--preset", given.preset, "--batch-size", given.batch,
             "--lpips", given.lpips, "--backbone", "random", "--picture-every", 3, "--checkpoint-every", 3, "--wandb", "disabled",
             "--device", "cpu", "--out", Path(folder) / "run"]
    run = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = b""
    while b"loss=" not in said:
        part = run.stderr.read1(4096)
        if not part: raise RuntimeError(said.decode(errors="replace"))
        said += part
    return run, time.perf_counter() - start


def start_up(given, images):
    "Seconds to the first progress line."
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = started(folder, given, images)
        run.kill()
        run.communicate()
    return seconds


def memory(given, images):
    "The most anonymous memory (MB) of a run that trains, keeps checkpoints and draws pictures for some seconds."
    with tempfile.TemporaryDirectory() as folder:
        run, _ = started(folder, given, images)
        threading.Thread(target=run.stderr.read, daemon=True).start()   # nobody reads on: the pipe must not fill
        peak, end = 0, time.perf_counter() + given.seconds
        while run.poll() is None and time.perf_counter() < end:
            status = Path(f"/proc/{run.pid}/status").read_text()
            peak = max([peak, *(int(kb) for kb in re.findall(r"RssAnon:\s+(\d+) kB", status))])
            time.sleep(0.02)
        if run.poll() is not None: raise RuntimeError(f"the run ended (status {run.returncode}) while it was watched")
        run.kill()
        run.wait()
    return round(peak / 1000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["demo", "default", "reference"], default="default")
    parser.add_argument("--images", type=int, nargs=2, default=[2000, 15000], help="a small and a large set")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lpips", choices=["alex", "vgg", "squeeze", "none"], default="alex")
    parser.add_argument("--rounds", type=int, default=5, help="starts")
    parser.add_argument("--seconds", type=float, default=60, help="of training whose memory is watched")
    given = parser.parse_args()

    for images in given.images: load("scenes", given.size, images)   # render and cache them, if that was not done yet
    starts = [start_up(given, max(given.images)) for _ in range(given.rounds)]
    peaks = {images: memory(given, images) for images in given.images}
    record = header("cpu", **vars(given), start_up_seconds=[round(seconds, 2) for seconds in starts], peak_memory_mb=peaks)
    save(record, "footprint", "cpu")
    print(f"first progress line after {median(starts):.1f} s (median of {given.rounds}; {min(starts):.1f} to {max(starts):.1f})")
    for images, peak in peaks.items(): print(f"{images:6,} images: {peak:,} MB")


if __name__ == "__main__":
    main()
