"""Every notebook as Colab runs it: the wheel in an environment of its own, an empty folder, no checkout, no network.

A cell is left out where `make test` leaves it out because it takes long or needs a file that is not at hand.
"""
import ast
import json
import os
import re
import subprocess
import sys
import venv
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import house
import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
from jupyter_core.utils import run_sync  # noqa: E402

NO_NETWORK = """
import socket
connect = socket.socket.connect
def at_home(self, address):
    host = address[0] if isinstance(address, tuple) else "localhost"   # a name is a socket of this machine
    if host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"): raise OSError(f"there is no network here: {address}")
    return connect(self, address)
socket.socket.connect = at_home
"""
CHEAP = ["theory/00_notation", "model/01_distributions", "results/05_speed"]
BOOKS = {path.relative_to(house.ROOT / "nbs").with_suffix("").as_posix(): path for path in house.notebooks()}


@pytest.fixture(scope="session")
def colab(tmp_path_factory):
    "Python of an environment that has the wheel, sees the packages of this one, and neither the checkout nor a network."
    folder = tmp_path_factory.mktemp("colab")
    wheel = house.build("wheel", folder)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others))   # their own .pth files, and so the checkout, are not read
    (packages / "no_network.py").write_text(NO_NETWORK)
    (packages / "no_network.pth").write_text("import no_network\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
               "--ignore-installed", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def kernel(python):
    "A Jupyter kernel of that Python, which knows nothing of this process's Python path."
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    specs = python.parents[2] / "kernels"
    (specs / "colab").mkdir(parents=True, exist_ok=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = dict(argv=argv, display_name="as on Colab", language="python")
    (specs / "colab/kernel.json").write_text(json.dumps(spec))
    return AsyncKernelManager(kernel_name="colab", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(specs)]))


def environment(folder):
    "Variables of the kernel: a home and caches that are new; files from outside where this process knows them."
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "IN_TEST")}
    new = dict(HOME=folder, XDG_CACHE_HOME=folder / "cache", VAE_NB_CACHE=folder / "cache", TORCH_HOME=folder / "torch")
    return kept | {name: str(path) for name, path in new.items()}


def run(book, python, folder):
    "Run every cell in an empty folder; the folder of the package that was imported."
    book.cells.append(nbformat.v4.new_code_cell("import vae_nb; print(vae_nb.__file__)"))
    manager, here = kernel(python), dict(metadata=dict(path=str(folder)))
    client = nbclient.NotebookClient(book, km=manager, resources=here, timeout=600)
    try:
        client.execute(env=environment(python.parents[2]))
    finally:
        run_sync(manager.shutdown_kernel)(now=True)   # the client leaves a kernel that it was given running
    return Path(book.cells[-1].outputs[0].text.strip()).parent


def cells_that_run(path):
    "The notebook without the cells that take long or need a file; `notest` and `eval: false` say nothing to Colab."
    book = nbformat.read(path, as_version=4)
    def runs(cell):
        lines = [line for line in cell.source.splitlines() if not re.fullmatch(r"#\| *(notest|eval: *false)", line)]
        return house.runs(dict(source=lines and [line + "\n" for line in lines]))
    book.cells = [cell for cell in book.cells if cell.cell_type == "code" and (house.installs(cell) or runs(cell))]
    return book


def test_pages_import_what_the_first_cell_installs():
    "Of packages that are not Python's own: requirements, the extras of the first cell, and what any notebook has."
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read_string((house.ROOT / "settings.ini").read_text(encoding="utf-8"))
    extras = re.search(r"vae_nb\[([\w,]+)\]", house.INSTALL)[1].split(",")
    lines = sum((ini["DEFAULT"][key].split() for key in ["requirements", *(f"{extra}_requirements" for extra in extras)]), [])
    there = {re.split(r"[>\[]", line)[0].lower().replace("_", "-") for line in lines} | {"ipython", "ipykernel", "vae-nb"}
    brings, unknown = packages_distributions(), []
    for name, path in BOOKS.items():
        for cell in cells_that_run(path).cells:
            code = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.M)
            for node in ast.parse(code).body:   # what a function imports is its own affair
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
                    if not {package.lower().replace("_", "-") for package in brings.get(top, [])} & there:
                        unknown.append(f"{name}: {top}")
    assert unknown == []


@pytest.mark.parametrize("name", CHEAP)
def test_a_page_runs_as_on_colab(name, colab, tmp_path):
    assert run(cells_that_run(BOOKS[name]), colab, tmp_path).is_relative_to(colab.parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BOOKS if name not in CHEAP])
def test_every_page_runs_as_on_colab(name, colab, tmp_path):
    assert run(cells_that_run(BOOKS[name]), colab, tmp_path).is_relative_to(colab.parents[1])


def test_a_page_that_needs_the_checkout_fails_here(colab, tmp_path):
    for line in ("from pathlib import Path; assert Path('../../benchmarks').exists()", "import house",
                 "from urllib.request import urlopen; urlopen('https://github.com')"):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line)])
        with pytest.raises(nbclient.exceptions.CellExecutionError):
            run(book, colab, tmp_path)
