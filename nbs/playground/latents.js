// What is known of the latent space: statistics of the aggregate posterior, and a linear map from factors to z and back.
const RADIANS = Math.PI / 180;

// Numbers stored as float16 in base64.
export function unpack({ half, shape }) {
  const bytes = Uint8Array.from(atob(half), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer), out = new Float32Array(bytes.length / 2);
  for (let i = 0; i < out.length; i++) {
    const h = view.getUint16(2 * i, true), exponent = (h >> 10) & 31, fraction = h & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
    out[i] = h >> 15 ? -size : size;
  }
  out.shape = shape;
  return out;
}

export async function loadLatents(url = new URL("model/latents.json", import.meta.url)) {
  const facts = await (await fetch(url)).json();
  return new Latents(facts);
}

export class Latents {
  constructor(facts) {
    Object.assign(this, facts);
    this.mean = unpack(facts.mean);                 // (D) of the aggregate posterior
    this.std = unpack(facts.std);                   // (D)
    this.factor = unpack(facts.factor);             // (D,D): factor @ factor.T is its covariance, largest variance first
    this.prior = { ...facts.prior, mean: unpack(facts.prior.mean), std: unpack(facts.prior.std) };
    const z = unpack(facts.examples.z);
    this.exampleZ = facts.examples.factors.map((_, i) => z.slice(i * this.D, (i + 1) * this.D));
    this.factors = facts.factors.map((f) => ({ ...f, directions: unpack(f.directions), read: unpack(f.read) }));
    this.byKL = [...this.kl.keys()].sort((a, b) => this.kl[b] - this.kl[a]);
  }

  // What a factor of value v adds up from; the same functions as in make_model.py.
  features(f, v) {
    if (f.kind === "hue") {
      const a = v * RADIANS;
      return [Math.cos(a), Math.sin(a), Math.cos(2 * a), Math.sin(2 * a)];
    }
    const t = (2 * (v - f.low)) / (f.high - f.low) - 1;
    return [t, t * t, t ** 3];
  }

  // The part of the regression that a set of factor values { name: value } decides; every shape has its own coefficients.
  predict(values) {
    const { D } = this, out = new Float64Array(D), shape = values.shape;
    for (const f of this.factors) {
      const weights = f.kind === "shape" ? [1] : this.features(f, values[f.name]).map((v, k) => v - f.feature_means[k]);
      weights.forEach((weight, k) => {
        const row = (shape * weights.length + k) * D;
        for (let d = 0; d < D; d++) out[d] += weight * f.directions[row + d];
      });
    }
    return out;
  }

  // z after the factors went from some values to others.
  move(z, from, to) {
    const a = this.predict(from), b = this.predict(to);
    return z.map((v, d) => v + b[d] - a[d]);
  }

  // The value of factor f that a linear map reads from z.
  readFactor(z, f) {
    const scores = f.read_offset.map((offset, k) => {
      let sum = offset;
      for (let d = 0; d < this.D; d++) sum += f.read[k * this.D + d] * (z[d] - this.mean[d]);
      return sum;
    });
    if (f.kind === "hue") return (Math.atan2(scores[1], scores[0]) / RADIANS + 360) % 360;
    if (f.kind === "shape") return scores.indexOf(Math.max(...scores));
    const t = Math.max(-1, Math.min(1, scores[0]));
    return f.low + ((t + 1) / 2) * (f.high - f.low);
  }

  // Length of z - mean along column k of the factor, in standard deviations.
  coordinate(z, k) {
    let dot = 0, square = 0;
    for (let d = 0; d < this.D; d++) {
      const a = this.factor[d * this.D + k];
      dot += a * (z[d] - this.mean[d]);
      square += a * a;
    }
    return dot / square;
  }

  along(z, k, step) { return z.map((v, d) => v + step * this.factor[d * this.D + k]); }
}

// KL of N(mu, exp(logvar)) from N(0, 1) in every dimension, nats.
export const gaussianKL = (mu, logvar) => mu.map((m, d) => 0.5 * (m * m + Math.expm1(logvar[d]) - logvar[d]));
