// Runs after `npm ci`: lays the files of onnxruntime-web that the page loads into ort/, and nothing else of it.
import { copyFileSync, mkdirSync, statSync, writeFileSync } from "node:fs";

const from = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const to = new URL("ort/", import.meta.url);
mkdirSync(to, { recursive: true });
const files = [
  "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm",        // processor
  "ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.wasm",   // graphics card
];
for (const name of files) copyFileSync(new URL(name, from), new URL(name, to));
const sizes = Object.fromEntries(files.map((name) => [name, statSync(new URL(name, to)).size]));
writeFileSync(new URL("sizes.json", to), JSON.stringify(sizes));   // for the progress bar
