"""Networks of the generators, in plain PyTorch: nothing here knows Lightning, data sets or training rules."""
