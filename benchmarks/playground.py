r"""How fast does the decoder run in a browser? The playground in headless Chromium, served from this machine.

    npm ci --prefix nbs/playground
    python benchmarks/playground.py                     a minute on a quiet machine

The processor's engine (WebAssembly, one thread), as a page of a static host has it. playground_cpu.json has the time to the first
paint, the time until the decoder is ready, decodes a second (the median of --rounds of --decodes each) and the bytes of the page.
"""
import argparse
import contextlib
import functools
import shutil
import statistics
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from record import RESULTS, header, save

NBS = Path(__file__).parents[1] / "nbs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RATE = """async (n) => {
  const { engine, latent } = playground, start = performance.now();
  for (let i = 0; i < n; i++) await engine.decode(latent.z);
  return 1000 * n / (performance.now() - start);
}"""


class Quiet(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}
    def log_message(self, *args): pass


@contextlib.contextmanager
def served(folder=NBS):
    "The plain folder over HTTP, from this machine; its address is in `address`, and `stop()` ends it before the block does."
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.stop = lambda: (server.shutdown(), server.server_close())
    try:
        yield server
    finally:
        if server.socket.fileno() >= 0: server.stop()


def wait_until_idle(page):
    "Everything that the page does of itself is done: for two seconds, nothing waits for the engine."
    quiet = 0
    while quiet < 10:
        page.wait_for_timeout(200)
        quiet = quiet + 1 if page.evaluate("playground.engine.waiting.size === 0") else 0


def measured(page, address, given):
    "What the page tells of itself."
    page.goto(f"{address}/playground/index.html?engine=wasm")
    page.wait_for_function("window.playground?.painted > 0")
    wait_until_idle(page)
    rates = [round(page.evaluate(RATE, given.decodes), 1) for _ in range(given.rounds)]
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    return dict(engine=page.evaluate("playground.engine.provider"), first_paint_ms=round(paint),
                ready_ms=round(page.evaluate("playground.ready")), decodes_per_second=statistics.median(rates), rates=rates)


def main():
    from playwright.sync_api import sync_playwright
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decodes", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    given = parser.parse_args()
    with served() as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(120_000)
        found = dict(browser=f"Chromium {browser.version}", **measured(page, server.address, given))
        browser.close()
    published = [path for path in (NBS / "playground").rglob("*") if path.is_file() and "node_modules" not in path.parts]
    found["megabytes"] = round(sum(path.stat().st_size for path in published) / 1e6, 1)
    command = f"python benchmarks/playground.py --decodes {given.decodes} --rounds {given.rounds}"
    save(header("cpu", command=command, **found), "playground", "cpu", given.out)
    print(found)


if __name__ == "__main__":
    main()
