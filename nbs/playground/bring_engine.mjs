// Runs after `npm ci`: lays the files of onnxruntime-web that the page loads into ort/, and nothing else of it.
// WebAssembly is stored packed, a quarter of its size: the page unpacks it, whatever the host does.
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";

const from = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const to = new URL("ort/", import.meta.url);
rmSync(to, { recursive: true, force: true });
mkdirSync(to);
const engines = [
  ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],        // processor
  ["ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.wasm"],   // graphics card
];
const sizes = {};                                                    // for the progress bar
for (const [library, binary] of engines) {
  copyFileSync(new URL(library, from), new URL(library, to));
  const packed = gzipSync(readFileSync(new URL(binary, from)), { level: 9 });
  writeFileSync(new URL(`${binary}.packed`, to), packed);            // .gz would tempt a host to unpack it on the way
  sizes[binary] = packed.length;
}
writeFileSync(new URL("sizes.json", to), JSON.stringify(sizes));
