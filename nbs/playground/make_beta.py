"""Write what the playground needs of a sweep of beta: python nbs/playground/make_beta.py runs/beta_sweep

The folder is the one that benchmarks/beta_sweep.py --work has filled. For the first seed of every beta: a decoder (beta_4.onnx,
weights in 16 bits); beta.json has the posteriors of eight held-out scenes under each model, and its rate, distortion and KL;
beta.webp those scenes, side by side.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from fastcore.script import call_parse
from make_model import packed
from PIL import Image

from vae_nb.data.dataset import to_float
from vae_nb.export import export_onnx
from vae_nb.model.vae import VAE

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from beta_sweep import NETWORK, small_scenes  # noqa: E402


@call_parse
def main(
    work: str,          # folder with the models of benchmarks/beta_sweep.py
    out: str = None,    # folder to write; None: model/beta/ beside this file
    start: int = 8000,  # first held-out scene of the sweep
    n: int = 8,         # scenes to show
):
    "Write the six decoders of the playground's slider of beta."
    out = Path(out) if out else Path(__file__).parent / "model" / "beta"
    out.mkdir(parents=True, exist_ok=True)
    scenes = small_scenes(start + n, NETWORK["size"], "cpu")[start:]
    pixels = scenes.permute(0, 2, 3, 1).numpy()  # (n,S,S,3)
    Image.fromarray(np.concatenate(list(pixels), 1)).save(out / "beta.webp", lossless=True, quality=100, method=6)
    models = []
    for file in sorted(Path(work).glob("*_0.pt"), key=lambda file: float(file.stem.split("_")[0])):
        kept = torch.load(file)
        model = VAE(**NETWORK)
        model.load_state_dict(kept["weights"])
        with torch.no_grad():
            q = model.eval().encode(to_float(scenes))
        decoder = export_onnx(model, out)["decoder"].rename(out / f"beta_{kept['row']['beta']:g}.onnx")
        (out / "encoder.onnx").unlink()
        row = {key: kept["row"][key] for key in ("beta", "rate", "distortion", "psnr", "kl")}
        models.append(row | dict(decoder=decoder.stem, bytes=decoder.stat().st_size, mu=packed(q.mu), std=packed(q.std)))
    facts = dict(size=NETWORK["size"], D=NETWORK["latent"], n=n, models=models)
    (out / "beta.json").write_text(json.dumps(facts), encoding="utf-8")
    for path in sorted(out.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
