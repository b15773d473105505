// The networks live here, off the page's thread, so that the page never stutters while one runs.
const ENGINES = {
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.wasm"],
};
const sessions = {};
let ort, provider;

// A graphics card needs WebGPU and promises inside WebAssembly; without either, one thread of the processor does the work.
async function pickProvider(wish) {
  if (wish === "wasm" || !("Suspending" in WebAssembly) || !self.navigator?.gpu) return "wasm";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return adapter && (wish === "webgpu" || !adapter.info?.isFallbackAdapter) ? "webgpu" : "wasm";
}

// A file's bytes; every chunk that arrives is reported.
async function load(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  const reader = answer.body.getReader(), chunks = [];
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    length += value.length;
    postMessage({ loaded: value.length });
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) { bytes.set(chunk, at); at += chunk.length; }
  return bytes;
}

async function unpacked(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function startEngine(wish) {
  provider = await pickProvider(wish);
  const [code, binary] = ENGINES[provider];
  const here = new URL("ort/", import.meta.url);
  const sizes = await (await fetch(new URL("sizes.json", here))).json();
  postMessage({ total: sizes[binary], trying: provider });
  const [library, wasm] = await Promise.all([import(new URL(code, here)), load(new URL(`${binary}.packed`, here))]);
  ort = library;
  ort.env.wasm.wasmBinary = await unpacked(wasm);
  ort.env.wasm.numThreads = 1;              // static hosts do not isolate pages, which threads would need
  ort.env.logLevel = "error";
}

async function openNetwork(name, shape) {   // shape of one input: (C,h,w)
  const bytes = await load(new URL(`model/${name}.onnx`, import.meta.url));
  const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider], logSeverityLevel: 3 });
  sessions[name] = { session, shape };
}

async function run(name, data, t) {         // data: Float32Array of B inputs; t: a time, for the prior
  const { session, shape } = sessions[name];
  const batch = data.length / shape.reduce((a, b) => a * b);
  const input = new ort.Tensor("float32", data, [batch, ...shape]);
  const feeds = { [session.inputNames[0]]: input };
  if (t !== undefined) feeds.t = new ort.Tensor("float32", new Float32Array(batch).fill(t), [batch]);
  const out = await session.run(feeds);
  return Object.fromEntries(await Promise.all(
    Object.entries(out).map(async ([key, tensor]) => [key, Float32Array.from(await tensor.getData())])));
}

const jobs = {
  start: async ({ wish, shape }) => {
    await startEngine(wish);
    await openNetwork("decoder", shape);
    const { x_hat } = await run("decoder", new Float32Array(shape.reduce((a, b) => a * b)));   // warm up
    if (!x_hat.every(Number.isFinite)) throw new Error("the decoder's numbers are not finite");
    return { provider };
  },
  open: ({ name, shape }) => openNetwork(name, shape),
  run: ({ name, data, t }) => run(name, data, t),
};

let queue = Promise.resolve();              // one job at a time, in order
self.onmessage = ({ data: { id, job, ...rest } }) => {
  queue = queue.then(async () => {
    try {
      const result = await jobs[job](rest);
      postMessage({ id, result });
    } catch (error) {
      postMessage({ id, error: String(error?.message ?? error) });
    }
  });
};
