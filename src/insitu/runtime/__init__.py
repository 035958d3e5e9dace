"""How it is done: planning, passes, hooks and execution."""
