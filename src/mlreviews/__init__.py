"""mlreviews: every technique of a long series of paper reviews, as a small tested PyTorch module.

Import a technique from its area (``from mlreviews.generalization import Dropout``), or ask the command line:
``mlreviews list``, ``mlreviews show double-descent``, ``mlreviews reproduce double-descent``.
Importing this package loads no area and no torch.
"""

__version__ = "0.1.0"
