"The pages of the site, as their notebooks store them: source in sight, lines that fit, figures that are described."
import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import house
import pytest
import yaml
from PIL import Image
from playground import CHROMIUM
from test_theory import MATH, prose

PAGES = {path.relative_to(house.ROOT / "nbs").as_posix(): json.loads(path.read_text(encoding="utf-8"))["cells"]
         for path in house.notebooks()}
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
    return unseen or bool(said & {"hide", "default_exp", "export", "exporti"})


def has_figure(cell):
    kinds = [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]
    return any(kind.startswith("image/") for kind in kinds)


def too_wide(page):
    "Lines of code, shown, folded or in a fence, that do not fit; what a program printed wraps."
    shown = [cell for cell in PAGES[page] if cell["cell_type"] == "code" and not hidden(cell)]
    lines = [(cell["id"], line) for cell in shown for line in code(cell)]
    for cell in PAGES[page]:
        if cell["cell_type"] == "markdown":
            fences = re.findall(r"^```\w*\n(.*?)^```", source(cell), re.S | re.M)
            lines += [(cell["id"], line) for text in fences for line in text.splitlines()]
    return [f"{page} {id}: {len(line)} {line.strip()[:50]}" for id, line in lines if len(line) > WIDTH]


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


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit(page):
    assert not too_wide(page)


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
    "Pages as nbdev's own processors hand them to Quarto, in a process that starts in the root: kind, source, output, metadata."
    code = """
import sys, json
sys.path[:] = [p for p in sys.path if p]
import house
from fastcore.nbio import read_nb
from nbdev.processors import FilterDefaults
pages = {}
for page in ("theory/00_notation", "model/01_distributions"):
    book = read_nb(f"nbs/{page}.ipynb")
    FilterDefaults()(book)
    said = [next(("".join(o.data.get("text/markdown", "")) for o in c.get("outputs", []) if "data" in o), "") for c in book.cells]
    pages[page] = [[c.cell_type, c.source, text, dict(c.metadata)] for c, text in zip(book.cells, said)]
print(json.dumps(pages))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True,
                          env=house.plain_environment(PYTHONPATH=f"{house.ROOT}:{house.ROOT / 'tests'}"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_page_has_one_badge_under_its_title(processed):
    address = "https://colab.research.google.com/github/vae-nb/vae_nb/blob/main/nbs/theory/00_notation.ipynb"
    cells = processed["theory/00_notation"]
    badges = [(i, text) for i, (_, text, *_) in enumerate(cells) if "colab.research.google.com" in text]
    assert badges == [(1, f"[Open in Colab]({address}){{.colab}}")]
    assert ".colab" in (house.ROOT / "nbs/styles.css").read_text(encoding="utf-8")


def test_what_the_title_s_cell_goes_on_to_say_reaches_the_site(processed):
    "nbdev keeps of that cell only the title and the summary."
    for page, cells in processed.items():
        said = source(PAGES[f"{page}.ipynb"][0]).split("\n\n", 2)[2]
        assert cells[2][0] == "markdown" and cells[2][1].split()[:8] == said.split()[:8]


def test_the_cell_that_installs_is_not_shown(processed):
    cells = processed["theory/00_notation"]
    assert not [text for _, text, *_ in cells if "find_spec" in text or "%pip" in text]
    assert [text for kind, text, *_ in cells if kind == "code"]


def test_names_stand_above_their_source_and_in_the_contents(processed):
    cells = processed["model/01_distributions"]
    assert not [meta for *_, meta in cells if "execution" in meta], "Quarto would box the cell, and its heading is not listed"
    at = next(i for i, (_, text, *_) in enumerate(cells) if re.search(r"^class Posterior", text, re.M))
    names = [re.search(r"show_doc\((\w+)\)", text)[1] for _, text, *_ in cells[at - 2:at]]
    assert names == ["normal", "Posterior"]
    said = cells[at - 1][2]
    assert "### Posterior" in said and "```" not in said and "[]{#posterior.sample}" in said
    assert "Exported source" not in "".join(text for _, text, *_ in cells)


def test_a_check_leads_to_the_equations_of_its_page(processed):
    cells = processed["model/01_distributions"]
    after = [follows[1] for (kind, text, *_), follows in zip(cells, cells[1:]) if kind == "code" and "# checks: eq-" in text]
    labels = set(re.findall(r"\{#(eq-[\w-]+)", "".join(text for kind, text, *_ in cells if kind == "markdown")))
    assert after and all(line.endswith("{.asserted}") for line in after)
    assert {name for line in after for name in re.findall(r"\(\[-@(eq-[\w-]+)\]\)", line)} <= labels


@pytest.mark.parametrize("page", PAGES)
def test_nbdev_and_quarto_can_build_a_page(page):
    "nbdev looks at the cell after one that exports; Quarto refuses an option that is given twice."
    assert "exports" not in flags(PAGES[page][-1])
    for cell in PAGES[page]:
        names = [flag.split(":")[0] for flag in flags(cell) if ":" in flag] if cell["cell_type"] == "code" else []
        assert len(names) == len(set(names)), cell["id"]


@pytest.mark.slow
def test_every_page_is_processed(tmp_path):
    "In a copy of the tree, by the command that nbdev-docs begins with, as the workflow calls it."
    copy = tmp_path / "copy"
    for name in ("nbs", "tests", "vae_nb", "benchmarks"):
        left_out = shutil.ignore_patterns("node_modules", "__pycache__", "runs")
        shutil.copytree(house.ROOT / name, copy / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md", "_quarto.yml"):
        shutil.copy(house.ROOT / name, copy)
    steps = yaml.safe_load((house.ROOT / ".github/workflows/docs.yaml").read_text(encoding="utf-8"))["jobs"]["build"]["steps"]
    [given] = [step["env"] for step in steps if step.get("run") == "nbdev-docs"]
    command = Path(sys.executable).with_name("nbdev-proc-nbs")   # the environment need not be on the PATH
    done = subprocess.run([command, "--n-workers", "2"], cwd=copy, capture_output=True, text=True,
                          env=house.plain_environment(**given))
    assert done.returncode == 0, done.stderr[-2000:]
    pages = {page.relative_to(copy / "_proc").as_posix(): json.loads(page.read_text(encoding="utf-8"))["cells"]
             for page in (copy / "_proc").rglob("*.ipynb")}
    assert set(pages) == set(PAGES)
    for page, cells in pages.items():
        for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
            names = [flag.split(":")[0] for flag in flags(cell) if ":" in flag]
            assert len(names) == len(set(names)), f"{page}: an option twice: {names}"
            assert "__main__." not in json.dumps(cell["outputs"]), page


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


def test_pages_for_machines_lead_to_each_other(tmp_path):
    page = tmp_path / "vae.html.md"
    kept = "[a](https://github.com/x/01_a.ipynb) [b](02_b.png) `x.ipynb`"
    page.write_text(f"[l](../loss/01_objective.ipynb#units) [m](02_layers.ipynb) {kept}", encoding="utf-8")
    house.link_machines(tmp_path)
    assert page.read_text(encoding="utf-8") == f"[l](../loss/objective.html.md#units) [m](layers.html.md) {kept}"


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


# ---- colours that can be read (WCAG 2)


BEHIND = dict(light=("#ffffff", "#f8f9fa"), dark=("#222222", "#434343"))   # Quarto's cosmo and darkly: page, and code or crumbs


def contrast(a, b):
    "From 1 to 21."
    def luminance(color):
        color = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        parts = [int(color[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def colors(style):
    "(theme, selector, colour) of every colour of text that a stylesheet sets; a rule of no theme holds on light pages."
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", re.sub(r"/\*.*?\*/", "", style, flags=re.S)):
        for color in re.findall(r"(?<![\w-])color:\s*(#\w+)", body):
            yield "dark" if ".quarto-dark" in selectors else "light", selectors.strip(), color


def test_text_has_contrast():
    found = list(colors((house.ROOT / "nbs/styles.css").read_text(encoding="utf-8")))
    pale = [(selector, color) for theme, selector, color in found for behind in BEHIND[theme] if contrast(color, behind) < 4.5]
    assert len(found) >= 5 and not pale
    assert {theme for theme, *_ in found} == {"light", "dark"}
    assert contrast(QUARTO["website"]["navbar"]["background"], "#ffffff") > 4.5
    assert round(contrast("#767676", "#fff"), 2) == 4.54 and contrast("#777777", "#fff") < 4.5   # known values


# ---- what a browser makes of them: KaTeX from npm, Chromium, no Quarto


EM = 17   # Quarto's base size, pixels
COLUMN = 1280 - 6 * EM - sum(int(QUARTO["format"]["html"]["grid"][key][:-2]) for key in ("sidebar-width", "margin-width"))
NUMBER = 45   # room for the number of an equation


def equations(page):
    "(label or None, TeX) of every displayed equation."
    for cell in PAGES[page]:
        if cell["cell_type"] == "markdown":
            yield from ((m["label"], m["displayed"]) for m in MATH.finditer(prose(source(cell))) if m["displayed"])


WIDTHS = """all => Promise.all([document.fonts.ready]).then(() => all.map(([label, tex]) => {
  const place = document.body.appendChild(document.createElement("div"));
  katex.render(tex, place, {displayMode: true});
  const parts = [...place.querySelectorAll(".katex-html > .base")].map(part => part.getBoundingClientRect());
  const width = Math.max(...parts.map(p => p.right)) - Math.min(...parts.map(p => p.left));
  place.remove();
  return width;
}))"""


@pytest.fixture(scope="module")   # two of Playwright's at a time do not go
def widths(katex_folder, tmp_path_factory):
    "A function that gives the width in pixels of equations (label, TeX), as KaTeX lays them out in Chromium."
    from playwright import sync_api
    if not CHROMIUM: pytest.skip("chromium is not installed")
    folder, dist = tmp_path_factory.mktemp("katex"), katex_folder / "node_modules/katex/dist"
    (folder / "page.html").write_text(f"<!doctype html><link rel='stylesheet' href='{dist}/katex.min.css'><script src='{dist}/"
                                      f"katex.min.js'></script><style>body {{ font: {EM}px sans-serif; width: 9000px }}</style>")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((folder / "page.html").as_uri())
        page.evaluate("""() => { const text = "\\\\frac12\\\\sum x \\\\mathcal{L} \\\\mathbb E \\\\Big( \\\\mathbf z";
            katex.render(text, document.body, {displayMode: true});
            return document.fonts.ready.then(() => { document.body.textContent = ""; }) }""")
        yield lambda all: page.evaluate(WIDTHS, all)
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(equations(page))])
def test_no_equation_is_wider_than_its_column(page, widths):
    found = list(equations(page))
    room = [COLUMN - NUMBER * bool(label) for label, _ in found]
    assert [f"{label or tex[:40]}: {width:.0f} of {most}" for (label, tex), width, most in zip(found, widths(found), room)
            if width > most] == []


@pytest.mark.slow
def test_a_wide_equation_is_found(widths):
    narrow, wide = widths([[None, "x"], [None, "+".join("abcdefghijkl" * 5)]])
    assert narrow < 20 and wide > COLUMN


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
    steps = ("npm ci --prefix nbs/playground", "house.py llms", "nbdev-docs", "house.py links", "deploy-pages")
    order = [text["docs"].index(step) for step in steps]
    assert order == sorted(order)
    assert "schedule:" in text["nightly"] and "make test-all" in text["nightly"]
