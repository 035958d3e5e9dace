"""What passes cost in tests of the planner."""

from insitu.batching.cost_model import Costs

# One where calls are dear, and one where tokens are.
CALLS = Costs(
    blocks=4, token=1, pair=0, moved=0, scored=0, block=1e6, call=1e6, unembedding=1
)  # fmt: skip
TOKENS = Costs(
    blocks=4, token=1e6, pair=0, moved=0, scored=0, block=1, call=1, unembedding=1
)  # fmt: skip
