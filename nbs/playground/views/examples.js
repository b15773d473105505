// Pictures to start from. Their decodes come with the page, so there is something to see before the decoder is loaded.
import { element } from "../paint.js";

export async function showExamples({ size, exampleZ }, latent) {
  const sheet = new Image();
  sheet.src = new URL("../model/examples.webp", import.meta.url);
  await sheet.decode();
  const draw = (canvas, i) => canvas.getContext("2d").drawImage(sheet, i * size, 0, size, size, 0, 0, size, size);
  draw(document.getElementById("picture"), 0);
  exampleZ.forEach((z, i) => {
    const canvas = element("canvas", { width: size, height: size });
    draw(canvas, i);
    const choose = () => latent.set(z, null, `z is the posterior mean of example ${i + 1}`);
    document.getElementById("examples").append(
      element("button", { onclick: choose, ariaLabel: `example ${i + 1}` }, canvas));
  });
  document.getElementById("caption").textContent = "z is the posterior mean of example 1";
}
