"""Latent diffusion from scratch; no network here knows what images show or what the condition means."""
