"The results: pages say what the recorded files say, records have their receipts, the experiments are what they claim to be."
import json
import math
import os
import re
import subprocess
import sys

import house
import literature
import numpy as np
import pytest
import steps
import torch

RESULTS = house.ROOT / "benchmarks/results"
PAGES = sorted(p for p in (house.ROOT / "nbs/results").glob("*.ipynb")
               if re.search("real_images|literature|ablations|gallery", p.stem))
WITH_CODE = house.ROOT / "nbs/analysis/04_disentanglement.ipynb"   # reads a record, too
EXPERIMENTS = "literature", "frey", "ablations", "beta_sweep", "latent_size", "failures"   # begin names of files
RECORDS = sorted(file for file in RESULTS.glob("*.json") if file.stem.startswith((*EXPERIMENTS, "emoji")))
NO_PROSE = r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|\{#[^}]*\}|arXiv:[\d.]+"   # code, mathematics, links, labels
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def book(page): return json.loads(page.read_text(encoding="utf-8"))


def said(cell):
    "Text that a code cell has left: printed lines and tables, without pictures and names of objects."
    text = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream" and output.get("name") != "stderr": text.append("".join(output["text"]))
        text.append("".join(output.get("data", {}).get("text/markdown", "")))
    return "".join(text).strip()


def leaves(value):
    "All numbers in a record."
    if isinstance(value, dict): value = list(value.values())
    if isinstance(value, list): return [leaf for part in value for leaf in leaves(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


# ---- pages


def test_the_first_page_says_what_the_records_say():
    ready, burda, gpu = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
                         for name in ("ready_model", "literature_iwae_k5_h200", "step_matrix_h200"))
    percent = {name: f"{100 * row['valid']:.0f} %" for name, row in ready["samples"].items()}
    [model] = burda["mnist"]
    rate = {row["variant"]: row["images_per_second"] for row in gpu["rows"]}
    assert ready["factors"]["reconstruction"]["shape"] == 1 and ready["samples"]["N(0, I)"]["valid"] == 0
    rebuilt = ready["reconstruction"]
    rows = [f"{ready['n']} unseen scenes | {rebuilt['psnr'][0]:.1f} dB PSNR, LPIPS {rebuilt['lpips'][0]:.3f},",
            f"{percent['flow']}; at temperature 0.7, {percent['flow, temperature 0.7']}",
            f"{model['nll']:.2f} nats; the paper has {model['paper']}",
            f"{rate['compiled recorded']:,.0f} images a second, {rate['compiled recorded'] / rate['ordinary']:.1f} times"]
    page = (house.ROOT / "README.md").read_text(encoding="utf-8")
    assert not [row for row in rows if row not in page]


@named
def test_page_says_what_the_files_say(page, monkeypatch):
    from execnb.shell import CaptureShell
    monkeypatch.chdir(page.parent)
    stored, fresh = book(page)["cells"], book(page)["cells"]
    shell = CaptureShell(path=page.parent)
    for old, new in zip(stored, fresh):
        if old["cell_type"] != "code": continue
        new["outputs"] = shell.run("".join(old["source"]))
        assert shell.exc is None, f"{old['id']}: {shell.exc!r}"
        assert said(new) == said(old), f"{old['id']} has another output now: run nbdev-test --save on {page.name}"


@pytest.mark.parametrize("page", [*PAGES, WITH_CODE], ids=lambda page: page.stem)
def test_every_figure_in_prose_is_in_a_file_or_an_output(page):
    cells = book(page)["cells"]
    text = "".join(said(cell) for cell in cells if cell["cell_type"] == "code")
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    numbers = [leaf for file in RECORDS for leaf in leaves(json.loads(file.read_text()))]
    for cell in cells:
        if cell["cell_type"] != "markdown": continue
        prose = re.sub(NO_PROSE, " ", "".join(cell["source"]), flags=re.S)
        for figure in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", prose):
            places = len(figure.split(".")[1])
            known = figure in text or figure in code or any(f"{number:.{places}f}" == figure for number in numbers)
            assert known, f"{page.name}, {cell['id']}: {figure} is in no file, no output and no cell"


# ---- records


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_record_has_its_receipt(file):
    record = json.loads(file.read_text())
    assert record["machine"] and record["date"] and record["python"] and record["versions"]["torch"]
    assert record["command"].startswith("python benchmarks/") and not re.search(r"[\s\"']/\w", file.read_text())
    assert record["rehearsal"] is False, "a rehearsal is no result"
    assert (house.ROOT / record["command"].split()[1]).is_file()
    assert all(math.isfinite(number) for number in leaves(record))


# ---- experiments


def test_learning_rate_falls_as_in_the_paper():
    total = 3280
    rates = [literature.stage_lr(epoch / total, 1e-3) for epoch in range(total)]
    assert [round(rate, 8) for rate in sorted(set(rates), reverse=True)] == [round(1e-3 * 10 ** (-i / 7), 8) for i in range(8)]
    assert [rates.count(rate) for rate in sorted(set(rates), reverse=True)] == [3 ** i for i in range(8)]


def test_importance_weights_are_those_of_the_distributions(monkeypatch):
    torch.manual_seed(0)
    model, x, eps = literature.Burda(torch.rand(784)), torch.rand(4, 784).round(), torch.randn(3, 4, 50)
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: eps)
    found = model.log_weights(x, 3)
    mu, log_std = model.to_q(model.encoder(x)).chunk(2, dim=1)
    q = torch.distributions.Normal(mu, log_std.exp())
    z = mu + log_std.exp() * eps
    prior, likelihood = torch.distributions.Normal(0.0, 1.0), torch.distributions.Bernoulli(logits=model.decoder(z))
    expected = likelihood.log_prob(x.expand(3, 4, 784)).sum(2) + (prior.log_prob(z) - q.log_prob(z)).sum(2)
    assert found.shape == (3, 4) and torch.allclose(found, expected, atol=1e-3)
    assert torch.allclose(literature.bound(found), expected.exp().mean(0).log() if expected.min() > -80 else
                          expected.logsumexp(0) - math.log(3), atol=1e-3)


def test_exact_ppca_is_the_librarys_fit():
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    _, sigma, log_p = literature.exact(x, 2)
    fitted = literature.LinearVAE.fit(x, 2)
    assert abs(log_p - fitted.log_p(x).mean()) < 1e-9 and abs(sigma - fitted.s) < 1e-9


def test_an_epoch_shows_every_image_once():
    source = steps.Shuffled(12, 4, "cpu")
    for _ in range(3):
        seen = []
        for _ in range(3):
            source.advance()
            seen += source.rows().tolist()
        assert sorted(seen) == list(range(12))


def test_a_step_begins_anew_in_the_same_memory():
    model = torch.nn.Linear(2, 2)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), fused=True)
    where = model.weight.data_ptr()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    steps.restart(model, optimizer, fresh)
    assert model.weight.data_ptr() == where and torch.equal(model.weight, fresh["weight"])
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.slow
def test_experiments_rehearse(tmp_path):
    np.savez(tmp_path / "mnist.npz", train_images=np.random.default_rng(0).integers(0, 256, (2000, 28, 28), np.uint8),
             test_images=np.random.default_rng(1).integers(0, 256, (200, 28, 28), np.uint8))
    np.savez(tmp_path / "faces.npz", x=np.random.default_rng(0).integers(0, 256, (1, 300, 560), np.uint8))
    environment = os.environ | {"PYTHONPATH": str(house.ROOT), "OMP_NUM_THREADS": "1"}
    for name, more in dict(literature=["--data", tmp_path / "mnist.npz", "--frey", tmp_path / "faces.npz"], beta_sweep=[],
                           latent_size=[], ablations=[], failures=[]).items():
        command = [sys.executable, house.ROOT / f"benchmarks/{name}.py", "--rehearse", "--out", tmp_path / "out", *more]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    records = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    assert set(records) == {f"{name}_cpu" for name in EXPERIMENTS}
    assert all(record["rehearsal"] for record in records.values())
    arms = {run["arm"] for run in records["ablations_cpu"]["runs"]}
    assert arms == set(records["ablations_cpu"]["arms"]) and len(records["literature_cpu"]["mnist"]) == 3
