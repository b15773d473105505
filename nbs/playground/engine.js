// The encoder, the decoder and the learned prior, as functions that return promises. All arrays are Float32Array, images in [-1,1].
const PATIENCE = 20_000;   // ms that a graphics card may take for its first picture, all files loaded

export class Engine {
  constructor(facts, onProgress = () => {}) {
    this.facts = facts;
    this.onProgress = onProgress;
    this.count = 0;
    this.newWorker();
  }

  newWorker() {
    this.worker?.terminate();
    this.loaded = 0;
    this.total = this.facts.bytes.decoder;
    this.waiting = new Map();
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) => {
      for (const { reject } of this.waiting.values()) reject(new Error(event.message || "the worker did not start"));
    };
  }

  receive({ id, result, error, loaded, total, trying }) {
    if (trying) this.trying = trying;                     // "wasm" or "webgpu"
    if (total) this.total += total;                       // bytes of the engine that was picked
    if (loaded) this.loaded += loaded;
    if (id === undefined) return this.onProgress(this.loaded, this.total);
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    error ? reject(new Error(error)) : resolve(result);
  }

  ask(job, rest = {}) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, job, ...rest });
    });
  }

  // Load the engine and the decoder, and run it once. wish: "wasm", "webgpu", or nothing: the best there is.
  async start(wish) {
    const { latent, size } = this.facts;
    const attempt = (engine) => this.ask("start", { wish: engine, shape: latent });
    const found = await Promise.race([attempt(wish), this.outOfPatience()]).catch((error) => {
      if (this.trying === "wasm") throw error;
      this.newWorker();                                   // a driver that promises WebGPU and fails, or never answers
      return attempt("wasm");
    });
    this.started = true;
    this.provider = found.provider;
    this.prior = this.open("prior", latent);                               // while the reader looks
    this.encoder = this.open("encoder", [3, size, size]);
    for (const later of [this.prior, this.encoder]) later.catch(() => {});
  }

  outOfPatience() {
    return new Promise((_, reject) => {
      let since = null;
      const watch = setInterval(() => {
        if (this.started || this.trying === "wasm") return clearInterval(watch);
        if (!this.trying || this.loaded < this.total) return;
        since ??= performance.now();
        if (performance.now() - since < PATIENCE) return;
        clearInterval(watch);
        reject(new Error("the graphics card did not answer"));
      }, 500);
    });
  }

  // A network of the model's folder; shape of one input
  open(name, shape) { return this.ask("open", { name, shape }); }

  // z (B*D) -> x_hat (B*3*S*S)
  async decode(z, name = "decoder") {
    return (await this.ask("run", { name, data: Float32Array.from(z) })).x_hat;
  }

  // x (B*D) at time t -> dx/dt (B*D), where the learned prior carries noise
  async velocity(x, t) {
    await this.prior;
    return (await this.ask("run", { name: "prior", data: x, t })).velocity;
  }

  // x (3*S*S) -> mu (D), logvar (D)
  async encode(x) {
    await this.encoder;
    return this.ask("run", { name: "encoder", data: x });
  }
}

// A function that keeps only the newest of the calls that came while it was busy: sliders never lag behind.
export function newestOnly(work) {
  let busy = false, next = null;
  return async function call(value) {
    next = { value };
    if (busy) return;
    busy = true;
    try {
      while (next) {
        const { value } = next;
        next = null;
        await work(value);
      }
    } finally { busy = false; }
  };
}
