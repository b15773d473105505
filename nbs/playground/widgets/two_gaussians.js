// KL(q ‖ p) and KL(p ‖ q) of two Gaussians, p = N(0, 1), q = N(mean, std²), nats.
import { COLORS, Plot, gaussian, line, slider } from "./plot.js";

// KL(N(m, s²) ‖ N(n, t²))
export const kl = (m, s, n, t) => Math.log(t / s) + (s * s + (m - n) ** 2) / (2 * t * t) - 0.5;

export function mount(root) {
  const state = { mean: 1.2, std: 0.5 };
  const plot = new Plot(root, { label: "densities of p and q", top: 1.3 });
  plot.curve(COLORS.prior, { fill: COLORS.prior })((z) => gaussian(z, 0, 1));
  const drawQ = plot.curve(COLORS.posterior, { width: 3.5 });
  const drawIntegrand = plot.curve(COLORS.elbo, { width: 2, dash: "6 4" });
  plot.legend([["p = N(0, 1)", COLORS.prior], ["q, drag its top", COLORS.posterior], ["q log(q/p), where positive", COLORS.elbo]]);
  const moveHandle = plot.handle(COLORS.posterior, (z, p) => set({ mean: z, std: 1 / (Math.max(0.15, p) * Math.sqrt(2 * Math.PI)) }));
  const text = line(root);
  const showMean = slider(root, "mean of q", -3, 3, (mean) => set({ mean }));
  const showStd = slider(root, "width of q", 0.1, 2.5, (std) => set({ std }));
  function set(change) {
    Object.assign(state, change);
    state.mean = Math.max(-3, Math.min(3, state.mean));
    state.std = Math.max(0.1, Math.min(2.5, state.std));
    const { mean, std } = state, q = (z) => gaussian(z, mean, std);
    drawQ(q);
    drawIntegrand((z) => Math.max(0, q(z) && q(z) * Math.log(q(z) / gaussian(z, 0, 1))));
    moveHandle(mean, q(mean));
    showMean(mean);
    showStd(std);
    text.textContent = `KL(q ‖ p) = ½(${(mean ** 2).toFixed(2)} + ${(std ** 2).toFixed(2)} − 1 − log ${(std ** 2).toFixed(2)}) = ` +
      `${kl(mean, std, 0, 1).toFixed(3)} nats; the other way, KL(p ‖ q) = ${kl(0, 1, mean, std).toFixed(3)} nats.`;
  }
  set({});
  root.kl = () => kl(state.mean, state.std, 0, 1);
}

for (const root of document.querySelectorAll("[data-widget=two-gaussians]")) mount(root);
