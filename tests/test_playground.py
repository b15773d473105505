"""The playground: a page that stands alone, and paints what PyTorch paints."""
import base64
import io
import json
import re
import time
from pathlib import Path

import numpy as np
import playground
import pytest
from PIL import Image

from vae_nb.plots import RECORDS

NBS = Path(__file__).parents[1] / "nbs"
PAGE = NBS / "playground"
MODEL = PAGE / "model"
SOURCES = [p for p in sorted(PAGE.rglob("*")) if p.suffix in (".js", ".mjs", ".html", ".css")
           and not {"node_modules", "ort"} & set(p.parts)]


def examples() -> np.ndarray:  # (E,S,S,3) uint8
    "What PyTorch decoded from the example latents."
    sheet = np.asarray(Image.open(MODEL / "examples.webp").convert("RGB"))
    return sheet.reshape(sheet.shape[0], -1, sheet.shape[0], 3).swapaxes(0, 1)


def need_engine():
    if not (PAGE / "ort" / "sizes.json").exists(): pytest.skip("npm packages are missing: npm ci --prefix nbs/playground")


def half(number) -> np.ndarray:
    "Numbers of the page's JSON."
    return np.frombuffer(base64.b64decode(number["half"]), "<f2").astype(np.float32).reshape(number["shape"])


def test_the_page_names_no_other_host():
    "No script, style, font or picture comes from elsewhere; SVG's namespace is a name, not an address."
    for path in SOURCES:
        found = re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", path.read_text(encoding="utf-8"))
        assert not [url for url in found if "www.w3.org" not in url], f"{path.name} names {found}"


def test_every_file_the_page_refers_to_exists():
    "src, href, import and new URL(..., import.meta.url); the engine's files, brought in by npm, are named once."
    missing = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        names = re.findall(r'(?:src|href)="([^"#:]+)"', text) if path.suffix == ".html" else []
        names += re.findall(r'from "(\.[^"]+)"', text) + re.findall(r'new URL\("([^"]+)", import\.meta\.url\)', text)
        for name in names:
            target = (path.parent / name).resolve()
            by_npm = any(target.is_relative_to(PAGE / folder) for folder in ("ort", "node_modules"))
            brought = by_npm or not target.is_relative_to(PAGE)
            if not target.exists() and not brought: missing.append(f"{path.name}: {name}")
    assert not missing
    brought = re.findall(r'"(ort[\w.-]+)"', (PAGE / "bring_engine.mjs").read_text())
    used = re.findall(r'"(ort-[\w.-]+|ort\.[\w.-]+)"', (PAGE / "worker.js").read_text())
    assert sorted(brought) == sorted(used)


def test_the_engine_is_pinned():
    wanted = json.loads((PAGE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    lock = (PAGE / "package-lock.json").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", wanted)
    assert json.loads(lock)["packages"]["node_modules/onnxruntime-web"]["version"] == wanted
    assert "resolved" not in lock, "the lock file names a registry"


def test_the_model_files_belong_together():
    facts = json.loads((MODEL / "latents.json").read_text())
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert sum(sizes) <= 12e6
    assert {path.stem: path.stat().st_size for path in MODEL.glob("*.onnx")} == facts["bytes"]
    assert set(facts["bytes"]) == {"encoder", "decoder", "prior"}
    D, E = facts["D"], len(facts["examples"]["factors"])
    assert D == np.prod(facts["latent"]) == len(facts["kl"])
    for name, shape in dict(mean=[D], std=[D], factor=[D, D]).items():
        assert half(facts[name]).shape == tuple(shape)
    spread = (half(facts["factor"]) ** 2).sum(1) ** 0.5
    np.testing.assert_allclose(spread, half(facts["std"]), rtol=2e-3)   # two roundings to 11 bits
    assert examples().shape == (E, facts["size"], facts["size"], 3)


def test_the_models_of_the_beta_slider_are_those_of_the_record():
    facts = json.loads((MODEL / "beta" / "beta.json").read_text())
    record = json.loads((RECORDS / "beta_sweep_cpu.json").read_text())
    first = [row for row in record["models"] if row["seed"] == 0]
    assert [row["beta"] for row in facts["models"]] == record["beta"] == [row["beta"] for row in first]
    for row, told in zip(facts["models"], first):
        for key in ("rate", "distortion", "psnr", "kl"):
            assert row[key] == told[key]
        assert (MODEL / "beta" / f"{row['decoder']}.onnx").stat().st_size == row["bytes"]


def test_the_card_says_what_was_measured():
    card = (PAGE.parents[1] / "vae_nb/weights/scenes/README.md").read_text(encoding="utf-8")
    record = json.loads((RECORDS / "playground_cpu.json").read_text())
    sizes = {name: f"{name} {(MODEL / f'{name}.onnx').stat().st_size / 1e6:.1f} MB" for name in ("encoder", "decoder", "prior")}
    assert all(size in card for size in sizes.values())
    assert f"decoded in {1000 / record['decodes_per_second']:.0f} ms" in card


def test_the_whole_page_is_small():
    need_engine()
    published = [path for path in PAGE.rglob("*") if path.is_file() and "node_modules" not in path.parts]
    size = sum(path.stat().st_size for path in published)
    assert size <= 25e6, f"{size / 1e6:.1f} MB"


def test_onnx_decodes_the_examples_as_pytorch_did():
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    facts = json.loads((MODEL / "latents.json").read_text())
    z = half(facts["examples"]["z"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(MODEL / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    x_hat, = session.run(None, {"z": z.reshape(-1, *facts["latent"])})
    pixels = np.round((x_hat.clip(-1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
    assert np.abs(pixels - examples()).max() <= 2


# ---- in a browser

@pytest.fixture
def served():
    "The folder of the notebooks over HTTP; `stop()` ends it."
    with playground.served() as server:
        yield server


SOFTWARE_CARD = ["--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-vulkan=swiftshader",
                 "--use-webgpu-adapter=swiftshader"]


@pytest.fixture
def browser(request):
    "Chromium; parametrized indirectly: with these flags."
    if not playground.CHROMIUM: pytest.skip("chromium is not installed")
    need_engine()
    from playwright import sync_api
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", *getattr(request, "param", [])]
        chromium = playwright.chromium.launch(executable_path=playground.CHROMIUM, args=flags)
        yield chromium
        chromium.close()


def opened(browser, served, engine="wasm", **options):
    "The page, ready; what it complained of; where it fetched from."
    page = browser.new_page(**{"viewport": dict(width=1280, height=900), **options})
    page.set_default_timeout(120_000)
    if engine == "webgpu":                                   # a card made of software is slower than the page waits
        page.set_default_timeout(500_000)
        patient = (PAGE / "engine.js").read_text().replace("20_000", "500_000")
        page.route("**/engine.js", lambda route: route.fulfill(body=patient, content_type="text/javascript"))
    complaints, hosts = [], set()
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else request.url[:5]))
    page.goto(f"{served.address}/playground/index.html?engine={engine}")
    page.wait_for_function("window.playground?.painted > 0")
    return page, complaints, hosts


def pixels(page, canvas="picture") -> np.ndarray:  # (S,S,3)
    "What a canvas shows."
    url = page.evaluate(f"document.getElementById('{canvas}').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(int)


def settled(page):
    "Wait until the picture shows the current z."
    page.wait_for_function("playground.shown && playground.shown.every((v, i) => v === playground.latent.z[i])")


def decoded(page) -> np.ndarray:  # (S,S,3)
    "What PyTorch makes of the page's current z."
    import torch

    from vae_nb.export import load_pretrained
    model, z = load_pretrained("scenes"), torch.tensor(page.evaluate("Array.from(playground.latent.z)"))
    with torch.no_grad(): x_hat = model.decode(z.view(1, *model.latent_shape))[0]
    return ((x_hat.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()


@pytest.mark.slow
def test_the_playground_in_chromium(browser, served, tmp_path):
    page, complaints, hosts = opened(browser, served)
    truth = examples().astype(int)
    for i in (0, 1, 5):                                      # equal to PyTorch
        page.locator("#examples button").nth(i).click()
        settled(page)
        assert np.abs(pixels(page) - truth[i]).max() <= 2
    page.wait_for_function("playground.engine.encoder && playground.engine.encoder.then(() => true)")
    served.stop()                                            # from here on there is no network
    before = pixels(page)
    page.locator("#factor-floor_hue").focus()
    for _ in range(3): page.keyboard.press("PageUp")         # a slider, by keyboard
    settled(page)
    assert np.abs(pixels(page) - before).mean() > 2 and np.abs(pixels(page) - decoded(page)).max() <= 2
    before = pixels(page)
    page.locator("#directions input").first.evaluate("s => { s.value = +s.value + 3; s.dispatchEvent(new Event('input')); }")
    settled(page)
    assert np.abs(pixels(page) - before).max() > 5 and np.abs(pixels(page) - decoded(page)).max() <= 2
    page.locator("#draw").click()                            # a sample, chosen
    page.locator("#from-learned button").first.click()
    settled(page)
    assert np.abs(pixels(page) - decoded(page)).max() <= 2
    page.locator("#set-b").click()                           # a path
    page.locator("#path").evaluate("s => { s.value = 1; s.dispatchEvent(new Event('input')); }")
    page.wait_for_function("document.getElementById('path-value').textContent === '1.00'")
    time.sleep(1)
    assert np.abs(pixels(page, "picture-t") - pixels(page)).max() <= 2
    Image.fromarray(truth[2].astype(np.uint8)).resize((300, 200)).save(tmp_path / "own.png")
    page.set_input_files("#file", tmp_path / "own.png")      # a picture of one's own
    page.wait_for_function("document.getElementById('own-facts').textContent.includes('nats')")
    settled(page)
    page.locator("#kl").focus()                              # a bar, by keyboard
    page.keyboard.press("ArrowRight")
    assert "number 2 by KL" in page.locator("#kl-picked").inner_text()
    rate = page.evaluate("""async () => {
      const { engine, latent } = playground, start = performance.now();
      for (let i = 0; i < 40; i++) await engine.decode(latent.z);
      return 40000 / (performance.now() - start); }""")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"\n{rate:.0f} decodes a second; first paint after {paint:.0f} ms, decoder ready after "
          f"{page.evaluate('playground.ready'):.0f} ms, on {page.evaluate('playground.engine.provider')}")
    assert hosts == {served.address.split("/")[2]} and not complaints
    assert rate > 2 and paint < 3000


@pytest.mark.slow
def test_the_slider_of_beta(browser, served):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    page, complaints, _ = opened(browser, served)
    facts = json.loads((MODEL / "beta" / "beta.json").read_text())
    for stop in (5, 0):
        model = facts["models"][stop]
        page.locator("#beta").evaluate("(s, i) => { s.value = i; s.dispatchEvent(new Event('input')); }", stop)
        page.wait_for_function("start => document.getElementById('beta-facts').textContent.startsWith(start)",
                               arg=f"β = {model['beta']}:")
        session = onnxruntime.InferenceSession(MODEL / "beta" / f"{model['decoder']}.onnx", providers=["CPUExecutionProvider"])
        x_hat, = session.run(None, {"z": half(model["mu"])})
        wanted = np.round((x_hat.clip(-1, 1) + 1) * 127.5).transpose(2, 0, 3, 1).reshape(facts["size"], -1, 3)
        page.evaluate("document.querySelectorAll('#beta-rows canvas')[1].id = 'beta-mean'")
        assert np.abs(pixels(page, "beta-mean") - wanted).max() <= 2
        bars = page.evaluate("[...document.querySelectorAll('#beta-kl i')].map((bar) => parseFloat(bar.style.height))")
        assert bars == sorted(bars, reverse=True) and (bars[3] > 20) == (stop == 0)
    assert not complaints


@pytest.mark.slow
@pytest.mark.parametrize("browser", [SOFTWARE_CARD], indirect=True, ids=["software_card"])
def test_a_graphics_card_decodes_as_pytorch_does(browser, served):
    probe = browser.new_page()
    probe.goto(f"{served.address}/playground/style.css")
    if not probe.evaluate("navigator.gpu?.requestAdapter().then((adapter) => Boolean(adapter))"):
        pytest.skip("Chromium has no WebGPU here")
    page, _, _ = opened(browser, served, engine="webgpu")
    settled(page)
    assert page.evaluate("playground.engine.provider") == "webgpu"
    assert np.abs(pixels(page) - examples()[0]).max() <= 2


@pytest.mark.slow
def test_the_learned_prior_carries_noise_as_pytorch_does(browser, served):
    import torch

    from vae_nb.analysis.flow import integrate
    from vae_nb.export import load_pretrained
    page, complaints, _ = opened(browser, served)
    eps, z = page.evaluate("""async () => {
      const { sampleFlow, normals } = await import("./prior.js"), { engine, facts } = playground;
      const eps = normals(2 * facts.D, 7), start = performance.now();
      const z = await sampleFlow(engine, facts, eps, 0.9);
      playground.seconds = performance.now() - start;
      return [Array.from(eps), Array.from(z)]; }""")
    prior = load_pretrained("scenes").prior
    shape = (2, *prior.latent_shape)
    with torch.no_grad():
        wanted = prior.unstandardize(integrate(prior.velocity, 0.9 * torch.tensor(eps).view(shape), 8)).flatten()
    print(f"\n8 steps for 2 latents: {page.evaluate('playground.seconds'):.0f} ms")
    assert np.abs(np.asarray(z) - wanted.numpy()).max() < 0.01 and not complaints


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(browser, served, width, scheme):
    page, complaints, _ = opened(browser, served, viewport=dict(width=width, height=900), color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 27)"}[scheme]
    other = {"light": "alternate", "dark": "default"}[scheme]        # what the toggle of the site keeps
    page.evaluate("choice => { localStorage.setItem('quarto-color-scheme', choice); setTheme(); }", other)
    assert page.evaluate(ground) == {"light": "rgb(20, 24, 27)", "dark": "rgb(255, 255, 255)"}[scheme]
    assert not complaints


def trained(eigenvalues, beta, s) -> tuple[float, float]:
    "Nats and squared error of the library's best linear VAE, on data with these eigenvalues."
    import torch

    from vae_nb.model.distributions import gaussian_kl
    from vae_nb.model.linear_vae import LinearVAE
    noise = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)).double()
    x = torch.linalg.qr(noise - noise.mean(0))[0] * 8 * torch.tensor(eigenvalues).double().sqrt()
    model = LinearVAE.fit(x, 11, beta, s)
    mu, logvar = model.optimal_q(x, beta)
    x_hat = model.mean + mu @ model.W.T
    spread = (model.W**2 * logvar.exp().mean(0)).sum()                      # of the decoder's output, z drawn from q
    return gaussian_kl(mu, logvar).sum(1).mean().item(), ((x - x_hat)**2).sum(1).mean().item() + spread.item()


@pytest.mark.slow
def test_the_widgets_in_chromium(browser, served):
    "ELBO + gap = log p(x), for a q that nobody chose; KL as in the library; a drag moves q."
    import torch

    from vae_nb.model.distributions import gaussian_kl
    for name in ("elbo", "two_gaussians", "water_level"):
        page = browser.new_page(viewport=dict(width=700, height=700))
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))  # noqa: B023
        page.goto(f"{served.address}/playground/widgets/{name}.html")
        text = page.locator(".widget p")
        before = text.inner_text()
        box = page.locator("svg line" if name == "water_level" else "svg circle").last.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] - 80, box["y"] + 40)
        page.mouse.up()
        assert text.inner_text() != before and not complaints
        if name == "elbo":
            found = page.evaluate("""import('./elbo.js').then(({ terms, logP }) =>
              [[0.8, 0.55], [-1.3, 0.2], [0.1, 1.7]].map(([m, s]) => ({ ...terms(m, s), logP })))""")
            for row in found:
                assert row["elbo"] + row["gap"] == pytest.approx(row["logP"], abs=1e-4)
                assert row["gap"] > 0
        elif name == "water_level":
            eigenvalues = page.evaluate("import('./water_level.js').then(({ EIGENVALUES }) => EIGENVALUES)")
            text = (NBS / "theory/09_collapse.ipynb").read_text(encoding="utf-8")
            told = json.loads(re.search(r"lam = torch.tensor\((\[[^]]*\])\)", text)[1])
            assert eigenvalues == told                        # those of the page that it stands on
            for beta, s in ((1, 0.5), (8, 0.3), (20, 1.5)):
                found = page.evaluate(f"import('./water_level.js').then(({{ optimum }}) => optimum({beta}, {s}))")
                rate, error = trained(eigenvalues, beta, s)
                assert found["rate"] == pytest.approx(rate, abs=1e-6) and found["error"] == pytest.approx(error, abs=1e-6)
        else:
            found = page.evaluate("import('./two_gaussians.js').then(({ kl }) => kl(1.2, 0.5, -0.3, 0.8))")
            mine = gaussian_kl(torch.tensor(1.2), torch.tensor(0.25).log(), torch.tensor(-0.3), torch.tensor(0.64).log())
            assert found == pytest.approx(float(mine), abs=1e-5)
        page.close()
