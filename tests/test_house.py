"The rules of the house: one owner for every fact, clean notebooks, quick commands, a library that stands alone."
import ast
import configparser
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import house
import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = house.ROOT
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, NBDEV = PYPROJECT["project"], PYPROJECT["tool"]["nbdev"]
QUARTO = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
FOLDERS = ["nbs", "vae_nb", "tests", "benchmarks", ".github", ".ci"]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def settings():
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read_string(read("settings.ini"))
    return ini


def said_by_setup(monkeypatch):
    "The keywords setup.py hands to setuptools."
    said = {}
    monkeypatch.setattr("setuptools.setup", said.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return said


# ---- one owner for every fact


def test_no_key_has_two_owners(monkeypatch):
    names = {"install_requires": {"dependencies"}, "extras_require": {"optional-dependencies"},
             "keywords": {"keywords"}, "classifiers": {"classifiers"}, "entry_points": {"scripts", "entry-points"}}
    said = said_by_setup(monkeypatch)
    from_settings = set().union(*(names[key] for key in said))
    from_package = set(PYPROJECT["tool"]["setuptools"]["dynamic"])
    static = set(PROJECT) - {"dynamic"}
    assert from_package == {"version"}
    assert set(PROJECT["dynamic"]) == from_settings | from_package
    assert not static & from_settings and not static & from_package and not from_settings & from_package
    assert not {key.replace("_", "-") for key in NBDEV} & (static | from_settings | from_package)
    assert not set(settings()["DEFAULT"]) & {key.replace("-", "_") for key in static | from_package}


def test_settings_hold_what_setup_reads_and_nothing_else():
    ini = settings()
    read_by_setup = {"requirements", "keywords", "classifiers", "console_scripts"}
    assert ini.sections() == []
    assert set(ini["DEFAULT"]) == read_by_setup | {f"{extra}_requirements" for extra in ("dev", "docs", "hub", "onnx", "prior")}


def test_requirements_are_ranges(monkeypatch):
    said = said_by_setup(monkeypatch)
    one_of_ours = {f"{PROJECT['name']}[{extra}]" for extra in said["extras_require"]}
    for line in {*said["install_requires"], *sum(said["extras_require"].values(), [])} - one_of_ours:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+>=[0-9][0-9.]*", line), f"{line}: expected name>=version, a range"


def test_the_version_has_one_owner():
    body = ast.parse(read("vae_nb/__init__.py")).body
    (assigned,) = [node for node in body if isinstance(node, ast.Assign)]
    assert ast.unparse(assigned.targets[0]) == "__version__"
    version = assigned.value.value
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.M)[1] == version
    named = re.compile(r"^\s*_*version_*\s*[=:]\s*[\"']?" + re.escape(version), re.M)
    owners = [p for p in text_files() if p.suffix in {".py", ".ini", ".toml", ".yml", ".yaml"}]
    assert [p for p in owners if named.search(p.read_text(encoding="utf-8"))] == [ROOT / "vae_nb/__init__.py"]


def test_package_built_from_the_sdist_knows_all_of_settings(tmp_path, monkeypatch):
    sdist = house.build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = house.build_from(unpacked, "wheel", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = {Path(n).name: archive.read(n).decode() for n in names if ".dist-info/" in n}
    said = said_by_setup(monkeypatch)
    assert [n for n in names if n.endswith(".py") and not n.startswith("vae_nb/")] == []
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vae_nb").rglob("*.py")}
    assert there == {n for n in names if n.endswith(".py")}
    assert {"vae_nb/py.typed", "vae_nb/records/ready_model.json", "vae_nb/weights/scenes/model.safetensors"} <= set(names)
    for line in said["install_requires"]:
        assert f"Requires-Dist: {line}" in text["METADATA"]
    for extra, lines in said["extras_require"].items():
        assert f"Provides-Extra: {extra}" in text["METADATA"]
        assert all(f'Requires-Dist: {line}; extra == "{extra}"' in text["METADATA"] for line in lines)
    for line in said["entry_points"]["console_scripts"]:
        assert line in text["entry_points.txt"]
    assert "Version: " + importlib.import_module("vae_nb").__version__ in text["METADATA"]


def test_nothing_generated_has_drifted():
    assert "\n".join(house.drift()) == ""


def test_readme_says_what_the_index_says():
    assert read("README.md") == house.readme(), "run: make readme"


def test_readme_links_exist():
    assert missing_links(read("README.md"), ROOT) == []


# ---- site, continuous integration


def pages(contents):
    for item in contents:
        yield from pages(item["contents"]) if isinstance(item, dict) and "contents" in item else [item]


def test_sidebar_lists_every_notebook_and_no_other():
    listed = list(pages(QUARTO["website"]["sidebar"]["contents"]))
    there = [p.relative_to(ROOT / "nbs").as_posix() for p in house.notebooks()]
    assert len(set(listed)) == len(listed)
    assert set(there) - set(listed) == set(), "notebooks that are not in the sidebar of _quarto.yml"
    assert set(listed) - set(there) == set(), "entries of _quarto.yml that are no notebook"


def test_a_number_is_given_once_in_a_folder():
    pages = [p.relative_to(ROOT / "nbs").as_posix() for p in house.notebooks()]
    numbered = [re.match(r"(.*/)?\d+", page)[0] for page in pages if re.search(r"\d", page)]
    assert len(set(numbered)) == len(numbered)


# ---- parts: a folder of notebooks is a package, and packages know each other one way

KNOWS = {  # a part -> what it may import
    "data": set(), "model": set(), "plots": set(), "loss": {"model.distributions", "data.downloads"},
    "analysis": {"loss", "model", "data", "plots"}, "train": {"analysis", "loss", "model", "data", "plots"},
    "cli": {"train", "analysis", "loss", "model", "data", "plots"}, "__main__": {"cli"}}
KNOWS["export"] = KNOWS["cli"]
KNOWS["cli"] = KNOWS["cli"] | {"export"}
KNOWS["commands"] = KNOWS["cli"] | {"cli"}


def imported(path):
    "What of vae_nb a module imports, wherever in it, as names below vae_nb."
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            found = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ([".".join((*found, alias.name)) for alias in node.names] if found[0] == "vae_nb" else [])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vae_nb")


def test_imports_go_one_way():
    wrong = []
    for path in (ROOT / "vae_nb").rglob("*.py"):
        parts = path.relative_to(ROOT / "vae_nb").with_suffix("").parts
        if parts[-1] in ("__init__", "_modidx"):
            continue
        for name in imported(path):
            name = name.removeprefix("vae_nb.")
            allowed = {parts[0], *KNOWS[parts[0]], "__version__"}
            if not any(name == a or name.startswith(a + ".") for a in allowed):
                wrong.append(f"{'.'.join(parts)} imports {name}")
    assert wrong == []


def test_a_folder_of_notebooks_is_a_package():
    exported = {}
    for path in house.notebooks():
        lines = re.findall(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
        exported |= {line: path.relative_to(ROOT / "nbs") for line in lines}
    for module, page in exported.items():
        if page.parts[0] not in ("theory", "use"):
            assert module == ".".join((*page.parts[:-1], re.sub(r"^\d+_", "", page.stem))), page
    for package in (ROOT / "vae_nb").glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))), f"{package}: what is it for?"


def test_the_package_hands_on_what_a_script_needs_first():
    import vae_nb
    from vae_nb.data.dataset import load
    from vae_nb.model.vae import VAE
    first, second, package = (getattr(vae_nb, name) for name in ("VAE", "load_images", "train"))
    assert first is VAE and second is load and package.__file__ == str(ROOT / "vae_nb/train/__init__.py")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vae_nb.nothing


def test_page_names_are_unique_in_their_folder():
    names = [f"{p.parent.name}/" + re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem) for p in house.notebooks()]
    assert sorted(set(names)) == sorted(names)


def test_quarto_settings_are_linked_not_copied():
    link = ROOT / "nbs/_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"
    assert QUARTO["format"]["html"]["keep-md"] is True and "tex_math_dollars" in QUARTO["format"]["commonmark"]["variant"]
    assert (ROOT / "nbs" / QUARTO["format"]["html"]["css"]).is_file()
    links = [item["href"] for item in QUARTO["website"]["navbar"]["right"] if "href" in item]
    assert links == [PROJECT["urls"]["Repository"]]


def steps(name):
    jobs = yaml.safe_load(read(f".github/workflows/{name}.yaml"))["jobs"]
    return jobs, [step.get("run") or step["uses"] for job in jobs.values() for step in job["steps"]]


def test_continuous_integration_runs_the_two_commands_we_run():
    jobs, test_steps = steps("test")
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert "make test" in test_steps
    assert min(pythons, key=lambda v: int(v[2:])) == PROJECT["requires-python"].strip(">=")
    _, docs_steps = steps("docs")
    order = [next(i for i, s in enumerate(docs_steps) if key in s) for key in
             ("quarto-actions/setup", "nbdev-docs", "upload-pages-artifact", "deploy-pages")]
    assert order == sorted(order)
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK) and "&& env -u VAE_NB_FILES make test)" in read(".ci/run")
    hooks = [hook["id"] for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert hooks == ["nbdev-clean", "nbdev-export", "ruff"]


# ---- make


@pytest.fixture
def workshop(tmp_path):
    "A copy of the Makefile with a pretended Python that writes down how it was called."
    for name in ["Makefile", "settings.ini", "setup.py", "pyproject.toml"]:
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1e9, 1e9))
    python = tmp_path / "python"
    python.write_text(textwrap.dedent("""\
        #!/bin/sh
        echo "$*" >> calls
        echo "$VAE_NB_FILES" > files
        case "$1 $2" in
          "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
          "-m pip") if [ -e broken ]; then echo "no such package" >&2; exit 1; fi
            for command in train reconstruct sample traverse; do
              printf '#!/bin/sh\\necho '$command' "$@"\\n' > .venv/bin/vae-$command; chmod +x .venv/bin/vae-$command; done ;;
        esac
        """))
    python.chmod(0o755)

    def make(*args):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["make", *args], cwd=tmp_path, env=house.plain_environment(), capture_output=True, text=True)
        return done, (tmp_path / "calls").read_text()
    make.folder = tmp_path
    return make


def test_make_demo_sets_up_once(workshop):
    first, calls = workshop("demo", "PYTHON=./python")
    assert first.returncode == 0, first.stderr
    assert calls.count("-m venv .venv") == 1 and calls.count("-m pip install") == 1 and "-e ." in calls
    assert "installing" in first.stdout and "train scenes --preset demo" in first.stdout
    second, calls = workshop("demo", "PYTHON=./python")
    assert second.returncode == 0 and calls == "" and "installing" not in second.stdout and "train scenes" in second.stdout
    os.utime(workshop.folder / "settings.ini")
    for stamp in (".created", ".installed"):
        os.utime(workshop.folder / ".venv" / stamp, (1.1e9, 1.1e9))
    _, calls = workshop("demo", "PYTHON=./python")
    assert calls.count("-m pip install") == 1 and "-m venv" not in calls


def test_make_says_why_set_up_failed_and_tries_again(workshop):
    (workshop.folder / "broken").touch()
    failed, _ = workshop("demo", "PYTHON=./python")
    assert failed.returncode != 0 and "no such package" in failed.stderr and "train scenes" not in failed.stdout
    (workshop.folder / "broken").unlink()
    mended, calls = workshop("demo", "PYTHON=./python")
    assert mended.returncode == 0 and calls.count("-m pip install") == 1


def test_make_leaves_an_environment_of_yours_alone(workshop):
    missing, _ = workshop("demo", "VENV=elsewhere")
    assert missing.returncode != 0 and "elsewhere holds no bin/python" in missing.stderr
    workshop("demo", "PYTHON=./python")
    (workshop.folder / ".venv").rename(workshop.folder / "elsewhere")
    done, calls = workshop("demo", "VENV=elsewhere")
    assert done.returncode == 0 and calls == "" and "train scenes" in done.stdout


def test_make_hands_on_files_from_outside_by_an_absolute_path(workshop):
    "Notebooks run in folders of their own, so a relative path would name another folder there."
    workshop("demo", "PYTHON=./python", "VAE_NB_FILES=../outside")
    assert (workshop.folder / "files").read_text().strip() == str(workshop.folder.parent / "outside")


def test_make_alone_lists_the_targets(workshop):
    done, _ = workshop()
    targets = set(re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M)[1].split()) - {"checks", "yours"}
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets


# ---- commands

COMMANDS = [line.split(" = ") for line in settings()["DEFAULT"]["console_scripts"].split("\n") if line]


@pytest.mark.parametrize("name, target", COMMANDS, ids=[name for name, _ in COMMANDS])
def test_command_resolves(name, target):
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_help_imports_nothing_heavy(name):
    script = Path(sysconfig.get_path("scripts")) / name
    run = [sys.executable, "-X", "importtime", str(script), "--help"]
    done = subprocess.run(run, env=house.plain_environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "vae_nb" in imported and not imported & {"torch", "torchvision", "matplotlib", "wandb", "lpips"}



# ---- the library stands alone

ALONE = """
import importlib, pkgutil, socket, sys

class Absent:
    "Nothing of what a plain installation may lack can be imported."
    names = {"nbdev", "execnb", "jupyter", "jupyter_core", "jupyter_client", "IPython", "ipykernel", "ipywidgets",
             "nbconvert", "nbformat", "notebook", "wandb", "lpips", "huggingface_hub", "pyarrow"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names: raise ModuleNotFoundError(f"{name} is not installed here", name=name)

def no_network(*args, **kwargs): raise OSError("there is no network here")

sys.meta_path.insert(0, Absent())
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network
"""


def alone(code):
    "Run `code` where nbdev, Jupyter, wandb, lpips and the network are missing."
    done = subprocess.run([sys.executable, "-c", ALONE + textwrap.dedent(code)], env=house.plain_environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    assert alone("""
        import vae_nb
        print(sorted({"torch", "numpy", "matplotlib", "fastcore"} & set(sys.modules)))""").strip() == "[]"


def test_modules_import_and_a_model_trains_alone():
    said = alone("""
        import vae_nb
        names = {m.name for m in pkgutil.walk_packages(vae_nb.__path__, "vae_nb.")}
        assert {"vae_nb.data.dataset", "vae_nb.model.vae", "vae_nb.loss.objective", "vae_nb.train.loop"} <= names, names
        for name in sorted(names): importlib.import_module(name)

        import torch
        from vae_nb.train.config import Config
        from vae_nb.loss.objective import Objective
        from vae_nb.train.loop import fit, new_state, validate
        torch.set_num_threads(1)
        images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
        state = new_state(Config(preset="demo", size=32, batch_size=4, epochs=1, device="cpu"))
        before = [p.clone() for p in state.model.parameters()]
        print(validate(state, Objective(), images, torch.arange(4, 6))["loss_val"])
        fit(state, Objective(), images, torch.arange(4))
        assert state.step == 1 and any((a != b).any() for a, b in zip(before, state.model.parameters()))
        print(validate(state, Objective(), images, torch.arange(4, 6))["loss_val"])""")
    losses = [float(line) for line in said.split()]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


# ---- notebooks: each rule takes a notebook and returns what is wrong with it


def source(cell):
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def code_cells(book):
    "Code cells with their directives and the rest of their source."
    return [(cell, *house.without_directives(source(cell))) for cell in book["cells"] if cell["cell_type"] == "code"]


def statements(code):
    "Top-level statements; lines of magic are no Python and left out."
    return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M)).body


def outputs(cell):
    "Kind and content of everything a cell shows."
    for out in cell["outputs"]:
        if out["output_type"] == "stream":
            yield "text/plain", "".join(out["text"])
        for kind, content in out.get("data", {}).items():
            yield kind, content if isinstance(content, (str, dict)) else "".join(content)


def words(book):
    "All that a person reads in a notebook: sources and text, not pictures."
    for cell in book["cells"]:
        yield source(cell)
        for kind, content in outputs(cell) if cell["cell_type"] == "code" else []:
            if not kind.startswith("image/"):
                yield json.dumps(content) if isinstance(content, dict) else content


def format_is_plain(book):
    ids = [cell.get("id") for cell in book["cells"]]
    if (book["nbformat"], book["nbformat_minor"]) < (4, 5) or None in ids or len(set(ids)) < len(ids):
        yield "every cell needs an id of its own (nbformat 4.5)"
    if book["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield f"kernelspec: expected python3, got {book['metadata'].get('kernelspec')}"
    if "widgets" in book["metadata"] or any("widget" in kind for c, _, _ in code_cells(book) for kind, _ in outputs(c)):
        yield "holds widgets; use text progress bars"


def opens_with_title_and_summary(book):
    lines = source(book["cells"][0]).strip().splitlines() if book["cells"] else []
    shaped = [line[:2] for line in lines if line.strip()][:2] == ["# ", "> "]
    if not shaped or sum(line.startswith("> ") for line in lines) != 1:
        yield "the first cell should be a title and one line of summary: # Title, > summary"


def stores_no_error(book):
    for cell, _, _ in code_cells(book):
        for out in cell["outputs"]:
            if out["output_type"] == "error":
                yield f"cell {cell['id']}: error {out['ename']}"
            if out["output_type"] == "stream" and out["name"] == "stderr":
                yield f"cell {cell['id']}: wrote to stderr: {''.join(out['text'])[:100]}"


MACHINE_PATH = re.compile(r"(?<![\w.~:-])/(?:home|work|root|tmp|Users|private|mnt)\b(?:/[\w.-]+)*")


def names_no_machine_path(book):
    for text in words(book):
        yield from (f"machine path {m[0]}" for m in MACHINE_PATH.finditer(text))


def figures_have_words(book):
    for cell, directives, _ in code_cells(book):
        drawn = any(kind.startswith("image/") for kind, _ in outputs(cell))
        said = [directives.get(key, "") for key in ("fig-cap", "fig-alt")]
        if drawn and not all(said):
            yield f"cell {cell['id']}: draws, but has no #| fig-cap or #| fig-alt"
        if any(said) and not drawn:
            yield f"cell {cell['id']}: has a caption but no stored picture; run it with --save"
        if drawn and all(said) and said[0] == said[1]:
            yield f"cell {cell['id']}: caption (what to see) and alt text (what is there) are the same"
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown" and re.search(r"!\[\s*\]\(", source(cell)):
            yield f"cell {cell['id']}: a picture without alt text"


def prints_are_stored(book):
    flags = {"notest", "gpu", "slow"}
    for cell, directives, code in code_cells(book):
        calls = [s.value for s in statements(code) if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        skipped = flags & set(directives) or directives.get("eval") == "false"
        if prints and not cell["outputs"] and not skipped:
            yield f"cell {cell['id']}: prints, but nothing is stored; run it with --save"


def imports_stand_alone(book):
    for cell, directives, code in code_cells(book):
        exported = bool({"export", "exports", "exporti"} & set(directives))
        if "nbdev_export()" in code or directives.get("eval") == "false":
            continue
        body = statements(code)
        imports = (ast.Import, ast.ImportFrom)
        top = [isinstance(s, imports) for s in body]
        nested = any(isinstance(node, imports) for s in body for node in ast.walk(s))
        if (any(top) or (nested and not exported)) and not all(top):
            yield f"cell {cell['id']}: imports and works; cells with imports run again when the site is built"


def links_exist(book, folder=None):
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            yield from missing_links(source(cell), folder)


def missing_links(text, folder):
    "Relative links and pictures of a markdown text that are not there."
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)|\b(?:src|href)=\"([^\"]+)", text)
    targets = [(a or b).partition("#")[0] for a, b in found if not re.match(r"[a-z][a-z0-9+.-]*:|#", a or b)]
    return [f"link to {t}, which is not there" for t in targets if not (folder / t).exists()]


RULES = [format_is_plain, opens_with_title_and_summary, stores_no_error, names_no_machine_path, figures_have_words,
         prints_are_stored, imports_stand_alone, links_exist]
BOOKS = house.notebooks()


@pytest.mark.parametrize("path", BOOKS, ids=[p.stem for p in BOOKS])
def test_notebook_keeps_the_rules(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    rules = [*RULES[:-1], lambda book: links_exist(book, path.parent)]
    assert "\n".join(line for rule in rules for line in rule(book)) == ""


def a_book(*cells, kernel="python3"):
    title = ("markdown", "# Title\n> Summary.")
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": kernel}},
            "cells": [a_cell(i, *cell) for i, cell in enumerate([title, *cells])]}


def a_cell(i, kind, text, *out):
    return {"id": str(i), "cell_type": kind, "source": text} | ({"outputs": list(out)} if kind == "code" else {})


def shows(**data):
    return {"output_type": "display_data", "data": {k.replace("_", "/"): v for k, v in data.items()}}


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": [text]}


CAPTION = '#| fig-cap: "what to see"\n#| fig-alt: "what is there"\n'
KEPT = a_book(
    ("code", "#| export\nimport math\nfrom os import path"),
    ("code", CAPTION + "draw();", shows(image_png="iVBO/home/x")),
    ("code", "print(1)", stream("1\n")),
    ("code", "#| gpu\nprint(1)"),
    ("markdown", "[a page](https://a.b/home/c) and [this one](#title)"),
    ("code", "#| export\ndef f():\n    import math\n    return math.pi"),
    ("code", "#| hide\nimport nbdev; nbdev.nbdev_export()"))
BROKEN = {
    "no id": a_book() | {"cells": [{"cell_type": "markdown", "source": "# Title\n> Summary.", "metadata": {}}]},
    "kernel": a_book(kernel="conda-env"),
    "widget": a_book(("code", "bar()", shows(**{"application_vnd.jupyter.widget-view+json": {}}))),
    "no summary": a_book() | {"cells": [a_cell(0, "markdown", "# Title")]},
    "two lines of summary": a_book() | {"cells": [a_cell(0, "markdown", "# Title\n> a\n> b")]},
    "error": a_book(("code", "1/0", {"output_type": "error", "ename": "ZeroDivisionError"})),
    "warning": a_book(("code", "f()", stream("UserWarning", "stderr"))),
    "path in source": a_book(("code", "open('/" + "home/someone/x.png')")),
    "path in output": a_book(("code", "print(p)", stream("saved to /" + "tmp/x\n"))),
    "no caption": a_book(("code", "draw();", shows(image_png="iVBO"))),
    "no alt text": a_book(("code", '#| fig-cap: "what to see"\ndraw();', shows(image_png="iVBO"))),
    "no picture": a_book(("code", CAPTION + "draw();")),
    "caption is alt": a_book(("code", '#| fig-cap: "x"\n#| fig-alt: "x"\ndraw();', shows(image_png="iVBO"))),
    "no alt in markdown": a_book(("markdown", "![](https://a.b/x.png)")),
    "not run": a_book(("code", "print(1)")),
    "import and work": a_book(("code", "import math\nmath.pi", shows(text_plain="3.14"))),
    "import in a block": a_book(("code", "with f():\n    import math")),
    "export and import": a_book(("code", "#| export\nimport math\ndef f(): return math.pi")),
    "dead link": a_book(("markdown", "see [the data](99_nowhere.ipynb)")),
}


def found_in(book, folder=ROOT / "nbs"):
    return [line for rule in RULES for line in (rule(book, folder) if rule is links_exist else rule(book))]


def test_rules_pass_a_good_notebook():
    assert found_in(KEPT) == []


@pytest.mark.parametrize("name", BROKEN)
def test_rules_catch(name):
    assert len(found_in(BROKEN[name])) == 1


# ---- nothing left lying about

MARKS = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")


def text_files():
    "Every text file git tracks; without git, every one in the folders of the project."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if (ROOT / ".git").exists() and listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [*ROOT.iterdir(), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))]
    return sorted(p for p in paths if p.is_file() and p.suffix != ".onnx" and b"\0" not in p.read_bytes()[:8000])


@pytest.mark.parametrize("path", [p for p in text_files() if p != ROOT / "LICENSE"],
                         ids=lambda p: p.relative_to(ROOT).as_posix())
def test_file_names_no_machine_and_leaves_nothing_for_later(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(words(json.loads(text)))
    assert MARKS.findall(text) == []
    assert [m[0] for m in MACHINE_PATH.finditer(text)] == []


def test_versions_for_a_bug_report(capsys):
    from vae_nb.cli import vae_train
    vae_train(env=True)
    assert {"vae_nb", "torch", "device", "cache"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
