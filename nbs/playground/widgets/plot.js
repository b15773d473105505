// A small plot in SVG: curves, a handle to drag, sliders, a row of bars. Colours are those of the figures.
export const COLORS = { prior: "#808080", posterior: "#4477AA", truePosterior: "#332288", elbo: "#CC3311", logP: "#111111", kl: "#4477AA",
  reconstruction: "#EE7733" };
const NS = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export const gaussian = (z, mean, std) => Math.exp(-0.5 * ((z - mean) / std) ** 2) / (std * Math.sqrt(2 * Math.PI));

// As wide as its place, so that 15 px of type are 15 px on a phone, too.
export const widthOf = (root) => Math.max(320, Math.min(640, root.clientWidth || 640));

// A frame for densities over z in [-limit, limit]; heights above `top` leave the frame.
export class Plot {
  constructor(root, { limit = 4, top = 1.2, label, width = widthOf(root), height = 260 }) {
    Object.assign(this, { limit, top, width, height, bottom: height - 26 });
    this.svg = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label,
      style: "width:100%;height:auto;background:#fff;border-radius:4px" });
    const axis = svg("line", { x1: 0, x2: width, y1: this.bottom, y2: this.bottom, stroke: "#888" });
    const ticks = [...Array(2 * limit + 1).keys()].map((i) => i - limit).filter((t) => Math.abs(t) < limit).map((t) =>
      svg("text", { x: this.x(t), y: height - 7, "text-anchor": "middle", "font-size": 15, fill: "#555" }, `${t}`.replace("-", "−")));
    this.svg.append(axis, ...ticks);
    root.append(this.svg);
  }

  x(z) { return ((z + this.limit) / (2 * this.limit)) * this.width; }
  y(p) { return this.bottom - (p / this.top) * (this.bottom - 10); }

  // A curve that can be redrawn: curve(colour, options) -> draw(f)
  curve(color, { fill = "none", width = 2.5, dash = "none" } = {}) {
    const path = svg("path", { stroke: color, "stroke-width": width, "stroke-dasharray": dash, fill, "fill-opacity": 0.2 });
    this.svg.append(path);
    return (f) => {
      const points = [...Array(321).keys()].map((i) => (i / 160 - 1) * this.limit);
      path.setAttribute("d", `M${points.map((z) => `${this.x(z).toFixed(1)},${Math.max(-50, this.y(f(z))).toFixed(1)}`).join("L")}`);
    };
  }

  // Names of curves in the upper left corner.
  legend(entries) {
    entries.forEach(([name, color], i) => this.svg.append(
      svg("text", { x: 12, y: 24 + 21 * i, "font-size": 16, fill: color, "font-weight": 600 }, name)));
  }

  // A point to drag: onMove is given its place (z, density).
  handle(color, onMove) {
    const dot = svg("circle", { r: 11, fill: color, stroke: "#fff", "stroke-width": 3 });
    const grip = svg("circle", { r: 24, fill: "transparent", style: "cursor:grab;touch-action:none" });   // room for a finger
    this.svg.append(dot, grip);
    grip.addEventListener("pointerdown", (event) => { grip.setPointerCapture(event.pointerId); event.preventDefault(); });
    grip.addEventListener("pointermove", (event) => {
      if (!grip.hasPointerCapture(event.pointerId)) return;
      const box = this.svg.getBoundingClientRect();
      const across = (event.clientX - box.left) / box.width, down = ((event.clientY - box.top) / box.height) * this.height;
      onMove((2 * across - 1) * this.limit, ((this.bottom - down) / (this.bottom - 10)) * this.top);
    });
    return (z, p) => {
      for (const circle of [dot, grip]) {
        circle.setAttribute("cx", this.x(z));
        circle.setAttribute("cy", Math.max(10, this.y(p)));
      }
    };
  }
}

// A labelled slider; what it is set to goes to onInput. Returns show(value).
export function slider(root, label, min, max, onInput) {
  const row = document.createElement("label"), name = document.createElement("span"), value = document.createElement("output");
  const input = Object.assign(document.createElement("input"), { type: "range", min, max, step: 0.01 });
  row.style.cssText = "display:grid;grid-template-columns:minmax(5.5rem,9rem) 1fr 3.5rem;gap:.6rem;align-items:center;font-size:.9rem";
  value.style.cssText = "text-align:right;font-variant-numeric:tabular-nums";
  name.textContent = label;
  input.addEventListener("input", () => onInput(+input.value));
  row.append(name, input, value);
  root.append(row);
  return (v) => { input.value = v; value.textContent = v.toFixed(2); };
}

export function line(root) {
  const p = document.createElement("p");
  p.style.cssText = "margin:.3rem 0;font-variant-numeric:tabular-nums";
  p.setAttribute("aria-live", "polite");
  root.append(p);
  return p;
}
