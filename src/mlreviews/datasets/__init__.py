"""Data without a network: scikit-learn's bundled sets, text from Python's own standard library, and drawn tasks.

::

    from mlreviews.datasets import digits, python_source, standardised

    generator = torch.Generator().manual_seed(0)
    train, test = digits().split([1000, 797], generator, stratified=True)
    (train, test), transform = standardised(train, test)

    windows = python_source().train.batches(length=128, batch_size=16, generator=generator)
    next(windows)           # int64 [16, 129], ids of ByteTokenizer
"""

from mlreviews.datasets.addition import *
from mlreviews.datasets.bundled import *
from mlreviews.datasets.selective_copying import *
from mlreviews.datasets.standard_library import *
from mlreviews.datasets.tables import *
from mlreviews.datasets.text import *
from mlreviews.datasets.tokenizer import *
from mlreviews.datasets.word_problems import *
