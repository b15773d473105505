// Between tensors (3,S,S) in [-1,1] and pixels.
export function toPixels(x, size, item = 0) {
  const P = size * size, pixels = new Uint8ClampedArray(4 * P), at = 3 * P * item;
  for (let i = 0; i < P; i++) {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = (x[at + c * P + i] + 1) * 127.5;   // rounded and clamped by the array
    pixels[4 * i + 3] = 255;
  }
  return new ImageData(pixels, size, size);
}

export function paint(canvas, x, size, item = 0) {
  canvas.width = canvas.height = size;
  canvas.getContext("2d").putImageData(toPixels(x, size, item), 0, 0);
}

// The middle square of a picture, at the size of the model; on white where it is transparent.
export function fromPicture(source, size) {
  const width = source.naturalWidth ?? source.width, height = source.naturalHeight ?? source.height;
  const side = Math.min(width, height);
  const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size, size);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, (width - side) / 2, (height - side) / 2, side, side, 0, 0, size, size);
  const { data } = context.getImageData(0, 0, size, size), P = size * size, x = new Float32Array(3 * P);
  for (let i = 0; i < P; i++) for (let c = 0; c < 3; c++) x[c * P + i] = data[4 * i + c] / 127.5 - 1;
  return x;
}

// <tag attributes>children</tag>
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
