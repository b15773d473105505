// A picture of the reader's: its posterior, its reconstruction, and its KL in every dimension.
import { gaussianKL } from "../latents.js";
import { fromPicture, paint } from "../paint.js";

const $ = (id) => document.getElementById(id);
const total = (values) => values.reduce((a, b) => a + b, 0);

export function showOwn(page) {
  const { engine, facts, latent } = page;
  async function open(file) {
    $("own-facts").textContent = "encoding…";
    try {
      const x = fromPicture(await createImageBitmap(file), facts.size);
      const { mu, logvar } = await engine.encode(x);
      const x_hat = await engine.decode(mu), kl = gaussianKL(mu, logvar);
      paint($("own-x"), x, facts.size);
      paint($("own-x-hat"), x_hat, facts.size);
      $("own").hidden = false;
      const l1 = total(x.map((v, i) => Math.abs(v - x_hat[i]))) / x.length;
      $("own-facts").textContent = `Its KL from N(0, I) is ${total(kl).toFixed(0)} nats, against ${total(facts.kl).toFixed(0)} for ` +
        `a scene; the reconstruction is off by ${l1.toFixed(3)} a pixel value, of a range of 2. The large picture and all sliders ` +
        `now start from it.`;
      page.own = { mu, logvar, kl };
      latent.set(mu, null, "z is the posterior mean of your picture");
    } catch (error) {
      $("own-facts").textContent = `This picture could not be opened: ${error.message}`;
    }
  }
  return {
    ready() {
      $("file").onchange = () => $("file").files[0] && open($("file").files[0]);
      const over = (event, inside) => { event.preventDefault(); $("drop").classList.toggle("over", inside); };
      document.addEventListener("dragover", (event) => over(event, true));      // the whole page takes a picture
      document.addEventListener("dragleave", (event) => over(event, false));
      document.addEventListener("drop", (event) => {
        over(event, false);
        if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
      });
    },
  };
}
