// New pictures from two priors, fed with the same noise.
import { newestOnly } from "../engine.js";
import { element, paint } from "../paint.js";
import { fitted, normals, standard } from "../prior.js";

const COUNT = 6;
const $ = (id) => document.getElementById(id);
const PRIORS = [["from-standard", standard, "N(0, I)"], ["from-fitted", fitted, "the fitted Gaussian"]];

export function showSamples({ engine, facts, latent }) {
  const { D, size } = facts;
  let seed = 1;
  const columns = PRIORS.map(([id, prior, name]) => {
    const column = { prior, z: [], canvases: [] };
    for (let i = 0; i < COUNT; i++) {
      const canvas = element("canvas", { width: size, height: size });
      column.canvases.push(canvas);
      const choose = () => column.z[i] && latent.set(column.z[i], null, `z drawn from ${name}`);
      $(id).append(element("button", { onclick: choose, ariaLabel: `sample ${i + 1} from ${name}` }, canvas));
    }
    return column;
  });
  const draw = newestOnly(async () => {
    const temperature = +$("temperature").value;
    const noise = [...Array(COUNT).keys()].map((i) => normals(D, seed * COUNT + i));
    for (const column of columns) column.z = noise.map((eps) => column.prior(facts, eps, temperature));
    for (let i = 0; i < COUNT; i++) {                    // one by one, so that a slider's decode need not wait for all
      for (const { z, canvases } of columns) paint(canvases[i], await engine.decode(z[i]), size);
    }
  });
  const tell = () => { $("temperature-value").textContent = (+$("temperature").value).toFixed(2); };
  tell();
  return {
    ready() {
      $("draw").onclick = () => { seed++; draw(); };
      $("temperature").oninput = () => { tell(); draw(); };
      draw();
    },
  };
}
