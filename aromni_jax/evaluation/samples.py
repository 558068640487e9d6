"""Samples at fixed prompts while a model trains: pictures, sound and text for TensorBoard."""

from aromni_jax.model import Model
from aromni_jax.pictotalk import world
from aromni_jax.serving.requests import Request, generate_batch
from aromni_jax.training.writer import Writer

_CAPTIONS = 2


def write_samples(step: int, model: Model, writer: Writer) -> None:
  """Writes what the model draws and says for unseen captions, and how it reads that back.

  Args:
    step: step that the samples belong to.
    model: with the decoder of that step.
    writer: where they go.
  """
  captions = world.captions("base", "test")
  texts = [captions[i * len(captions) // _CAPTIONS].text for i in range(_CAPTIONS)]
  requests = [Request(task, text=t) for t in texts for task in ("text_to_image", "text_to_speech")]
  responses = generate_batch(model, requests)
  echoes = generate_batch(
    model,
    [
      Request("speech_to_text", speech=r.speech)
      if r.image is None
      else Request("image_caption", image=r.image)
      for r in responses
    ],
  )
  rate = model.speech_codec.config.sample_rate
  for request, response, echo in zip(requests, responses, echoes, strict=True):
    name = f"{request.task}/{request.text.replace(' ', '_')}"
    writer.write_sample(step, name, response, rate)
    writer.write_sample(step, f"{name}/read_back", echo, rate)
