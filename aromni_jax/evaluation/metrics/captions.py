"""Accuracy of short texts."""

from collections.abc import Sequence

from aromni_jax.evaluation.metrics.wer import normalise


def caption_scores(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
  """Returns the share of texts that are "exact", and "word_accuracy".

  Texts are compared as `wer.normalise` leaves them. Word accuracy is the share of reference words
  that stand at the same place in the hypothesis.

  Raises:
    ValueError: if there are no pairs or a reference is empty.
  """
  pairs = [
    (normalise(a).split(), normalise(b).split())
    for a, b in zip(references, hypotheses, strict=True)
  ]
  if not pairs or not all(a for a, _ in pairs):
    raise ValueError("caption scores need at least one pair, and no reference may be empty")
  right = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
  return {
    "exact": sum(a == b for a, b in pairs) / len(pairs),
    "word_accuracy": right / sum(len(a) for a, _ in pairs),
  }
