"""Data: picture sources, an endless counted stream of batches, and stores of pictures, latents and features on disk."""
