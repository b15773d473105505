"""Planted errors: each entry of mutations.json is put into a formula, and the cell that checks its equation must go red.

    python tests/test_mutations.py nbs/theory/09_collapse.ipynb      # one line for each error checked by that notebook
    python tests/test_mutations.py nbs/theory/09_collapse.ipynb 2    # the first two of them, as in the quick tests
"""
import ast
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = json.loads((ROOT / "tests/mutations.json").read_text())  # where, old, new, what, label
BROKEN = NameError, SyntaxError, ImportError, TypeError, AttributeError  # a slip of the pen, not a wrong formula
SKIPPED = re.compile(r"^#\| *(slow|gpu|notest|eval: *false|squeezenet1_1|emoji|freyfaces)", re.M)
ALWAYS = re.compile(r"^#\| export|^torch\.set_", re.M)  # cells that matter without binding a name


def cells(path):
    "Sources of the code cells of a notebook; those that tests skip are empty."
    sources = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    return ["" if SKIPPED.search(s) else s for s in sources]


NOTEBOOKS = {str(p.relative_to(ROOT)): cells(p) for p in sorted((ROOT / "nbs").rglob("*.ipynb"))}


def checks(source):
    "What a cell says it checks: equations, or by `# guards: loop-step` a part of the program."
    return re.findall(r"[\w-]+", " ".join(re.findall(r"^# (?:checks|guards):(.*)", source, re.M)))


# label -> the notebook that asserts it, and the number of the last cell that does
CHECKER = {label: (path, i) for path, sources in NOTEBOOKS.items() for i, s in enumerate(sources) for label in checks(s)}


def names(source):
    "Names that a cell binds or changes, and names that it uses."
    def root(node): return root(node.value) if isinstance(node, (ast.Attribute, ast.Subscript)) else getattr(node, "id", None)
    binds, uses = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store): binds.add(root(node))
        elif isinstance(node, ast.Name): uses.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)): binds.add(node.name)
        elif isinstance(node, ast.alias): binds.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): binds.add(root(node.value.func))
    return binds, uses


def needed(sources, last):
    "Numbers of the cells that cell `last` depends on, itself included: pictures and other experiments are left out."
    keep, wanted = {last}, names(sources[last])[1]
    for i in reversed(range(last)):
        binds, uses = names(sources[i])
        if binds & wanted or ALWAYS.search(sources[i]): keep.add(i); wanted |= uses
    return keep


def planted(where, old, new, sources):
    "Where the error goes in: the number of a cell (-1: a module that this notebook imports) and its mutated source."
    library = where.endswith(".py")
    text = (ROOT / where).read_text() if library else "\n".join(NOTEBOOKS[where])
    assert text.count(old) == 1 and old != new, f"{old!r} stands {text.count(old)} times in {where}"
    if not library or f"#| default_exp {module_name(where).removeprefix('vae_nb.')}" in sources:
        return next((i, s.replace(old, new)) for i, s in enumerate(sources) if old in s and (not library or ALWAYS.match(s)))
    return -1, text.replace(old, new)


def module_name(where):
    "vae_nb/model/vae.py -> vae_nb.model.vae"
    return where.removesuffix(".py").replace("/", ".")


def replace_module(where, source):
    "Put a mutated module in the place of the real one, and forget all that may have copied from it."
    for name in [name for name in sys.modules if name.startswith("vae_nb.")]: del sys.modules[name]
    module = types.ModuleType(module_name(where))
    sys.modules[module.__name__] = module
    exec(compile(source, where, "exec"), vars(module))


def in_a_copy(run):
    "Run in a copy of this process: 'survived', 'caught by ...', or 'broken by ...' for nonsense."
    read, write = os.pipe()
    if not (child := os.fork()):
        signal.setitimer(signal.ITIMER_PROF, 120)   # of processor time, so that a busy machine changes nothing
        try: run(); said = "survived"
        except BROKEN as error: said = f"broken by {error!r}"
        except Exception as error: said = f"caught by {type(error).__name__}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe: said = pipe.read()
    os.waitpid(child, 0)
    return said or "broken by a crash, or after two minutes of processor time"


def try_all(path, most=None):
    "Run a notebook's checks as they are and, branching off, with each error planted in them. Yields (mutation, verdict)."
    sources, space = NOTEBOOKS[path], dict(__name__="__main__", display=lambda *args: None)
    mine = [m for m in MUTATIONS if CHECKER[m["label"]][0] == path][:most]
    todo = [(m, CHECKER[m["label"]][1], *planted(m["where"], m["old"], m["new"], sources)) for m in mine]
    keep = {last: needed(sources, last) for _, last, _, _ in todo}
    def execute(i, source):
        with contextlib.redirect_stdout(io.StringIO()): exec(compile(source, f"{path}, code cell {i}", "exec"), space)

    def mutated(where, last, start, source):
        if start < 0: replace_module(where, source)
        else: execute(start, source)
        for i in range(start + 1, last + 1):
            if i in keep[last]: execute(i, sources[i])

    for cell in range(-1, max(keep) + 1):
        for m, last, start, source in todo:
            if start == cell: yield m, in_a_copy(lambda: mutated(m["where"], last, start, source))  # noqa: B023
        if any(cell in k for k in keep.values()): execute(cell, sources[cell])


def main(path, most=None):
    "Every verdict as a line; exit status 1 unless every planted error was caught."
    os.environ["MPLBACKEND"] = "agg"
    os.chdir((ROOT / path).parent)
    sys.path.insert(0, str(ROOT))
    import torch
    torch.set_num_threads(1)  # threads do not survive a fork
    caught, before = [], time.perf_counter()
    for mutation, said in try_all(path, most and int(most)):
        caught.append(said.startswith("caught"))
        print(f"{time.perf_counter() - before:4.1f} s  {said:24} {mutation['label']}: {mutation['what']}", flush=True)
        before = time.perf_counter()
    print(f"{sum(caught)} of {len(caught)} caught")
    sys.exit(not all(caught))


def test_there_are_many_and_no_two_the_same():
    assert len({(m["where"], m["old"], m["new"]) for m in MUTATIONS}) == len(MUTATIONS) >= 40


PAGES = sorted({CHECKER[m["label"]][0] for m in MUTATIONS}, reverse=True)  # the longest first


AT_MOST = {"nbs/theory/09_collapse.ipynb": ["8"]}  # its checks train: up to a minute for each planted error


def caught(*most):
    "One process a notebook, as many at a time as there are cores: the output and exit status of each."
    def run(path):
        words = most or AT_MOST.get(path, [])
        return subprocess.run([sys.executable, __file__, path, *words], capture_output=True, text=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool: return dict(zip(PAGES, pool.map(run, PAGES)))


@pytest.fixture(scope="module")
def sample(): return caught("1")


@pytest.fixture(scope="module")
def everything(): return caught()


@pytest.mark.parametrize("path", PAGES)
def test_a_planted_error_of_each_page_is_caught(path, sample):
    assert sample[path].returncode == 0, sample[path].stdout + sample[path].stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES)
def test_all_planted_errors_are_caught(path, everything):
    assert everything[path].returncode == 0, everything[path].stdout + everything[path].stderr[-3000:]


if __name__ == "__main__": main(*sys.argv[1:])
