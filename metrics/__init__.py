"""Metrics: pure functions and thin torchmetrics classes; torch and arrays in, numbers out."""
