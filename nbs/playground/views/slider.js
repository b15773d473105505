// A labelled slider: { label, min, max, step, value, format, onInput } -> { node, input, show(value) }
import { element } from "../paint.js";

export function slider({ label, min, max, step, value = 0, format = (v) => v.toFixed(2).replace("-", "−"), onInput, kind = "" }) {
  const output = element("output");
  const input = element("input", { type: "range", min, max, step, className: kind });
  const tell = (v) => {
    output.textContent = format(v);
    input.setAttribute("aria-valuetext", format(v));
  };
  const show = (v) => { input.value = v; tell(v); };
  input.addEventListener("input", () => { tell(+input.value); onInput(+input.value); });
  show(value);
  return { node: element("label", { className: "slider" }, element("span", {}, label), input, output), input, show };
}
