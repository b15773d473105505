// Where new z come from. Each prior takes noise eps (B*D), and a temperature that scales it.

// Uniform numbers from a seed (mulberry32), so that both priors can be fed the same noise.
export function uniform(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// n standard normal numbers (Box and Muller 1958).
export function normals(n, seed) {
  const u = uniform(seed), out = new Float32Array(n);
  for (let i = 0; i < n; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - u())), angle = 2 * Math.PI * u();
    out[i] = radius * Math.cos(angle);
    if (i + 1 < n) out[i + 1] = radius * Math.sin(angle);
  }
  return out;
}

export const sampleNormal = (eps, temperature) => eps.map((e) => temperature * e);

// The learned prior: noise is carried along a velocity, by Heun's method, to where the latents of scenes lie.
export async function sampleFlow(engine, { D, prior }, eps, temperature, steps = 8) {
  let x = sampleNormal(eps, temperature);
  for (let i = 0; i < steps; i++) {
    const v = await engine.velocity(x, i / steps);
    const ahead = await engine.velocity(x.map((a, j) => a + v[j] / steps), (i + 1) / steps);
    x = x.map((a, j) => a + (v[j] + ahead[j]) / (2 * steps));
  }
  return x.map((a, j) => prior.mean[j % D] + prior.std[j % D] * a);
}
