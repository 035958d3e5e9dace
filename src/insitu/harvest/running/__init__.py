"""What is run of the model for a harvest, and what is kept of it."""
