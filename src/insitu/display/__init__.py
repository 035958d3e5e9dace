"""What things look like: module trees as text, from plain data."""
