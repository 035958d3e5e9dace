"""Lines of the README."""

from typing import assert_type

import torch

from insitu import Invocation, LanguageModel, Model, Tracer
from insitu.batching.summary import Planned
from insitu.graph.proxy import Proxy
from insitu.graph.saved import SavedTensor
from insitu.tracing.handle import Submodule

model = LanguageModel("insitu/eiffel", device_map="cpu")

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke("The Eiffel Tower is in the city of") as invoker:
        hidden_states = model.transformer.h[-1].output[0].save()

assert_type(generator, Tracer)
assert_type(invoker, Invocation)
assert_type(hidden_states, SavedTensor)
assert_type(hidden_states.value.shape, torch.Size)
assert_type(invoker.ids, torch.Tensor)
assert_type(model.transformer.h, Submodule)
assert_type(model.transformer.h[-3:], list[Submodule])

with model.trace("The Colosseum is in the city of") as tracer:
    late = model.transformer.h[4].output[0]
    early = model.transformer.h[1].output[0]
    growth = (late.norm(dim=-1) / early.norm(dim=-1)).save()
    assert_type(late, Proxy)

assert_type(growth, SavedTensor)
assert_type(tracer.plan, Planned)
print(tracer.plan.naive_flops / tracer.plan.flops, len(tracer.graph))

with model.trace() as tracer:
    with tracer.invoke("The Colosseum is in the city of"):
        rome = model.transformer.h[-1].output[0]
    with tracer.invoke("The Louvre is in the city of"):
        model.transformer.h[-1].output = rome
        model.transformer.h[0].mlp.c_fc.output[0, -1] = 0
        token = model.lm_head.output[0, -1].argmax().save()
        again = model.lm_head(model.transformer.ln_f(rome))[0, -1].argmax().save()

print(model.tokenizer.decode(token.value))

plain = Model(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()))
with plain.trace(torch.ones(2, 3)):
    assert_type(plain[0].output.save(), SavedTensor)
    assert_type(plain[1].ops.relu[0].output, Proxy)

assert_type(plain.to("cpu").eval(), Model)
assert_type(model.eval(), LanguageModel)

# Slips are errors.
tracer.invok("The Louvre")  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
invoker.stp(1)  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
model.trace("The Louvre", wait="yes")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
model.transformer = torch.nn.Linear(1, 1)  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
