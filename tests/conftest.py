"What the tests share: Weights & Biases offline, matplotlib without windows, files from outside, what was skipped."
import os
import re
import shutil
import subprocess
from pathlib import Path

import house
import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH"   # what npm says without a network


@pytest.fixture
def one_thread():
    "Small tensors are fastest on one core."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root():
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def outside():
    "The path of a file from outside, by its name in `find`; a test that needs one is skipped where it is not at hand."
    at_hand = house.at_hand()
    def path(name):
        if at_hand[name] is None:
            pytest.skip(f"needs {name}")
        return at_hand[name]
    return path


@pytest.fixture(scope="session")
def katex_folder(pytestconfig):
    "A folder whose node_modules has KaTeX, in the version that the site loads."
    if not shutil.which("node") or not shutil.which("npm"): pytest.skip("needs node and npm")
    package = re.search(r"/(katex@[\d.]+)/", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))[1]
    folder = pytestconfig.cache.mkdir(package.replace("@", "-"))
    if not (folder / "node_modules/katex/package.json").exists():
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(folder), package]
        try: done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired: pytest.skip("npm's registry does not answer")
        if done.returncode and re.search(OFFLINE, done.stderr): pytest.skip("needs npm's registry, or its cache")
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def pytest_terminal_summary(terminalreporter):
    "The cells that the run of the notebooks skipped, beside the tests that were skipped."
    if lines := house.skipped_cells():
        terminalreporter.section("cells of notebooks that need a file which is not at hand")
        for line in lines:
            terminalreporter.line(f"SKIPPED {line}")
