"""What clients see: HTTP, and what keeps slow or hostile ones from the rest."""
