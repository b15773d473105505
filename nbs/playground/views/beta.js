// Six small models that differ in beta alone, on one slider: what reaches the decoder, and what N(0, I) gives.
import { newestOnly } from "../engine.js";
import { unpack } from "../latents.js";
import { element, toPixels } from "../paint.js";
import { normals } from "../prior.js";
import { slider } from "./slider.js";

const $ = (id) => document.getElementById(id);
const here = new URL("../model/beta/", import.meta.url);

async function load() {
  const facts = await (await fetch(new URL("beta.json", here))).json();
  for (const model of facts.models) Object.assign(model, { mu: unpack(model.mu), std: unpack(model.std) });
  const sheet = new Image();
  sheet.src = new URL("beta.webp", here);
  await sheet.decode();
  return { ...facts, sheet };
}

// One row of n pictures, on one canvas.
function row({ n, size }, label) {
  const canvas = element("canvas", { width: n * size, height: size, role: "img", ariaLabel: label });
  $("beta-rows").append(element("span", {}, label), canvas);
  return canvas.getContext("2d");
}

export function showBeta({ engine }) {
  let seed = 1;
  async function start() {
    const facts = await load(), { n, D, size, models } = facts;
    const open = opener(engine, D), top = Math.max(...models.flatMap((model) => model.kl));
    row(facts, "x").drawImage(facts.sheet, 0, 0);
    const rows = ["x̂ from the mean of q(z|x)", "x̂ from a draw of q(z|x)", "sample: z from N(0, I)"].map((label) => row(facts, label));
    const bars = models[0].kl.map(() => element("i"));
    $("beta-kl").append(...bars);

    const show = newestOnly(async (i) => {
      const { beta, decoder, rate, distortion, psnr, kl, mu, std } = models[i];
      await open(decoder);
      const eps = normals(2 * n * D, seed);
      const drawn = mu.map((m, k) => m + std[k] * eps[k]);
      const x_hat = await engine.decode([...mu, ...drawn, ...eps.slice(n * D)], `beta/${decoder}`);
      rows.forEach((context, r) => {
        for (let k = 0; k < n; k++) context.putImageData(toPixels(x_hat, size, r * n + k), k * size, 0);
      });
      [...kl].sort((a, b) => b - a).forEach((nats, d) => { bars[d].style.height = `${Math.max(1, 100 * nats / top)}%`; });
      const active = kl.filter((nats) => nats > 0.1).length;
      $("beta-facts").textContent = `β = ${beta}: ${rate.toFixed(1)} nats a picture, ${active} of ${D} dimensions carry more than 0.1 of ` +
        `them; |x̂ − x| adds up to ${distortion.toFixed(0)} (${psnr.toFixed(1)} dB). Averages over 3,000 unseen scenes.`;
    });
    const control = slider({ label: "β", min: 0, max: models.length - 1, step: 1, value: 1,
      format: (i) => String(models[i].beta), onInput: show });
    control.input.id = "beta";
    $("beta-slider").append(control.node);
    $("beta-draw").onclick = () => { seed++; show(+control.input.value); };
    await show(1);
    for (const { decoder } of models) await open(decoder);      // the others, while the reader looks
  }
  return { ready: () => engine.encoder.finally(start).catch((error) => { $("beta-facts").textContent = error.message; }) };
}

// Opens every decoder once.
function opener(engine, D) {
  const opened = {};
  return (name) => opened[name] ??= engine.open(`beta/${name}`, [D]);
}
