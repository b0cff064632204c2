"""Optimal transport, Gaussian sketches of embeddings and flows in latent space, as losses."""

__all__: list[str] = []
