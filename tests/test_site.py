"The pages of the site, as their notebooks store them: source in sight, lines that fit, figures that are described."
import base64
import json
import re
import subprocess
import sys

import house
import pytest
import yaml
from PIL import Image

PAGES = {path.relative_to(house.ROOT / "nbs").as_posix(): json.loads(path.read_text(encoding="utf-8"))["cells"]
         for path in house.notebooks()}
NARROW = [page for page in PAGES if page.startswith(("model/", "loss/", "theory/", "analysis/", "results/"))
          or page in ("tour.ipynb", "data/04_dataset.ipynb", "train/01_config.ipynb", "train/02_loop.ipynb")]
CORE = [page for page in PAGES if page.startswith(("model/", "loss/"))]
WIDTH = 88
QUARTO = yaml.safe_load((house.ROOT / "_quarto.yml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((house.ROOT / ".github/workflows").glob("*.yaml"))


def source(cell): return "".join(cell["source"])


def flags(cell): return [line[2:].strip() for line in source(cell).splitlines() if line.startswith("#|")]


def code(cell): return [line for line in source(cell).splitlines() if not line.startswith("#|")]


def hidden(cell):
    "Does the site leave this cell's code out?"
    said = {flag.split(":")[0].split()[0] for flag in flags(cell) if flag}
    unseen = any(re.fullmatch(r"(echo|include): *false", flag) for flag in flags(cell))
    return unseen or bool(said & {"hide", "default_exp", "export"})


def has_figure(cell):
    kinds = [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]
    return any(kind.startswith("image/") for kind in kinds)


def too_wide(page):
    shown = [cell for cell in PAGES[page] if cell["cell_type"] == "code" and not hidden(cell)]
    return [f"{page} {cell['id']}: {len(line)} {line.strip()[:50]}" for cell in shown for line in code(cell) if len(line) > WIDTH]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_with_words(page):
    visible = [cell for cell in PAGES[page] if cell["cell_type"] != "raw" and not hidden(cell)]
    assert visible and visible[0]["cell_type"] == "markdown" and source(visible[0]).strip()


@pytest.mark.parametrize("page", CORE)
def test_a_core_page_does_not_show_its_imports_before_its_work(page):
    for cell in PAGES[page]:
        lines = [line for line in code(cell) if line.strip()] if cell["cell_type"] == "code" and not hidden(cell) else []
        folded = any(flag.replace(" ", "") == "code-fold:true" for flag in flags(cell))
        assert not lines or folded or not re.match(r"(import|from) ", lines[0]), cell["id"]


@pytest.mark.parametrize("page", CORE)
def test_the_source_of_model_and_loss_is_shown(page):
    for cell in PAGES[page]:
        if cell["cell_type"] == "code" and "export" in flags(cell):
            assert not re.search(r"^(def|class|@|[A-Z_]+ *=)", "\n".join(code(cell)), re.M), f"{cell['id']}: export, not exports"


@pytest.mark.parametrize("page", CORE)
def test_lines_of_core_pages_fit(page):
    assert not too_wide(page)


def test_lines_of_pages_about_the_subject_fit():
    found = [line for page in NARROW for line in too_wide(page)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES)
def test_no_link_is_made_by_hand_to_a_name_of_the_library(page):
    "nbdev links a bare `Name` by itself, and a link around it a second time."
    names = library_names()
    found = [m[0] for cell in PAGES[page] if cell["cell_type"] == "markdown"
             for m in re.finditer(r"\[`(\w+)`\]\([^)]*\.ipynb[^)]*\)", source(cell)) if m[1] in names]
    assert not found


def library_names():
    "Every public name of the library."
    from vae_nb._modidx import d
    return {name.rsplit(".", 1)[1] for names in d["syms"].values() for name in names}


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_a_path_outside_the_repository(page):
    depth = page.count("/") + 1   # folders between the notebook and the root
    for cell in PAGES[page]:
        text = source(cell)
        assert not re.search(r"(?<![\w.])/(work|home|root|Users)/\w", text), cell["id"]
        assert not re.search(r"(?<!/)" + r"\.\./" * (depth + 1), text), cell["id"]


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_described(page):
    bare = [cell["id"] for cell in PAGES[page] if cell["cell_type"] == "code" and has_figure(cell)
            and not hidden(cell) and not any(flag.startswith("fig-alt:") for flag in flags(cell))]
    assert not bare


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_light(page):
    "A page sends its pictures; they weigh what their base64 decodes to. Three megabytes are a limit, not an aim."
    shown = [output.get("data", {}) for cell in PAGES[page] for output in cell.get("outputs", [])]
    pictures = [content for data in shown for kind, content in data.items() if kind in ("image/png", "image/jpeg")]
    images = {name for cell in PAGES[page] if cell["cell_type"] == "markdown"
              for name in re.findall(r"\]\(((?:\.\./)*images/[\w.]+)\)", source(cell))}
    folder = (house.ROOT / "nbs" / page).parent
    sizes = [len(base64.b64decode("".join(content))) for content in pictures]
    sizes += [(folder / name).stat().st_size for name in images]
    assert sum(sizes) <= 3e6


# ---- what nbdev and Quarto make of the pages, without Quarto


@pytest.fixture(scope="module")
def processed():
    "A page as nbdev's own processors hand it to Quarto, in a process that starts in the root."
    code = """
import sys, json
sys.path[:] = [p for p in sys.path if p]
import house
from fastcore.nbio import read_nb
from nbdev.processors import FilterDefaults
book = read_nb("nbs/theory/00_notation.ipynb")
FilterDefaults()(book)
print(json.dumps([[c.cell_type, c.source] for c in book.cells]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True,
                          env=house.plain_environment(PYTHONPATH=f"{house.ROOT}:{house.ROOT / 'tests'}"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_page_has_one_badge_under_its_title(processed):
    address = "https://colab.research.google.com/github/vae-nb/vae_nb/blob/main/nbs/theory/00_notation.ipynb"
    badges = [(i, text) for i, (_, text) in enumerate(processed) if "colab.research.google.com" in text]
    assert badges == [(1, f"[Open in Colab]({address}){{.colab}}")]
    assert ".colab" in (house.ROOT / "nbs/styles.css").read_text(encoding="utf-8")


def test_the_cell_that_installs_is_not_shown(processed):
    assert not [text for _, text in processed if "find_spec" in text or "%pip" in text]
    assert [text for kind, text in processed if kind == "code"]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_the_cell_that_installs_and_has_no_badge_of_its_own(page):
    first = next(cell for cell in PAGES[page] if cell["cell_type"] == "code")
    assert house.installs(first), "run: python tests/house.py colab"
    assert not [cell["id"] for cell in PAGES[page] if "nbdev_export()" in source(cell)], "run: python tests/house.py colab"
    if page != "index.ipynb":   # its map serves the README, too
        assert not [cell["id"] for cell in PAGES[page] if "colab.research" in source(cell)]


def test_the_cell_that_installs_does_so_only_where_the_package_is_missing():
    from IPython.core.inputtransformer2 import TransformerManager
    code, called = TransformerManager().transform_cell(house.INSTALL), []
    shell = type("Shell", (), dict(run_line_magic=lambda self, *args: called.append(args)))()
    for found in (True, False):
        importlib = type("importlib", (), dict(util=type("util", (), dict(find_spec=lambda name, found=found: found or None))))
        exec(code.replace("import importlib.util", ""), dict(importlib=importlib, get_ipython=lambda: shell))
        assert len(called) == (not found)
    assert called == [("pip", 'install --quiet "vae_nb[hub,onnx,prior] @ git+https://github.com/vae-nb/vae_nb"')]


def test_machines_are_told_of_every_page():
    lines = [line for line in house.llms().splitlines() if line.startswith("- ")]
    assert len(lines) == len(PAGES)
    shaped = re.compile(r"- \[[^]]+\]\(https://vae-nb\.github\.io/vae_nb/[a-z0-9_/]+\.html\.md\): .+")
    assert [line for line in lines if not shaped.fullmatch(line)] == []
    assert "llms.txt" in QUARTO["project"]["resources"] and "commonmark" in QUARTO["format"]   # that is what writes .html.md
    assert not any(re.search(r"/\d", line.split("): ")[0]) for line in lines)


def test_a_link_to_the_site_shows_a_picture():
    site = QUARTO["website"]
    assert site["open-graph"]["image"] == site["twitter-card"]["image"]
    assert site["open-graph"]["image"].startswith("/")   # else it is sought beside every page
    with Image.open(house.ROOT / "nbs" / site["open-graph"]["image"].lstrip("/")) as card:
        assert card.size == (site["open-graph"]["image-width"], site["open-graph"]["image-height"]) and card.width >= 1200
    assert (house.ROOT / "nbs" / site["open-graph"]["image"].lstrip("/")).stat().st_size < 300_000
    with Image.open(house.ROOT / "nbs" / site["favicon"]) as icon:
        assert icon.width == icon.height >= 32


def test_a_page_that_is_not_there_leads_back():
    text = (house.ROOT / "nbs/404.qmd").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["title"]
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert "index.ipynb" in targets and all((house.ROOT / "nbs" / target).exists() for target in targets)


# ---- workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_follows_the_schema_of_github(path):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "github-workflows", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        assert job["timeout-minutes"] <= 180


def test_workflows_do_what_they_are_for():
    text = {path.stem: path.read_text(encoding="utf-8") for path in WORKFLOWS}
    assert re.search(r"quarto-actions/setup@v\d\n +with:\n +version: \"\d+\.\d+\.\d+\"", text["docs"])
    steps = ("npm ci --prefix nbs/playground", "house.py llms", "nbdev-docs", "deploy-pages")
    order = [text["docs"].index(step) for step in steps]
    assert order == sorted(order)
    assert "schedule:" in text["nightly"] and "make test-all" in text["nightly"]
