// KL of every dimension as bars, largest first; choose one to move it.
import { dimensionSlider, place } from "./directions.js";

const $ = (id) => document.getElementById(id);

export function showKL(page) {
  const { facts, latent } = page, canvas = $("kl"), order = facts.byKL, top = facts.kl[order[0]];
  let picked = 0, chosen = null;
  const total = facts.kl.reduce((a, b) => a + b, 0), active = facts.kl.filter((v) => v > 0.1).length;
  $("kl-note").textContent = `KL(q(z|x) ‖ N(0, I)) of each of the ${facts.D} dimensions, averaged over scenes, in nats: ` +
    `${total.toFixed(0)} in all, and ${active} dimensions carry more than 0.1. Choose a bar (or use the arrow keys) to move its dimension; ` +
    `a picture of your own adds its marks.`;

  function draw() {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    context.scale(ratio, ratio);
    const own = page.own?.kl, high = own ? Math.max(top, ...own) : top;
    const bottom = height - 18, step = width / facts.D, y = (v) => bottom - (bottom - 16) * Math.max(0, v) / high;
    context.fillStyle = colour("--posterior");
    order.forEach((d, i) => context.fillRect(i * step, y(facts.kl[d]), Math.max(1, step - 0.6), bottom - y(facts.kl[d])));
    if (own) {
      context.fillStyle = colour("--yours");
      order.forEach((d, i) => context.fillRect(i * step, y(own[d]) - 1, Math.max(1.5, step), 2));
    }
    context.fillStyle = colour("--text");
    context.fillRect(picked * step, 0, Math.max(2, step), bottom);
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("--soft");
    context.fillText(`${high.toFixed(1)} nats`, Math.min(width - 60, picked * step > 70 ? 0 : picked * step + 8), 12);
    context.fillText("dimensions, by KL", 0, height - 3);
    if (own) { context.fillStyle = colour("--yours"); context.fillText("your picture", width - 80, height - 3); }
  }

  function pick(i) {
    picked = Math.max(0, Math.min(facts.D - 1, i));
    const d = order[picked];
    canvas.setAttribute("aria-valuemax", facts.D);
    canvas.setAttribute("aria-valuenow", picked + 1);
    $("kl-picked").textContent = `${place(facts, d)}, number ${picked + 1} by KL: ${facts.kl[d].toFixed(2)} nats` +
      (page.own ? `, ${page.own.kl[d].toFixed(2)} in your picture` : "");
    chosen = dimensionSlider(page, d, "kl");
    $("kl-slider").replaceChildren(chosen.node);
    draw();
  }

  const at = (event) => pick(Math.floor((event.offsetX / canvas.clientWidth) * facts.D));
  canvas.onpointerdown = at;
  canvas.onpointermove = (event) => event.buttons && at(event);
  canvas.onkeydown = (event) => {
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 16, PageDown: -16, Home: -facts.D, End: facts.D };
    if (!(event.key in steps)) return;
    event.preventDefault();
    pick(picked + steps[event.key]);
  };
  pick(0);
  latent.onChange((z, from) => { if (from !== "kl") chosen.follow(z); if (from === null) pick(picked); });
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("storage", draw);
  return { ready() {} };
}
