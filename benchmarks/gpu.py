"""Everything this project wants to know of a GPU, in one command of at most ten minutes.

    make gpu-pack                                    here, with a package index: fetch what the GPU machine may lack into .gpu/
    make gpu                                         there: all parts, in order of worth
    python benchmarks/gpu.py --part card matrix      some of them
    python benchmarks/gpu.py --rehearse              every line on a CPU, with tiny sizes

Each part writes its figures when it ends, so that a command that is cut off brings back what it did:

    card       the machine, a bf16 matrix product and a copy as its ceilings; 15,000 scenes rendered on the device
    matrix     images/s of a step: ordinary, compiled, recorded as a CUDA graph, both; channels_last and contiguous;
               beside them the plain loops and pythae, and whether the fast ones follow the loss curve of the ordinary one
    runs       the reference run (killed once, and resumed), the other models, and experiments
    lpips      LPIPS against the lpips package
    tests      the GPU tests
"""
import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from record import header  # noqa: E402
from throughput import ceiling, one_step, plain, step_flops, with_pythae  # noqa: E402

from vae_nb.data.dataset import batches  # noqa: E402
from vae_nb.data.downloads import find  # noqa: E402
from vae_nb.data.scenes import render, scene_factors  # noqa: E402
from vae_nb.loss.lpips import LPIPS  # noqa: E402
from vae_nb.loss.objective import Objective  # noqa: E402
from vae_nb.train.config import Config  # noqa: E402
from vae_nb.train.device import backend_flags  # noqa: E402
from vae_nb.train.loop import CUDAGraphStep, make_forward, new_state, step  # noqa: E402

FILES = ROOT / ".gpu" / "files"
BACKBONE = FILES / "squeezenet1_1_features.pth"
EMOJI = FILES / "fluent-emoji-3d.zip"
TESTS = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]


# ---- small helpers

def write(given, name, record):
    "Figures of a part, as soon as there are some."
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{name}_{given.tag}.json").write_text(json.dumps(record, indent=1) + "\n")


def left(given): return given.end - time.monotonic()


def lpips_of(given): return LPIPS("squeeze", str(BACKBONE) if BACKBONE.is_file() else "random")


def wait(given):
    if given.device == "cuda": torch.cuda.synchronize()


# ---- the card

def card(given):
    record = header(given.device, torch_cuda=torch.version.cuda)
    if given.device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        record |= dict(multiprocessors=facts.multi_processor_count, memory_gib=round(facts.total_memory / 2**30, 1))
    roof = {name: ceiling(given.device, dtype, 1.0) for name, dtype in dict(bf16=torch.bfloat16, fp32=torch.float32).items()}
    record["matmul_tflops"] = {name: round(rate / 1e12, 2) for name, rate in roof.items()}
    a = torch.empty(2**31 if given.device == "cuda" else 2**26, dtype=torch.uint8, device=given.device)
    b = torch.empty_like(a)
    seconds = []
    for _ in range(10):
        wait(given)
        start = time.perf_counter()
        b.copy_(a)
        wait(given)
        seconds.append(time.perf_counter() - start)
    record["copy_tb_per_s"] = round(2 * a.numel() / median(seconds) / 1e12, 3)
    del a, b
    n = 64 if given.rehearse else 15_000
    factors = scene_factors(range(n))
    render(factors[:n // 4], given.size, device=given.device)      # warm up
    wait(given)
    start = time.perf_counter()
    render(factors, given.size, device=given.device)
    record["scenes"] = dict(n=n, size=given.size, seconds=round(time.perf_counter() - start, 3),
                            per_second=round(n / (time.perf_counter() - start)))
    write(given, "card", record)
    print("card", json.dumps(record), flush=True)


# ---- the step matrix

class MeanVarNorm(nn.GroupNorm):
    "GroupNorm from a mean and a variance: a candidate that a compiler can fuse, whatever the order in memory."
    def forward(self, x):
        B, C, H, W = x.shape
        groups = x.float().view(B, self.num_groups, C // self.num_groups, H, W)
        var, mean = torch.var_mean(groups, dim=(2, 3, 4), keepdim=True, correction=0)
        normed = ((groups - mean) * torch.rsqrt(var + self.eps)).view(B, C, H, W)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def contestant(given, preset, batch, compiled=False, recorded=False, layout="channels_last", norm="group", lpips=True):
    "A state and the function that does one step of it."
    config = Config(preset=preset, size=given.size, batch_size=batch, device=given.device, lr=1e-3, warmup=100,
                    compile="off", cuda_graph="off")
    state = new_state(config)
    if norm == "meanvar":
        for module in (*state.model.modules(), *state.ema.modules()):
            if type(module) is nn.GroupNorm: module.__class__ = MeanVarNorm
    if layout == "contiguous":
        for model in (state.model, state.ema): model.to(memory_format=torch.contiguous_format)
    objective = Objective(0.02, lpips_of(given) if lpips else None).to(state.device)
    forward = inner = make_forward(state, objective)
    if layout == "contiguous": forward = lambda x, eps, weight: inner(x.contiguous(), eps, weight)
    if compiled: forward = torch.compile(forward, backend="aot_eager" if given.rehearse else "inductor")
    compute = partial(step, state, forward)
    if recorded and given.device == "cuda": compute = CUDAGraphStep(compute)
    return state, lambda x: one_step(state, compute, x, 100_000)


def timed_steps(given, advance, source, n):
    wait(given)
    start = time.perf_counter()
    for _ in range(n): advance(next(source))
    wait(given)
    return (time.perf_counter() - start) / n


def endless(given, images, batch):
    epoch = 0
    while True:
        yield from batches(images, torch.arange(len(images)), batch, epoch, device=given.device, drop_last=True)
        epoch += 1


ORDINARY, RECORDED, COMPILED = {}, dict(recorded=True), dict(compiled=True, recorded=True)
OTHERS = [dict(compiled=True), COMPILED | dict(layout="contiguous"), COMPILED | dict(norm="meanvar")]


def cases(given):
    "(preset, batch, variant) of the matrix, in order of worth."
    small, large = (2, 4) if given.rehearse else (32, 256)
    if given.rehearse: return [("default", small, ORDINARY), ("web", small, COMPILED)]
    chosen = [("default", small, v) for v in (ORDINARY, RECORDED, COMPILED)]
    chosen += [("default", large, v) for v in (RECORDED, COMPILED)]
    chosen += [("reference", small, v) for v in (ORDINARY, COMPILED)] + [("reference", large, COMPILED)]
    chosen += [("web", large, v) for v in (RECORDED, COMPILED)]
    return chosen + [("default", small, v) for v in OTHERS]


def named(variant):
    words = [("compiled" if variant.get("compiled") else ""), ("recorded" if variant.get("recorded") else ""),
             variant.get("layout", ""), variant.get("norm", "")]
    return " ".join(word for word in words if word) or "ordinary"


def warm_caches(given):
    "Compile every compiled case once, side by side, so that the timed process finds it in the compiler's cache."
    jobs = [case for case in cases(given) if case[2].get("compiled")]
    command = [sys.executable, __file__, "--device", given.device, "--size", str(given.size),
               "--out", str(given.out), *["--rehearse"] * given.rehearse, "--warm"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    given.compilers = [subprocess.Popen([*command, json.dumps(case)], **quiet) for case in jobs]


def ready(given):
    "Wait for the compilers, but not for ever."
    for compiler in given.compilers:
        try: compiler.wait(timeout=max(1, min(150, left(given) - 60)))
        except subprocess.TimeoutExpired: compiler.kill()


def warm(given):
    preset, batch, variant = json.loads(given.warm)
    images = torch.randint(0, 256, (batch, 3, given.size, given.size), dtype=torch.uint8, device=given.device)
    _, advance = contestant(given, preset, batch, **{**variant, "recorded": False})
    for _ in range(2): advance(next(endless(given, images, batch)))


def tried(given, measure, **labels):
    "A row of the matrix: what was measured, or why it could not be."
    torch._dynamo.reset()
    if given.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try: row = labels | measure()
    except Exception as error: row = labels | dict(error=f"{type(error).__name__}: {str(error)[:300]}")
    print("matrix", json.dumps(row), flush=True)
    return row


def matrix(given):
    file = given.out / f"card_{given.tag}.json"
    record = json.loads(file.read_text()) if file.is_file() else header(given.device)
    record |= dict(rows=[], rivals=[], curves={})
    n = 8 if given.rehearse else 1024
    images = render(scene_factors(range(n)), given.size, device=given.device).to(given.device)
    with backend_flags(torch.device(given.device)):
        for name in ("plain fp32", "plain bf16", "pythae", "ours without LPIPS"):
            record["rivals"].append(tried(given, partial(rival, given, name, images), name=name))
        ready(given)
        for preset, batch, variant in cases(given):
            if left(given) < 20: break
            row = tried(given, partial(measured, given, preset, batch, variant, images),
                        preset=preset, batch=batch, variant=named(variant))
            record["rows"].append(row)
            write(given, "step_matrix", record)
        for variant in (ORDINARY, RECORDED, COMPILED):
            if left(given) < 15: break
            torch._dynamo.reset()
            record["curves"][named(variant)] = curve(given, variant, images)
            write(given, "step_matrix", record)
    print("curves", {name: [round(v, 4) for v in curve[::40]] for name, curve in record["curves"].items()})


def measured(given, preset, batch, variant, images):
    "Speed and memory of a variant of our step."
    _, advance = contestant(given, preset, batch, **variant)
    source = endless(given, images, batch)
    timed_steps(given, advance, source, 1 if given.rehearse else 8)
    first = timed_steps(given, advance, source, 1)
    steps = 1 if given.rehearse else max(4, min(60, int(0.7 / first)))
    seconds = median(timed_steps(given, advance, source, steps) for _ in range(1 if given.rehearse else 3))
    flops = step_flops(preset, argparse.Namespace(size=given.size), "squeeze")
    memory = torch.cuda.max_memory_allocated() / 2**30 if given.device == "cuda" else None
    return dict(images_per_second=round(batch / seconds, 1), milliseconds=round(1e3 * seconds, 2),
                peak_memory_gib=memory and round(memory, 2), tflops=round(batch / seconds * flops / 1e12, 2),
                gflop_per_image=round(flops / 1e9, 2))


def rival(given, name, images):
    "The plain loops and pythae's trainer, on the same network and batch."
    batch, few = (2, 1) if given.rehearse else (32, 12)
    if name == "ours without LPIPS":
        _, advance = contestant(given, "default", batch, **RECORDED, lpips=False)
        source = endless(given, images, batch)
        timed_steps(given, advance, source, few)
        return dict(batch=batch, images_per_second=round(batch / timed_steps(given, advance, source, 2 * few), 1))
    settings = argparse.Namespace(size=given.size, batch=batch, device=given.device, lr=1e-3, backbone="random")
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(images.cpu()[:512]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{i:05d}.png")
        if name == "pythae": steps, _ = with_pythae("default", images.cpu(), folder, settings)
        else: steps, _ = plain("default", images, folder, settings, "squeeze", name.split()[1])
        steps(few)
        wait(given)
        start = time.perf_counter()
        steps(2 * few)
        wait(given)
        return dict(batch=batch, images_per_second=round(2 * few * batch / (time.perf_counter() - start), 1))


def curve(given, variant, images):
    "The losses of the first 200 steps."
    batch = 2 if given.rehearse else 32
    _, advance = contestant(given, "default", batch, **variant)
    source = endless(given, images, batch)
    return [float(advance(next(source))["loss"]) for _ in range(2 if given.rehearse else 200)]


# ---- LPIPS, tests

def lpips(given):
    command = [sys.executable, "benchmarks/perceptual.py", "--device", given.device, "--net", "squeeze", "--out", given.out]
    if given.rehearse: command += ["--batch", "2", "--size", "64", "--rounds", "1"]
    finish(given, "lpips", start(given, "lpips", command))


def tests(given):
    finish(given, "tests", start(given, "tests", TESTS))


def finish(given, name, process):
    "Wait for a job within the time that is left, and show the end of what it said."
    try: process.wait(timeout=max(10, left(given)))
    except subprocess.TimeoutExpired: process.kill()
    print(f"{name}: exit {process.poll()}\n" + (given.runs / f"{name}.log").read_text()[-2000:], flush=True)


# ---- runs

def train_command(given, name, source, *words):
    backbone = str(BACKBONE) if BACKBONE.is_file() else "random"
    common = ["--size", "128", "--lpips", "squeeze", "--backbone", backbone, "--wandb", "disabled", "--device", given.device,
              "--picture-every", "0", "--checkpoint-every", "100000"]
    if given.rehearse: common += ["--size", "32", "--images", "60", "--batch-size", "8", "--preset", "demo", "--latent", "16"]
    return [sys.executable, "-m", "vae_nb", source, *words, *common, "--out", str(given.runs / name)]


def progress_of(run):
    "Steps that are logged."
    try: return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError): return 0


def start(given, name, command):
    given.runs.mkdir(parents=True, exist_ok=True)
    log = open(given.runs / f"{name}.log", "a")
    print("run   ", name, shlex.join(map(str, command))[-260:], flush=True)
    around = {key: value for key, value in os.environ.items() if name != "tests" or not key.startswith("CUDA_MPS")}
    return subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, cwd=ROOT, start_new_session=True, env=around)


def share_the_card(given):
    "Let several processes compute on the card at once (NVIDIA's MPS), if its daemon is there and works. Changes no setting."
    if given.device != "cuda": return False
    folders = {f"CUDA_MPS_{kind}_DIRECTORY": tempfile.mkdtemp(prefix="mps") for kind in ("PIPE", "LOG")}
    os.environ.update(folders)
    probe = [sys.executable, "-c", "import torch; print(torch.ones(9, device='cuda').sum().item())"]
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, capture_output=True, timeout=10)
        subprocess.run(probe, check=True, capture_output=True, timeout=25)
        return True
    except (OSError, subprocess.SubprocessError) as error:
        print(f"run    no MPS: {error}", flush=True)
        end_sharing()
        for name in folders: os.environ.pop(name)
        return False


def end_sharing():
    try: subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError): pass


def experiment(given, script, minutes, *words):
    extra = ["--rehearse"] if given.rehearse else []
    return [sys.executable, f"benchmarks/{script}.py", "--device", given.device, "--minutes", f"{minutes:.2f}",
            "--out", given.runs / f"results_{script}", *words, *extra]


def fitted_epochs(given):
    "As many epochs as the time allows at the rate that the reference run had before it was stopped."
    rows = [json.loads(line) for line in (given.runs / "default" / "metrics.jsonl").read_text().splitlines()]
    rate = median([row["images_per_second"] for row in rows if "images_per_second" in row][-10:])
    images = json.loads((given.runs / "default" / "config.json").read_text())["train"]
    done = rows[-1]["step"] * given.batch / images
    fits = int(done + (left(given) - 75) * rate / images)
    print(f"run    default stopped after step {rows[-1]['step']}; {rate:.0f} images/s, room for {fits} epochs", flush=True)
    return max(math.ceil(done) + 1, min(given.epochs, fits))


def plan(given):
    "Commands of the reference run, the web model, and what follows it."
    epochs = lambda n: ["--epochs", "2" if given.rehearse else str(n)]
    schedule = ["--val-every", "5", "--picture-epochs", "1,4,12,32,100"]
    web = ["--preset", "web", "--latent", "4x8x8", "--lr", "2e-3", "--batch-size", "128", *schedule]
    trained = partial(train_command, given)
    batch = ["--batch-size", str(given.batch), *schedule]
    default = trained("default", "scenes", "--preset", "default", "--lr", "1.4e-3", *epochs(60), *batch)
    queue = [("web", trained("web", "scenes", *web, *epochs(100))),
             ("emoji", trained("emoji", str(EMOJI), *web, "--batch-size", "64", *epochs(150))),
             ("reference", trained("reference", "scenes", "--preset", "reference", "--lr", "3e-4", *epochs(8), *batch))]
    return default, queue


def runs(given):
    """The reference run, killed once and resumed; beside it the other models and experiments, as far as the time goes.

    When the reference run is resumed, its rate is known, and it goes on for as many epochs as the time allows."""
    shared, jobs, tiny = share_the_card(given), {}, given.rehearse
    prepare = "from vae_nb.data.dataset import load; load('scenes', size=128)"    # rendered once, for all runs
    if not tiny: start(given, "prepare", [sys.executable, "-c", prepare]).wait()
    print(f"run    MPS: {shared}; scenes are ready, {left(given):.0f} s left", flush=True)
    given.batch = 8 if tiny else 64
    default, queue = plan(given)
    first, resumed, after = start(given, "default", default), None, 4 if tiny else 900
    minutes = 0.2 if tiny else max(1.0, (left(given) - 60) / 60)
    data = ["--data", FILES / "mnist.npz", "--frey", FILES / "freyfaces.npz"]
    for name in ["VAE k=1"] if tiny else ["VAE k=1", "IWAE k=5", "IWAE k=50"]:
        begin(given, jobs, f"literature {name}", experiment(given, "literature", minutes, "--only", name, *data))
    begin(given, jobs, "beta_sweep", experiment(given, "beta_sweep", min(minutes, 2.5)))
    begin(given, jobs, *queue.pop(0))
    while left(given) > (10 if tiny else 32):
        time.sleep(0.25)
        if resumed is None and (progress_of(given.runs / "default") >= after or first.poll() is not None):
            first.send_signal(signal.SIGTERM)
            first.wait(timeout=60)
            write(given, "reference_run", header(given.device) | dict(stopped_at=progress_of(given.runs / "default")))
            more = ["--resume", "--epochs", str(fitted_epochs(given))]
            resumed = begin(given, jobs, "default", default + more)
        if queue and all(jobs[name].poll() is not None for name in ("web", "emoji") if name in jobs):
            begin(given, jobs, *queue.pop(0))
        if resumed and resumed.poll() is not None and "ablations" not in jobs and left(given) > 60:
            pack(given)
            words = ["--backbone", BACKBONE, "--steps", "500", "--arm", "default", "no_refinement", "constant_beta"]
            begin(given, jobs, "ablations", experiment(given, "ablations", (left(given) - 40) / 60, *words))
        if not queue and resumed and all(job.poll() is not None for job in jobs.values()): break
    conclude(given, jobs)
    if shared: end_sharing()


def begin(given, jobs, name, command):
    jobs[name] = start(given, name.replace(" ", "_").replace("=", ""), command)
    return jobs[name]


def conclude(given, jobs):
    "End what still runs; pack what is there."
    for job in jobs.values():
        if job.poll() is None: job.send_signal(signal.SIGTERM)
    for name, job in jobs.items():
        try: job.wait(timeout=12)
        except subprocess.TimeoutExpired: job.kill()
        print(f"run    {name}: exit {job.poll()}, step {progress_of(given.runs / name)}", flush=True)
    pack(given)


def pack(given):
    "Runs as one archive in parts of 15 MiB: no optimiser, weights in fp16."
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    archive = given.out / "runs.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(given.runs.rglob("*")):
            inside = path.relative_to(given.runs).parts[0]
            if not path.is_file() or inside in ("cache", "prepare"): continue
            if path.name in ("checkpoint.safetensors", "best.safetensors", "model.fp16.safetensors"): continue
            if path.suffix == ".safetensors" and path.name == "model.safetensors":
                with safe_open(path, "pt") as file: facts = file.metadata()
                half = path.with_name("model.fp16.safetensors")
                save_file({k: v.half() for k, v in load_file(path).items()}, half, facts)
                path = half
            tar.add(path, arcname=path.relative_to(given.runs))
    for old in given.out.glob("runs.tar.*"): old.unlink()
    data, size = archive.read_bytes(), 15 * 2**20
    for i in range(math.ceil(len(data) / size)): (given.out / f"runs.tar.{i:02d}").write_bytes(data[i * size:(i + 1) * size])
    archive.unlink()


def lay_out():
    "Copy what the runs read into .gpu/files: the backbone of LPIPS, and image sets as far as they can be had here."
    FILES.mkdir(parents=True, exist_ok=True)
    for name, target in {"squeezenet1_1": BACKBONE, "mnist": FILES / "mnist.npz", "freyfaces": FILES / "freyfaces.npz",
                         "fluent": EMOJI}.items():
        try: shutil.copyfile(find(name), target)
        except (OSError, ValueError) as error: print(f"{name}: {error}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["card", "matrix", "runs", "lpips", "tests"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=570, help="end in so many seconds")
    parser.add_argument("--epochs", type=int, default=100, help="of the reference run, at most")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / ".gpu" / "out"))
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    parser.add_argument("--runs", type=Path, default=Path(memory) / "vae_nb_runs", help="folder of the runs")
    parser.add_argument("--rehearse", action="store_true", help="every line on a CPU, with tiny sizes")
    parser.add_argument("--pack", action="store_true", help="lay the files out that the GPU machine needs, and end")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.pack: return lay_out()
    if given.rehearse: given.device, given.size = "cpu", 32
    given.end, given.compilers, given.tag = time.monotonic() + given.seconds, [], "cpu_rehearsal"
    if given.device == "cuda": given.tag = re.sub("[^a-z0-9]", "", torch.cuda.get_device_name().split()[1].lower())
    warnings.filterwarnings("ignore")
    for folder in (given.out, given.runs): folder.mkdir(parents=True, exist_ok=True)
    if given.warm: return warm(given)
    os.environ.setdefault("VAE_NB_CACHE", str(given.runs / "cache"))
    if "matrix" in given.part: warm_caches(given)
    for part in given.part:
        began = time.monotonic()
        try: globals()[part](given)
        except Exception as error: print(f"{part}: {type(error).__name__}: {error}", flush=True)
        print(f"---- {part}: {time.monotonic() - began:.0f} s, {left(given):.0f} s left", flush=True)


if __name__ == "__main__":
    main()
