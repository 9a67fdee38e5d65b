"""Training rules: one LightningModule per kind of model; networks are injected."""
