"""Activations in a folder as they are read: rows, batches, data sets and exports."""
