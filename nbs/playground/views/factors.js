// A control for every known factor. Its value is read from z by one linear map; moving it adds to z what the regression
// of the posterior means on the factors says the change amounts to.
import { element } from "../paint.js";
import { slider } from "./slider.js";

const NAMES = { floor_hue: "floor hue", wall_hue: "wall hue", object_hue: "object hue" };
const RAMPS = { floor_hue: [80, 7], wall_hue: [89, 6], object_hue: [69, 16] };   // lightness %, 100 × chroma of the scenes

function hueRamp(name) {
  const [lightness, chroma] = RAMPS[name];
  const stops = [...Array(25).keys()].map((i) => `oklch(${lightness}% ${chroma / 100} ${15 * i})`);
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

function shapeButtons(shapes, onChoose) {
  const buttons = shapes.map((shape, i) => element("button", { onclick: () => onChoose(i) }, shape));
  const row = element("div", { className: "shapes wide", role: "group", ariaLabel: "shape" }, ...buttons);
  const show = (value) => buttons.forEach((b, i) => b.setAttribute("aria-pressed", i === value));
  return { node: element("div", { className: "slider" }, element("span", {}, "shape"), row), show };
}

export function showFactors({ facts, latent }) {
  const values = {};
  for (const f of facts.factors) {
    const label = NAMES[f.name] ?? f.name;
    const change = (value) => {
      const z = facts.move(latent.z, values, { ...values, [f.name]: value });
      values[f.name] = value;
      control.show(value);
      latent.set(z, f.name, `z moved along ${label}`);
    };
    const degrees = f.unit === "degrees";
    const control = f.kind === "shape" ? shapeButtons(facts.shapes, change) : slider({
      label, min: f.low, max: f.high, step: degrees ? 1 : 0.005, kind: f.kind === "hue" ? "hue" : "",
      format: degrees ? (v) => `${v.toFixed(0)}°`.replace("-", "−") : (v) => v.toFixed(2), onInput: change });
    if (f.kind === "hue") control.input.style.background = hueRamp(f.name);
    if (control.input) control.input.id = `factor-${f.name}`;
    document.getElementById("factors").append(control.node);
    latent.onChange((z, from) => {
      if (facts.factors.some((other) => other.name === from)) return;   // the sliders hold what they were set to
      control.show(values[f.name] = facts.readFactor(z, f));
    });
  }
  document.getElementById("factors-note").textContent = "Where the sliders stand is read from z by a linear map. R² on held-out " +
    `scenes: ${facts.factors.map((f) => `${NAMES[f.name] ?? f.name} ${f.r2.toFixed(2)}`).join(", ")}.`;
}
