"The theory: every displayed equation is labelled and asserted by a cell, every formula parses, every exercise is solved."
import ast
import json
import re
import subprocess
import unicodedata
from collections import Counter

import house
import pytest
from test_house import NBDEV, a_book, code_cells, source, statements

BOOKS = {p.relative_to(house.ROOT / "nbs").as_posix(): json.loads(p.read_text(encoding="utf-8")) for p in house.notebooks()}
THEORY = {name: book for name, book in BOOKS.items() if re.match(r"theory/(?!00)", name)}
PAGES = {name: book for name, book in BOOKS.items() if name.startswith("theory/")}
MATH = re.compile(r"(?<![\\$])\$\$(?P<displayed>.+?)\$\$(?:\s*\{#(?P<label>eq-[\w-]+)\})?"
                  r"|(?<![\\$])\$(?P<inline>(?:[^\s$\\]|\\.)(?:(?:[^$\\]|\\.)*?(?:[^\s$\\]|\\.))?)\$(?![\d$])", re.S)


# ---- equations and the cells that assert them; each rule takes a notebook and returns what is wrong with it


def prose(text):
    "Markdown without its code."
    return re.sub(r"```.*?```|`[^`\n]+`", "`", text, flags=re.S)


def labels(book):
    "Labels of displayed equations, each with the number of its cell."
    return [(m["label"], i) for i, cell in enumerate(book["cells"]) if cell["cell_type"] == "markdown"
            for m in MATH.finditer(prose(source(cell))) if m["label"]]


def checks(book):
    "What cells say they check: label, number of the cell, and whether a test run asserts anything there."
    run = {cell["id"]: runs(directives) and asserts(code) for cell, directives, code in code_cells(book)}
    for i, cell in enumerate(book["cells"]):
        for line in re.findall(r"# checks:(.*)$", source(cell), re.M) if cell["cell_type"] == "code" else []:
            yield from ((label.strip(), i, run[cell["id"]]) for label in line.split(","))


def runs(directives):
    return not set(NBDEV["tst_flags"].split()) & set(directives) and directives.get("eval") != "false"


def asserts(code):
    "Is there an assert that is reached (it stands in no function) and can fail (it is about something computed)?"
    nodes = list(statements(code))
    for node in nodes:  # grows while we walk
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)): nodes.extend(ast.iter_child_nodes(node))
    tests = [node.test for node in nodes if isinstance(node, ast.Assert)]
    return any(isinstance(part, (ast.Name, ast.Call)) for test in tests for part in ast.walk(test))


def equations_are_checked(book):
    found, said = dict(labels(book)), list(checks(book))
    for label, count in Counter(label for label, _ in labels(book)).items():
        if count > 1: yield f"{label}: labels {count} equations"
    for label, i in found.items():
        if not any(label == l and j > i and good for l, j, good in said):
            yield f"{label}: no cell after it says '# checks: {label}' and asserts it in a test run"
    for label in {l for l, _, _ in said} - set(found):
        yield f"'# checks: {label}': no equation of this notebook has that label"


def displayed_equations_are_labelled(book):
    for cell in book["cells"]:
        for m in MATH.finditer(prose(source(cell)) if cell["cell_type"] == "markdown" else ""):
            if m["displayed"] and not m["label"]: yield f"no label: $${m['displayed'].strip()[:60]} ..."


def references_resolve(book, others=None):
    "Quarto resolves @eq-x within a page; another page's equation is a link, [text](page.ipynb#eq-x)."
    here = dict(labels(book))
    for cell in book["cells"]:
        text = prose(source(cell)) if cell["cell_type"] == "markdown" else ""
        for label in re.findall(r"@(eq-[\w-]+)|\]\(#(eq-[\w-]+)\)", text):
            if (label[0] or label[1]) not in here: yield f"@{label[0] or label[1]}: no equation of this notebook has that label"
        for page, label in re.findall(r"\]\((?:[\w./-]*/)?([\w-]+\.ipynb)#(eq-[\w-]+)\)", text):
            there = [b for name, b in (others or {}).items() if name.split("/")[-1] == page]
            if not any(label in dict(labels(b)) for b in there): yield f"{page}#{label}: no such equation"


def exercises_are_solved(book):
    "After '## Predict, then run': three or more solutions that fold away, each with a cell that asserts it."
    text, after = "", None
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown": text += "\n" + source(cell)
        elif asserts(house.without_directives(source(cell))[1]): text += "\n[asserts]"
    _, _, after = text.partition("\n## Predict, then run")
    if not after: yield "no part '## Predict, then run'"; return
    folds = re.split(r"<details[^>]*>", after)[1:]
    if len(folds) < 3: yield f"expected three or more folded solutions, found {len(folds)}"
    for i, fold in enumerate(folds, 1):
        if "Solution</summary>" not in fold or "</details>" not in fold: yield f"solution {i} does not fold: {fold[:40]!r}"
        if "[asserts]" not in fold: yield f"solution {i}: no cell after it asserts it"


def reading_minutes(book):
    "Words in sight, divided by 200: prose and code that is not folded; neither solutions nor an appendix that folds away."
    words, folded = 0, False
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            for part in re.split(r"(<details.*?>|</details>)", source(cell)):
                if part.startswith("<details"): folded = True
                elif part == "</details>": folded = False
                elif not folded: words += len(part.split())
        elif not folded and not re.search(r"^#\| *(code-fold: *true|echo: *false|hide|export)\b", source(cell), re.M):
            words += len(source(cell).split())
    return words / 200


def reading_time_is_true(book):
    "A page says how long it takes: within a minute and a half of its words, and never more than 40 minutes."
    text = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown")
    stated = re.search(r"\*\*Reading time\*\*: about (\d+) minutes", text)
    if not stated: yield "no reading time"; return
    if abs(int(stated[1]) - reading_minutes(book)) > 1.5: yield f"says {stated[1]} minutes, has {reading_minutes(book):.1f}"
    if int(stated[1]) > 40: yield "longer than 40 minutes"


def checks_are_folded(book):
    "A cell that checks an equation folds away under a label, and has lines that can be read."
    for cell in book["cells"]:
        directives, code = house.without_directives(source(cell))
        if cell["cell_type"] != "code" or not re.search(r"^# checks:", code, re.M): continue
        if directives.get("code-fold") != "true" or not directives.get("code-summary"):
            yield f"{cell['id']}: a check without code-fold and code-summary"
        yield from (f"{cell['id']}: {len(line)} characters: {line[:60]}" for line in code.splitlines() if len(line) > 88)


def symbols(book):
    "The first column of the table of symbols, one formula each."
    rows = [row for cell in book["cells"] for row in re.findall(r"^\| *(\$.*?\$) *\|", source(cell), re.M)]
    return [symbol.strip() for row in rows for symbol in re.split(r",\\ |=", row.strip("$"))]


COVERAGE = [equations_are_checked, references_resolve]
RULES = [*COVERAGE, displayed_equations_are_labelled, exercises_are_solved]


@pytest.mark.parametrize("name", BOOKS)
def test_labelled_equations_are_asserted(name):
    found = [*equations_are_checked(BOOKS[name]), *references_resolve(BOOKS[name], BOOKS)]
    assert "\n".join(found) == ""


@pytest.mark.parametrize("name", PAGES)
def test_theory_labels_every_displayed_equation(name):
    assert "\n".join(displayed_equations_are_labelled(PAGES[name])) == ""


@pytest.mark.parametrize("name", [name for name in THEORY if "linear_vae" not in name])  # that page is a module, too
def test_theory_ends_with_exercises(name):
    assert "\n".join(exercises_are_solved(THEORY[name])) == ""


LEARNER = {name: book for name, book in BOOKS.items()   # those of the learner's path
           if re.match(r"tour|theory/(?!00)|data/04|model/|loss/|train/0[12]|analysis/", name)}
SIDEBAR = re.findall(r"- ((?:[\w-]+/)?[\w-]+\.ipynb)", (house.ROOT / "_quarto.yml").read_text(encoding="utf-8"))
BIBLIOGRAPHY = (house.ROOT / "nbs/references.bib").read_text(encoding="utf-8")
CITEKEYS = set(re.findall(r"^@\w+\{(\w+),", BIBLIOGRAPHY, re.M))


def is_framed(name, book):
    "Goals, needs and minutes at the top; a recap and the next page at the end."
    text = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown")
    top, _, end = text.partition("\n## What you can say now")
    for words in (r"\*\*(After this page you can|You will be able to)\*\*", r"\*\*You need\*\*"):
        if not re.search(words, top): yield f"no {words} at the top"
    if not end: yield "no '## What you can say now'"
    yield from reading_time_is_true(book)
    following = re.findall(r"Next:?\*{0,2}:? .*?\]\((?:\.\./)?([\w/]+\.ipynb)", end)
    after = [*SIDEBAR, None][SIDEBAR.index(name) + 1]
    if after and (not following or following[-1].split("/")[-1] != after.split("/")[-1]):
        yield f"next is {following[-1:]}, not {after}"


def helps_to_learn(book):
    "After the recap three kinds of exercise, and references."
    text = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown")
    end = text.partition("\n## What you can say now")[2]
    for words in (r"^## Predict, then run", r"<details", r"\*\*\d+\. To program", r"\*\*\d+\. Open"):
        if not re.search(words, end, re.M): yield f"no {words} after '## What you can say now'"
    yield from (f"@{key}: not in references.bib" for key in re.findall(r"@([a-z]+\d{4}\w*)", text) if key not in CITEKEYS)


CITED = re.compile(r"arxiv\.org/abs/([\w-]*/?[\d.]*\d)|doi\.org/([^\s)]+)|openreview\.net/forum\?id=([\w-]+)")


BY_NAME = re.compile(r"\b([A-Z](?:[^\W\d_]|['’-])+)(?:,? [A-Z]\.)*"
                     r"(?: et al\.|(?:,? (?:&|and)? ?[A-Z][\w'’-]+)+)?,? \(?((?:19|20)\d\d)\b")
VENUES = r"ICLR|ICML|NeurIPS|NIPS|CVPR|ICCV|AISTATS|TMLR|JMLR|Python|Debian"


def plain(text):
    "Without TeX's accents, and without others."
    text = re.sub(r"\\(?:o|O)\b|\{\\o\}", "o", re.sub(r"\\[\W]", "", text)).replace("ø", "o").replace("{", "").replace("}", "")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def entry_of(text):
    "Of an entry: its words, its year, and what a link to it contains."
    fields = dict(re.findall(r"^ *(\w+)\s*=\s*[{\"]?(.+?)[}\"]?,?$", text, re.M))
    return plain(text), fields["year"], [fields[key] for key in ("doi", "eprint", "url") if key in fields]


ENTRIES = [entry_of(text) for text in re.findall(r"^@\w+\{.*?^\}", BIBLIOGRAPHY, re.M | re.S)]


def not_in_bibliography(book):
    "What a page links to by a number of arXiv, DOI or OpenReview, or cites by name and year, and references.bib does not have."
    for cell in book["cells"]:
        for m in CITED.finditer(source(cell)) if cell["cell_type"] == "markdown" else []:
            if (m[1] or m[2] or m[3]).lower() not in BIBLIOGRAPHY.lower(): yield m[0]
        for m in BY_NAME.finditer(source(cell)):
            named = any(plain(m[1]) in entry and m[2] == year for entry, year, _ in ENTRIES)
            if not named and not re.search(VENUES, m[0]): yield m[0]


def is_without_link(book):
    "A page that cites by name and year has a link for each: where it cites, or in its references."
    text = "\n".join(source(cell) for cell in book["cells"])
    for name, year in {m.groups() for m in BY_NAME.finditer(text) if not re.search(VENUES, m[0])}:
        links = [link for entry, of, links in ENTRIES if of == year and plain(name) in entry for link in links]
        if not any(link.lower() in text.lower() for link in links): yield f"{name} {year}"


@pytest.mark.parametrize("name", BOOKS)
def test_what_a_page_cites_is_in_the_bibliography(name):
    assert [*not_in_bibliography(BOOKS[name])] == []


def test_what_the_bibliography_lacks_is_found():
    text = "[a](https://arxiv.org/abs/1312.6114), [b](https://arxiv.org/abs/1312.6115) and [c](https://doi.org/10.1/none)"
    assert [*not_in_bibliography(a_book(("markdown", text)))] == ["arxiv.org/abs/1312.6115", "doi.org/10.1/none"]
    text = "Kingma & Welling (2014), Kynkäänniemi et al. 2019, Nobody & Knows (2014)"
    assert [*not_in_bibliography(a_book(("markdown", text)))] == ["Nobody & Knows (2014"]


@pytest.mark.parametrize("name", [name for name in BOOKS if name not in ("index.ipynb", "theory/00_notation.ipynb")])
def test_a_page_has_its_frame(name):
    assert "\n".join([*is_framed(name, BOOKS[name]), *is_without_link(BOOKS[name])]) == ""


@pytest.mark.parametrize("name", LEARNER)
def test_a_page_helps_to_learn(name):
    assert "\n".join(helps_to_learn(LEARNER[name])) == ""


@pytest.mark.parametrize("name", PAGES)
def test_checks_are_folded(name):
    assert "\n".join(checks_are_folded(PAGES[name])) == ""


@pytest.mark.parametrize("name", BOOKS)
def test_a_folded_check_says_what_was_found(name):
    said = [house.without_directives(source(cell))[0].get("code-summary", "").strip('"') for cell in BOOKS[name]["cells"]]
    checks = [words for words in said if re.match("check|what is asserted", words, re.I)]
    assert [words for words in checks if not re.match("Check: .{12}", words)] == []


@pytest.mark.parametrize("part", [r"\*\*You need\*\*", "## Predict, then run", r"Next", "Open"])
def test_what_helps_to_learn_is_missed(part):
    name, book = next(iter(LEARNER.items()))
    cells = [cell | {"source": re.sub(part, "", source(cell))} for cell in book["cells"]]
    book = book | {"cells": cells}
    assert [*is_framed(name, book), *is_without_link(book), *helps_to_learn(book)]


def test_one_symbol_has_one_meaning():
    found = symbols(PAGES["theory/00_notation.ipynb"])
    assert len(found) >= 25 and [symbol for symbol, n in Counter(found).items() if n > 1] == []


def test_labels_are_unique_and_many():
    count = {name: len(labels(book)) for name, book in BOOKS.items()}
    print("\n".join(f"{n:3} labelled equations in {name}" for name, n in count.items() if n))
    owners = Counter(label for book in BOOKS.values() for label, _ in labels(book))
    assert [label for label, n in owners.items() if n > 1] == []
    assert sum(n for name, n in count.items() if name in THEORY) >= 60 and len(THEORY) >= 7


@pytest.mark.parametrize("name", PAGES)
def test_no_check_can_be_removed(name):
    book, found = PAGES[name], dict(labels(PAGES[name]))
    for label in found:
        rest = [cell for cell in book["cells"] if label not in [l for l, _, _ in checks(book | {"cells": [cell]})]]
        complaints = "\n".join(equations_are_checked(book | {"cells": rest}))
        assert f"{label}: no cell after it" in complaints


# ---- the rules can fail

EQUATION = ("markdown", "Then, by `$$`,\n\n$$\na = b\n$$ {#eq-a}\n\nand $$c$$ {#eq-c} follow; see @eq-a.")
CHECK = ("code", "# checks: eq-a, eq-c\nfor a in b:\n    assert a == 1")
EXERCISES = [("markdown", "## Predict, then run\nWhy?")] + 3 * [
    ("markdown", "<details><summary>Solution</summary>\nSo.\n</details>"), ("code", "assert f(1) == 2")]
GOOD = [EQUATION, CHECK, *EXERCISES]
WRONG = {
    "check removed": [EQUATION, *EXERCISES],
    "label not named": [EQUATION, ("code", CHECK[1].replace(", eq-c", "")), *EXERCISES],
    "no assert": [EQUATION, ("code", "# checks: eq-a, eq-c\na == b"), *EXERCISES],
    "assert that cannot fail": [EQUATION, ("code", "# checks: eq-a, eq-c\nassert 1"), *EXERCISES],
    "assert that is not reached": [EQUATION, ("code", "# checks: eq-a, eq-c\ndef f(): assert a == b"), *EXERCISES],
    "check that is not run": [EQUATION, ("code", "#| slow\n" + CHECK[1]), *EXERCISES],
    "check before the equation": [CHECK, EQUATION, *EXERCISES],
    "check of nothing": [*GOOD, ("code", "# checks: eq-b\nassert a == b")],
    "label twice": [("markdown", "$$a$$ {#eq-a}"), *GOOD],
    "no label": [("markdown", "$$a$$"), *GOOD],
    "reference to nothing": [("markdown", "as @eq-b says"), *GOOD],
    "link to nothing": [("markdown", "as [there](../theory/01_elbo.ipynb#eq-nowhere) said"), *GOOD],
    "no exercises": GOOD[:2],
    "two exercises": GOOD[:-2],
    "solution without a check": GOOD[:-1],
    "solution that does not fold": [*GOOD[:-2], ("markdown", "<details><summary>So</summary></details>"), GOOD[-1]],
}


def found_in(cells):
    book = a_book(*[(*cell[:2],) for cell in cells])
    return [line for rule in RULES for line in rule(book)]


def test_rules_pass_a_good_page():
    assert found_in(GOOD) == []


@pytest.mark.parametrize("name", WRONG)
def test_rules_catch(name):
    assert found_in(WRONG[name]) != []


TIMED = "**Reading time**: about 1 minutes.\n" + "word " * 200
FOLDED = '#| code-fold: true\n#| code-summary: "Check"\n# checks: eq-a\nassert a == b'


@pytest.mark.parametrize("cells, wrong", [
    ([("markdown", TIMED)], False),
    ([("markdown", TIMED + "word " * 400)], True),
    ([("markdown", TIMED + "<details>" + "word " * 400 + "</details>")], False),
    ([("markdown", TIMED), ("code", "a = 1 # " + "word " * 400)], True),
    ([("markdown", TIMED), ("code", "#| code-fold: true\na = 1 # " + "word " * 400)], False),
    ([("markdown", "no time")], True)])
def test_reading_time_is_counted(cells, wrong):
    assert bool([*reading_time_is_true(a_book(*cells))]) == wrong


@pytest.mark.parametrize("code, wrong", [
    (FOLDED, False), (FOLDED.replace("#| code-fold: true\n", ""), True), (FOLDED + "  # " + "x" * 88, True),
    (FOLDED.replace('#| code-summary: "Check"\n', ""), True), ("a = 1", False)])
def test_unfolded_checks_are_caught(code, wrong):
    assert bool([*checks_are_folded(a_book(("code", code)))]) == wrong


def test_symbols_are_read():
    table = "| symbol | meaning |\n|---|---|\n| $a,\\ b$ | two |\n| $c=\\log a$ | one |\n| $a$ | again |"
    assert symbols(a_book(("markdown", table))) == ["a", "b", "c", "\\log a", "a"]


# ---- LaTeX

NODE = """
const katex = require("katex"), formulas = JSON.parse(require("fs").readFileSync(0)), wrong = [];
for (const [place, tex, displayMode] of formulas)
  try { katex.renderToString(tex, { displayMode, throwOnError: true, strict: "error" }) }
  catch (error) { wrong.push(place + ": " + error.message) }
console.log(JSON.stringify(wrong))
"""


def formulas(book):
    "Every formula of a notebook's prose and captions: its cell, the LaTeX, and whether it is displayed."
    for cell in book["cells"]:
        text = prose(source(cell)) if cell["cell_type"] == "markdown" else \
            "\n".join(house.without_directives(source(cell))[0].get(key, "") for key in ("fig-cap", "fig-alt"))
        for m in MATH.finditer(text):
            number = r"\tag{1}" if m["label"] else ""  # Quarto numbers a labelled equation in this way
            yield cell["id"], (m["displayed"] or m["inline"]) + number, bool(m["displayed"])


def stray_dollars(book):
    for cell in book["cells"]:
        text = MATH.sub("", prose(source(cell))) if cell["cell_type"] == "markdown" else ""
        yield from (f"{cell['id']}: a $ that opens or closes nothing: {text[max(0, m.start() - 30):m.end() + 30]!r}"
                    for m in re.finditer(r"(?<!\\)\$", text))


def bars_in_tables(book):
    "A | within a formula would end the cell of a table; \\mid and \\Vert do not."
    for cell in book["cells"]:
        for row in re.findall(r"^\|.*$", source(cell), re.M) if cell["cell_type"] == "markdown" else []:
            yield from (f"{cell['id']}: | in a table: {m[0]}" for m in MATH.finditer(row) if "|" in m[0])


@pytest.fixture(scope="session")
def katex(katex_folder):
    "A function that returns what KaTeX, which draws the formulas of the site, objects to."
    def objections(found):
        done = subprocess.run(["node", "-e", NODE], cwd=katex_folder, input=json.dumps(found), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    return objections


def test_every_formula_parses(katex):
    found = [(f"{name} cell {cell}", *rest) for name, book in BOOKS.items() for cell, *rest in formulas(book)]
    print(len(found), "formulas")
    assert len(found) >= 100 and "\n".join(katex(found)) == ""


@pytest.mark.parametrize("name", BOOKS)
def test_dollars_are_formulas(name):
    assert [*stray_dollars(BOOKS[name]), *bars_in_tables(BOOKS[name])] == []


@pytest.mark.parametrize("text", [r"$\nosuch$", r"$$\frac{a}{$$", r"$$a \tag{1}$$ {#eq-a}", r"$a – b$", r"$a_b_c$"])
def test_katex_objects(text, katex):
    assert len(katex(list(formulas(a_book(("markdown", text)))))) == 1


@pytest.mark.parametrize("text", ["it is $ 5", "$a$ and $b", "| $a|b$ |"])
def test_dollar_rules_catch(text):
    book = a_book(("markdown", text))
    assert len([*stray_dollars(book), *bars_in_tables(book)]) == 1


def test_formulas_are_found():
    text = "A $x$, $a\\$b$, 'five \\$ and six', `$no$`, ($p(x)$) and $\\mu$.\n\n$$\ny\n$$ {#eq-y}\n\n$$z$$"
    cells = ("markdown", text), ("code", '#| fig-cap: "the $q$"\n#| fig-alt: "alt"\nf("$r$")')
    assert [tex for _, tex, _ in formulas(a_book(*cells))] == \
        ["x", "a\\$b", "p(x)", "\\mu", "\ny\n\\tag{1}", "z", "q"]
