"""The words of a block: how it is printed, and the messages of its errors."""

from __future__ import annotations


def state_of_block(
    nodes: int, passes: int, is_open: bool, done: bool, promises_output: bool
) -> str:
    """Returns a block as it is printed.

    Args:
        nodes: how many it has recorded.
        passes: how many ran, 0 if none did.
        is_open: whether its `with` block is being executed.
        done: whether that has ended.
        promises_output: whether it is a generation.
    """
    if passes:
        return f"<Block that ran: {nodes} nodes, {passes} passes>"
    if is_open or done:
        return f"<Block that {'is open' if is_open else 'did not run'}: {nodes} nodes>"
    name, block = ("generate", "generator") if promises_output else ("trace", "tracer")
    return (
        f"<Block that was not entered, so nothing has run: write "
        f"`with model.{name}(prompt) as {block}:`, and lines in it>"
    )


def no_output(is_open: bool, done: bool, stopped: bool) -> str:
    """Returns the message for the output of a generation that has none.

    Args:
        is_open: whether its `with` block is being executed.
        done: whether that has ended.
        stopped: whether `stop` ended the run.
    """
    reason = "its run failed" if done else "the model runs when the block ends"
    if not (done or is_open):
        reason = "its block was never entered: write `with model.generate(...) as generator:`"
    if stopped:
        reason = "`stop` ended the run"
    return f"`generator.output` has no value: {reason}."


def no_invoke(given: bool) -> str:
    """Returns the message for an `invoke` that a block does not take.

    Args:
        given: whether the block was given its prompt itself; otherwise it is not open.
    """
    if given:
        return (
            "This block was given its prompt already: give it none, and each prompt to an `invoke`."
        )
    return "`invoke` belongs inside its block: write `with model.trace() as tracer:` first."


def not_one_invocation(entered: bool) -> str:
    """Returns the message for what is of a block's one invocation, where there is not one.

    Args:
        entered: whether the block was entered.
    """
    if not entered:
        return "The block was never entered: write `with model.trace(prompt) as tracer:`."
    return (
        "This block has its prompts in invocations: ask the `invoker` of "
        "`with generator.invoke(prompt) as invoker:`."
    )
