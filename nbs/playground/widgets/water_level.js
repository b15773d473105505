// Which dimensions of a linear VAE are active? Those whose eigenvalue is above βs². The bars are the eigenvalues of the page's data.
import { COLORS, line, slider, svg, widthOf } from "./plot.js";

export const EIGENVALUES = [4, 2.4, 1.4, 0.8, 0.45, 0.26, 0.24, 0.12, 0.07, 0.04, 0.02, 0.01];
const BOTTOM = 254, LOW = 0.005, HIGH = 8;                                   // of the plot, and of its logarithmic axis
const y = (v) => 10 + (BOTTOM - 10) * Math.log(HIGH / Math.max(LOW, v)) / Math.log(HIGH / LOW);
const variance = (at) => HIGH * (LOW / HIGH) ** ((at - 10) / (BOTTOM - 10));

// The optimum for noise variance s² and a weight beta: nats of each dimension, and the squared error that remains.
export function optimum(beta, s) {
  const level = beta * s * s;
  const nats = EIGENVALUES.map((lambda) => Math.max(0, 0.5 * Math.log(lambda / level)));
  const error = EIGENVALUES.map((lambda) => Math.min(lambda, level)).reduce((a, b) => a + b, 0);
  return { level, nats, rate: nats.reduce((a, b) => a + b, 0), active: nats.filter((n) => n > 0).length, error };
}

// Bars, a line to drag and an axis, drawn anew for every level.
function draw(area, width, { level, nats }) {
  const step = (width - 70) / EIGENVALUES.length, x = (j) => 56 + step * j, bar = 0.76 * step, type = width < 500 ? 11 : 14;
  const bars = EIGENVALUES.flatMap((lambda, j) => [
    svg("rect", { x: x(j), y: y(Math.min(lambda, level)), width: bar, height: BOTTOM - y(Math.min(lambda, level)), fill: COLORS.reconstruction }),
    svg("rect", { x: x(j), y: y(lambda), width: bar, height: Math.max(0, y(level) - y(lambda)), fill: COLORS.kl }),
    svg("text", { x: x(j) + bar / 2, y: BOTTOM + 18, "text-anchor": "middle", "font-size": type, fill: nats[j] ? COLORS.kl : "#555" },
      nats[j].toFixed(2))]);
  const ticks = [0.01, 0.1, 1].map((v) => svg("text", { x: 46, y: y(v) + 5, "text-anchor": "end", "font-size": 14, fill: "#555" }, v));
  const water = svg("line", { x1: 52, x2: width - 14, y1: y(level), y2: y(level), stroke: "#111", "stroke-width": 2 });
  const words = [["above: nats are spent", COLORS.kl], ["below: stays as error", "#B4530A"]].map(([name, fill], i) =>
    svg("text", { x: width - 14, y: 24 + 21 * i, "text-anchor": "end", "font-size": 16, "font-weight": 600, fill }, name));
  const foot = svg("text", { x: 46, y: BOTTOM + 18, "text-anchor": "end", "font-size": 14, fill: "#555" }, "nats");
  area.replaceChildren(...bars, ...ticks, water, ...words, foot);
}

export function mount(root) {
  const state = { beta: 1, s: 0.5 };
  const width = widthOf(root);
  const area = svg("svg", { viewBox: `0 0 ${width} 280`, role: "img", "aria-label": "twelve eigenvalues and the level beta s squared",
    style: "width:100%;height:auto;background:#fff;border-radius:4px;touch-action:pan-y;cursor:ns-resize" });
  root.append(area);
  const text = line(root);
  const showBeta = slider(root, "β", 0.1, 20, (beta) => set({ beta }));
  const showS = slider(root, "s, width of the noise", 0.1, 1.5, (s) => set({ s }));
  const drag = (event) => {                                                  // the level follows the pointer; s stays
    const box = area.getBoundingClientRect();
    set({ beta: variance((280 * (event.clientY - box.top)) / box.height) / state.s ** 2 });
  };
  area.addEventListener("pointerdown", (event) => { area.setPointerCapture(event.pointerId); drag(event); });
  area.addEventListener("pointermove", (event) => area.hasPointerCapture(event.pointerId) && drag(event));
  function set(change) {
    Object.assign(state, change);
    state.beta = Math.max(0.1, Math.min(20, state.beta));
    const found = optimum(state.beta, state.s);
    draw(area, width, found);
    showBeta(state.beta);
    showS(state.s);
    text.textContent = `βs² = ${found.level.toFixed(3)}: ${found.active} of 12 dimensions are active and carry ` +
      `${found.rate.toFixed(2)} nats; a squared error of ${found.error.toFixed(2)} remains.`;
  }
  set({});
}

for (const root of document.querySelectorAll("[data-widget=water-level]")) mount(root);
