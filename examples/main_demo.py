"""The main demo on the bundled model: generate one token and look at a hidden state."""

from insitu import LanguageModel

model = LanguageModel("insitu/eiffel", device_map="cpu")

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke("The Eiffel Tower is in the city of") as invoker:
        hidden_states = model.transformer.h[-1].output[0].save()

output = generator.output

print([model.tokenizer.decode(t) for t in output])
