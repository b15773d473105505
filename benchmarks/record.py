"What all benchmarks write down: the kind of machine, the date, the versions, and where the figures go."
import json
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device):
    "The kind of machine, in words."
    if device == "cuda": return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    maker = next((maker for maker in ("AMD EPYC", "Intel Xeon") if maker.split()[1] in name), name)
    threads = torch.get_num_threads()
    return f"{maker}, {threads} thread{'s' * (threads > 1)}"


def header(device, /, **settings):
    "The beginning of every record."
    def installed(name):
        try: return version(name)
        except PackageNotFoundError: return None
    versions = {name: installed(name) for name in ("torch", "torchvision", "lpips", "pythae")}
    return dict(machine=machine(device), date=date.today().isoformat(), versions=versions, **settings)


def save(record, name, device, folder=RESULTS):
    "To benchmarks/results/NAME_DEVICE.json, or to another folder."
    Path(folder).mkdir(exist_ok=True, parents=True)
    (Path(folder) / f"{name}_{device}.json").write_text(json.dumps(record, indent=1) + "\n")


def save_enlarged(images, columns, path):
    "Small images side by side, each of their pixels twice as large, as a JPEG."
    from PIL import Image

    from vae_nb.plots import grid
    picture = grid(images, columns=columns, pad=1)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path, quality=85)
