// A straight line between two latents, and a scrubber along it.
import { newestOnly } from "../engine.js";
import { paint } from "../paint.js";

const $ = (id) => document.getElementById(id);

export function showPath({ engine, facts, latent }) {
  const ends = { a: facts.exampleZ[0], b: facts.exampleZ[1] };
  const between = (t) => ends.a.map((a, d) => a + t * (ends.b[d] - a));
  const show = newestOnly(async (t) => paint($("picture-t"), await engine.decode(between(t)), facts.size));
  const move = (t) => {
    $("path").value = t;
    $("path-value").textContent = (+t).toFixed(2);
    return show(+t);
  };
  const setEnd = async (end, z) => {
    ends[end] = z;
    paint($(`picture-${end}`), await engine.decode(z), facts.size);
    return move(+$("path").value);
  };
  let playing = 0;
  const stop = () => { cancelAnimationFrame(playing); playing = 0; $("play").textContent = "play"; };
  const play = () => {
    if (playing) return stop();
    $("play").textContent = "stop";
    const start = performance.now(), from = +$("path").value;
    const frame = (now) => {
      const phase = from + (now - start) / 3000;          // three seconds one way, then back
      move(1 - Math.abs(1 - (phase % 2)));
      playing = requestAnimationFrame(frame);
    };
    playing = requestAnimationFrame(frame);
  };
  return {
    async ready() {
      $("set-a").onclick = () => setEnd("a", latent.z);
      $("set-b").onclick = () => setEnd("b", latent.z);
      $("path").oninput = (event) => { stop(); move(+event.target.value); };
      $("play").onclick = play;
      $("take").onclick = () => latent.set(between(+$("path").value), null, `z between A and B, at ${(+$("path").value).toFixed(2)}`);
      await setEnd("a", ends.a);
      await setEnd("b", ends.b);
    },
  };
}
