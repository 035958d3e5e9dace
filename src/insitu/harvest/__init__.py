"""Activations of whole data sets, on disk: `harvest` writes them, and `Activations` reads them."""
