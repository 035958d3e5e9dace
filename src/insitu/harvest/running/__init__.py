"""Runs the model for a harvest, and keeps the values of its sites."""
