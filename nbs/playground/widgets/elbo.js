// The bound on a world of two pixels: x lies near a curve f(z), and q(z) = N(mean, std²) is yours to move.
// ELBO + KL(q ‖ p(z|x)) = log p(x), whatever q is. All integrals by the trapezoid rule, nats.
import { COLORS, Plot, gaussian, line, slider, svg, widthOf } from "./plot.js";

const NOISE = 0.35, X = [0.45, 0.8];
const f = (z) => [1.3 * Math.sin(1.9 * z), 0.7 * z];
const GRID = [...Array(1601).keys()].map((i) => -8 + i / 100), DZ = 0.01;

const logNormal = (z, mean, std) => -0.5 * ((z - mean) / std) ** 2 - Math.log(std * Math.sqrt(2 * Math.PI));
const logLikelihood = (z) => f(z).reduce((sum, value, i) => sum + logNormal(X[i], value, NOISE), 0);
const logJoint = (z) => logLikelihood(z) + logNormal(z, 0, 1);
const integrate = (values) => values.reduce((a, b) => a + b, 0) * DZ;

export const logP = Math.log(integrate(GRID.map((z) => Math.exp(logJoint(z)))));

// The terms of the bound for q = N(mean, std²).
export function terms(mean, std) {
  const q = GRID.map((z) => gaussian(z, mean, std));
  const reconstruction = integrate(GRID.map((z, i) => q[i] * logLikelihood(z)));
  const rate = 0.5 * (mean ** 2 + std ** 2 - 1) - Math.log(std);           // KL(q ‖ N(0, 1)), closed form
  const gap = integrate(GRID.map((z, i) => (q[i] ? q[i] * (logNormal(z, mean, std) - logJoint(z) + logP) : 0)));
  return { reconstruction, rate, elbo: reconstruction - rate, gap };
}

// A bar from log p(x) down: what of it is gap, and where the ELBO lies.
function drawBar(root) {
  const width = widthOf(root);
  const area = svg("svg", { viewBox: `0 0 ${width} 70`, role: "img", "aria-label": "ELBO and gap add up to log p(x)",
    style: "width:100%;height:auto;background:#fff;border-radius:4px" });
  root.append(area);
  const low = -16, x = (v) => 20 + ((width - 40) * (Math.max(low, v) - low)) / (logP - low);
  return ({ elbo, gap }) => area.replaceChildren(
    svg("rect", { x: x(low), y: 12, width: x(elbo) - x(low), height: 26, fill: COLORS.elbo }),
    svg("rect", { x: x(elbo), y: 12, width: Math.max(0, x(logP) - x(elbo)), height: 26, fill: COLORS.truePosterior }),
    svg("text", { x: 20, y: 60, "font-size": 16, fill: COLORS.elbo, "font-weight": 600 }, `ELBO ${elbo.toFixed(2)}`.replace("-", "−")),
    svg("text", { x: 0.47 * width, y: 60, "font-size": 16, fill: COLORS.truePosterior, "text-anchor": "middle", "font-weight": 600 },
      `+ gap ${gap.toFixed(2)}`),
    svg("text", { x: width - 20, y: 60, "font-size": 16, fill: COLORS.logP, "text-anchor": "end", "font-weight": 600 },
      `= log p(x) ${logP.toFixed(2)}${width < 500 ? "" : " nats"}`.replace("-", "−")));
}

export function mount(root) {
  const state = { mean: 0.8, std: Math.exp(-0.6) };
  const plot = new Plot(root, { label: "densities over z: the prior, the true posterior with two modes, and q", top: 1.3 });
  plot.curve(COLORS.prior)((z) => gaussian(z, 0, 1));
  plot.curve(COLORS.truePosterior, { fill: COLORS.truePosterior })((z) => Math.exp(logJoint(z) - logP));
  const drawQ = plot.curve(COLORS.posterior, { width: 3.5 });
  plot.legend([["prior p(z)", COLORS.prior], ["true posterior p(z|x)", COLORS.truePosterior], ["q(z), drag its top", COLORS.posterior]]);
  const moveHandle = plot.handle(COLORS.posterior, (z, p) => set({ mean: z, std: 1 / (Math.max(0.15, p) * Math.sqrt(2 * Math.PI)) }));
  const bar = drawBar(root), text = line(root);
  const showMean = slider(root, "mean of q", -2.5, 2.5, (mean) => set({ mean }));
  const showStd = slider(root, "width of q", 0.08, 2, (std) => set({ std }));
  function set(change) {
    Object.assign(state, change);
    state.mean = Math.max(-2.5, Math.min(2.5, state.mean));
    state.std = Math.max(0.08, Math.min(2, state.std));
    const found = terms(state.mean, state.std);
    drawQ((z) => gaussian(z, state.mean, state.std));
    moveHandle(state.mean, gaussian(state.mean, state.mean, state.std));
    showMean(state.mean);
    showStd(state.std);
    bar(found);
    text.textContent = (`E log p(x|z) ${found.reconstruction.toFixed(2)}, minus KL(q ‖ p(z)) ${found.rate.toFixed(2)}, ` +
      `is the ELBO; the gap is KL(q ‖ p(z|x)).`).replace("z) -", "z) −");
  }
  set({});
  root.terms = () => terms(state.mean, state.std);
}

for (const root of document.querySelectorAll("[data-widget=elbo]")) mount(root);
