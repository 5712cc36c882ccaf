"""Area generalization: why models that can memorise still generalise, and when they do not."""

from mlreviews.generalization.parameter_counting import *
