// Where new z come from. Each prior takes a temperature that scales its noise; another prior is another function here.

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

export const standard = (latents, eps, temperature) => eps.map((e) => temperature * e);

// A Gaussian with the mean and the full covariance of the aggregate posterior.
export function fitted({ D, mean, factor }, eps, temperature) {
  return mean.map((m, d) => {
    let sum = 0;
    for (let k = 0; k < D; k++) sum += factor[d * D + k] * eps[k];
    return m + temperature * sum;
  });
}
