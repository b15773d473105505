// The page: one latent z, and views that show and move it.
import { Engine, newestOnly } from "./engine.js";
import { loadLatents } from "./latents.js";
import { paint } from "./paint.js";
import { showExamples } from "./views/examples.js";
import { showFactors } from "./views/factors.js";
import { showDirections } from "./views/directions.js";
import { showSamples } from "./views/samples.js";
import { showPath } from "./views/path.js";
import { showOwn } from "./views/own.js";
import { showKL } from "./views/kl.js";
import { showBeta } from "./views/beta.js";

const $ = (id) => document.getElementById(id);

// The state of the page: the current z. Views register and are told who changed it.
class Latent {
  constructor(z) { this.z = z; this.views = []; }
  onChange(view) { this.views.push(view); view(this.z, null); }
  set(z, from, about) {
    this.z = Float32Array.from(z);
    if (about !== undefined) $("caption").textContent = about;
    for (const view of this.views) view(this.z, from);
  }
}

function showProgress(engine) {
  engine.onProgress = (loaded, total) => {
    $("progress").value = Math.min(1, loaded / total);
    $("status").textContent = loaded < total ? `loading the decoder: ${(loaded / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`
      : "starting the decoder…";
  };
}

async function main() {
  const started = performance.now();
  const facts = await loadLatents();
  const latent = new Latent(facts.exampleZ[0]);
  await showExamples(facts, latent);                     // a picture at once, before any network is here
  const engine = new Engine(facts);
  showProgress(engine);
  const page = { engine, facts, latent };

  showFactors(page);
  showDirections(page);
  const views = [showSamples(page), showPath(page), showOwn(page), showKL(page), showBeta(page)];
  $("facts").textContent = `${(facts.parameters / 1e6).toFixed(1)} million parameters, z has ${facts.D} dimensions ` +
    `(${facts.latent.join("×")}), pictures of ${facts.size}×${facts.size}. Statistics from ${facts.images.toLocaleString("en")} ` +
    `training scenes; on ${facts.held_out} held-out ones the factors explain ` +
    `${(100 * facts.explained).toFixed(0)} % of the variance of the posterior means. ${facts.note}`;

  await engine.start(new URLSearchParams(location.search).get("engine") ?? undefined);
  $("loading").hidden = true;
  const decodeNewest = newestOnly(async (z) => {
    const x_hat = await engine.decode(z);
    paint($("picture"), x_hat, facts.size);
    page.painted = (page.painted ?? 0) + 1;
    page.shown = z;
  });
  latent.onChange(decodeNewest);
  for (const view of views) view.ready();
  page.ready = performance.now() - started;
  window.playground = page;                              // for tests, and for a curious console
}

main().catch((error) => {
  $("loading").hidden = false;
  $("progress").hidden = true;
  $("status").textContent = `The decoder could not be started: ${error.message}`;
  console.error(error);
});
