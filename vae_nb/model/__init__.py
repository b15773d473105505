"Distributions, layers, and the VAE made of them."
