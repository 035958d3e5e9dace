"""Sessions, edits, scans, jobs and servers."""

from typing import assert_type

from insitu import Graph, Job, LanguageModel, Limits, Results
from insitu.graph.saved import SavedTensor
from insitu.tracing.job_check import JobCheck
from insitu.tracing.session import Session

model = LanguageModel("insitu/eiffel")

with model.session() as session:
    with model.trace("The Colosseum is in the city of"):
        donor = model.transformer.h[-1].output[0]
    with model.trace("The Louvre is in the city of"):
        model.transformer.h[-1].output = donor
        logits = model.logits.save("logits")

assert_type(session, Session)
assert_type(logits, SavedTensor)

with model.edit() as edited:
    edited.blocks[0].mlp_out[:, -1] = 0

assert_type(edited, LanguageModel)
assert_type(edited.load_edits("edits"), LanguageModel)

with model.scan("The Louvre is in") as tracer:
    model.logits.save("logits")

job = Job.from_bytes(session.job.to_bytes())
assert_type(tracer.job, Job)
assert_type(tracer.graph, Graph)
assert_type(model.check(job), JobCheck)
results = model.run(job, limits=Limits())
assert_type(results, Results)
print(results["logits"].shape, len(results), results.output)

away = LanguageModel("insitu/eiffel", remote="http://127.0.0.1:8765")
with away.trace("The Louvre is in", wait=False) as sent:
    away.logits.save("logits")
print(sent.remote_job.result()["logits"])

# Slips are errors.
session.jb  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
model.run("job")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
model.session(remote=3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
