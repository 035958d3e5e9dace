"""The processes: those with weights, those that look at jobs, and what runs next."""
