// Sliders along single dimensions of z, or along the principal components of the aggregate posterior.
import { slider } from "./slider.js";

const COUNT = 8;
const $ = (id) => document.getElementById(id);

// Where dimension d sits: (C,h,w) of a grid, or its number in a vector.
export function place({ latent }, d) {
  if (latent.length === 1) return `z[${d}]`;
  const [, h, w] = latent;
  return `z[${Math.floor(d / (h * w))}, ${Math.floor(d / w) % h}, ${d % w}]`;
}

export function dimensionSlider({ facts, latent }, d, from) {
  const s = slider({ label: place(facts, d), min: -4, max: 4, step: 0.02, value: latent.z[d],
    onInput: (v) => latent.set(latent.z.map((old, i) => (i === d ? v : old)), from, `${place(facts, d)} moved by hand`) });
  s.follow = (z) => s.show(z[d]);
  return s;
}

function componentSlider({ facts, latent }, k, from) {
  const s = slider({ label: `component ${k + 1}`, min: -3, max: 3, step: 0.02, value: facts.coordinate(latent.z, k),
    onInput: (v) => latent.set(facts.along(latent.z, k, v - facts.coordinate(latent.z, k)), from, `z moved along component ${k + 1}`) });
  s.follow = (z) => s.show(facts.coordinate(z, k));
  return s;
}

export function showDirections(page) {
  const { facts, latent } = page;
  let sliders = [];
  const choose = (components) => {
    $("by-dimension").setAttribute("aria-pressed", !components);
    $("by-component").setAttribute("aria-pressed", components);
    const share = facts.share.slice(0, COUNT).reduce((a, b) => a + b);
    $("directions-note").textContent = components
      ? `The ${COUNT} directions in which the aggregate posterior varies most: ${(100 * share).toFixed(0)} % of its variance. ` +
        `In standard deviations; all of the picture may change.`
      : `The ${COUNT} numbers of z that carry the most nats. Each is named by channel, row and column of ` +
        `a ${facts.latent.join("×")} grid, and mostly paints at its place.`;
    sliders = [...Array(COUNT).keys()].map((i) =>
      components ? componentSlider(page, i, "directions") : dimensionSlider(page, facts.byKL[i], "directions"));
    $("directions").replaceChildren(...sliders.map((s) => s.node));
  };
  $("by-dimension").onclick = () => choose(false);
  $("by-component").onclick = () => choose(true);
  choose(false);
  latent.onChange((z, from) => { if (from !== "directions") for (const s of sliders) s.follow(z); });
}
