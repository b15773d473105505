// New pictures from two priors, fed with the same noise.
import { newestOnly } from "../engine.js";
import { element, paint } from "../paint.js";
import { normals, sampleFlow, sampleNormal } from "../prior.js";

const COUNT = 6;
const $ = (id) => document.getElementById(id);

export function showSamples({ engine, facts, latent }) {
  const { D, size } = facts;
  let seed = 1;
  const column = (id, name, draw) => {
    const column = { draw, z: null, canvases: [] };
    for (let i = 0; i < COUNT; i++) {
      const canvas = element("canvas", { width: size, height: size });
      column.canvases.push(canvas);
      const choose = () => column.z && latent.set(column.z.slice(i * D, (i + 1) * D), null, `z drawn from ${name}`);
      $(id).append(element("button", { onclick: choose, ariaLabel: `sample ${i + 1} from ${name}` }, canvas));
    }
    return column;
  };
  const columns = [column("from-standard", "N(0, I)", sampleNormal),
    column("from-learned", "the learned prior", (eps, temperature) => sampleFlow(engine, facts, eps, temperature))];
  const draw = newestOnly(async () => {
    const temperature = +$("temperature").value, eps = normals(COUNT * D, seed);
    for (const column of columns) {
      const z = await column.draw(eps, temperature);
      column.z = z;
      for (let i = 0; i < COUNT; i++) {                  // one by one, so that a slider's decode need not wait for all
        paint(column.canvases[i], await engine.decode(z.slice(i * D, (i + 1) * D)), size);
      }
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
