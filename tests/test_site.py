"The pages of the site, as their notebooks store them: source in sight, lines that fit, figures that are described."
import json
import re

import house
import pytest

PAGES = {path.relative_to(house.ROOT / "nbs").as_posix(): json.loads(path.read_text(encoding="utf-8"))["cells"]
         for path in house.notebooks()}
NARROW = [page for page in PAGES if page.startswith(("model/", "loss/", "theory/"))]
CORE = [page for page in PAGES if page.startswith(("model/", "loss/"))]
WIDTH = 88
# Pages that still link names by hand, and have lines that do not fit: take a page out of here when it is mended.


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


def test_lines_of_theory_pages_fit():
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
