"""Area preference: losses and procedures that learn from comparisons, rewards and verdicts."""

from mlreviews.preference.logps import *
from mlreviews.preference.losses import *
