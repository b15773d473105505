r"""How many latent dimensions? One small VAE with 2 to 64 of them, one beta, three seeds each.

    python benchmarks/latent_size.py                    about 10 minutes of one core; begun again, it goes on where it was

Scenes of 32x32 pixels, the network, loss and training of beta_sweep.py at beta = 8; only the length of the vector latent changes.
Finished runs stay in the folder given by --work; latent_size_cpu.json has the parameters, rate, distortion, PSNR and KL of every
dimension, for held-out scenes.
"""
import argparse
import json
import time

from beta_sweep import NETWORK, measured, settings, train, training_arguments
from steps import Record, small_scenes

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="lengths of the latent")
    parser.add_argument("--beta", type=float, default=8.0)
    training_arguments(parser, "runs/latent_size")
    given = parser.parse_args()
    if given.rehearse:
        given.dims, given.seeds, given.steps, given.images, given.test, given.batch = [2, 4], 2, 4, 64, 64, 8
        given.work = given.out / "work_latent"

    record = Record("latent_size", given, **settings(given), network=NETWORK)
    images = small_scenes(given.images + given.test, NETWORK["size"], given.device)
    train_images, test_images = images[:given.images], images[given.images:]
    given.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(given.seeds):
        for D in given.dims:
            file = given.work / f"{D}_{seed}.json"
            if not file.is_file():
                start = time.perf_counter()
                model = train(train_images, given.beta, seed, given, NETWORK | dict(latent=D))
                row = dict(D=D, seed=seed, parameters=sum(p.numel() for p in model.parameters()),
                           **measured(model, test_images), seconds=round(time.perf_counter() - start, 1))
                file.write_text(json.dumps(row))
                print({key: value for key, value in row.items() if key != "kl"}, flush=True)
            rows.append(json.loads(file.read_text()))
    record.save(models=rows)


if __name__ == "__main__":
    main()
