"""Python imports this at each start, unless another of this name is found first."""

import tally_recorder

tally_recorder.record("sitecustomize")
