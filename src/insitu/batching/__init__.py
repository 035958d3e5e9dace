"""Many prompts, few passes: a pure planner, and how an invocation lies in its pass."""
