"""Latents as other codes stored them: one class per layout, see :mod:`datamodules.layouts.latent_files`."""
