"""Word and character error rates."""

import re
from collections.abc import Sequence

NORMALISER = "lower case, letters digits and apostrophes only, single spaces"


def normalise(text: str) -> str:
  """Returns the text as it is compared, see `NORMALISER`."""
  return " ".join(re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split())


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
  """Returns {"wer", "cer"} over all pairs, after `normalise`.

  Raises:
    ValueError: if there are no pairs or a reference is empty.
    ImportError: if jiwer (the `eval` extra) is not installed.
  """
  try:
    import jiwer
  except ImportError as e:
    raise ImportError("error rates need jiwer: pip install 'aromni_jax[eval]'") from e
  references = [normalise(r) for r in references]
  hypotheses = [normalise(h) for h in hypotheses]
  if not references or not all(references):
    raise ValueError("error rates need at least one pair, and no reference may be empty")
  return {"wer": jiwer.wer(references, hypotheses), "cer": jiwer.cer(references, hypotheses)}
