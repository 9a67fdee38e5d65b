"""Data: finding patients, volumes to slices, the slice set on disk, the phantom, and the shared DataModule."""
