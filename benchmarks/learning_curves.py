"""Is the fast network as good? `default` and `reference` trained on the same images, in the same order, to the same number.

    python benchmarks/learning_curves.py --device cuda --epochs 20                 scenes at 128x128, LPIPS with the AlexNet trunk
    python benchmarks/learning_curves.py --images 600 --size 64 --epochs 4 --lpips none       small enough for a CPU

Held-out L1, LPIPS and KL after every epoch, the images seen and the seconds passed, for both presets, go to
benchmarks/results/learning_curves_DEVICE.json.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from throughput import machine

from vae_nb.config import Config

RESULTS = Path(__file__).parent / "results"


def run(preset, given, options):
    "Train one preset with the command that everybody uses; the summary of the run and its held-out rows."
    folder = Path(tempfile.mkdtemp()) / preset
    command = [Path(sys.executable).with_name("vae-train"), "scenes", "--preset", preset, "--out", folder, "--wandb", "disabled",
               *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value)))]
    subprocess.run([str(word) for word in command], check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [dict(images=row["step"] * given.batch_size, **{name: row[name] for name in row if name.endswith("_val")})
             for row in rows if "l1_val" in row]
    return dict(curve=curve, summary=json.loads((folder / "summary.json").read_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["demo", "default", "reference"], nargs="+", default=["default", "reference"])
    parser.add_argument("--images", type=int, default=15000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=Config.lr)
    parser.add_argument("--lpips", default="alex")
    parser.add_argument("--trunk", default="auto")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()

    options = {name: value for name, value in vars(given).items() if name != "preset"}
    record = dict(machine=machine(given.device), date=date.today().isoformat(), **options, presets={})
    for preset in given.preset:
        record["presets"][preset] = run(preset, given, options)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"learning_curves_{given.device}.json").write_text(json.dumps(record, indent=1) + "\n")
    for preset, found in record["presets"].items():
        last = found["curve"][-1]
        print(f"{preset:10}", {name: round(value, 4) for name, value in last.items()}, f"{found['summary']['seconds']:.0f} s")


if __name__ == "__main__":
    main()
