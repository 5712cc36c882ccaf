"""Models that many techniques run on.

::

    from mlreviews.models import SequenceModel
    from mlreviews.ssm import MinGRU

    model = SequenceModel(259, 64, [MinGRU(64), MinGRU(64)], mlp_ratio=2)
    logits, state = model(ids)              # ids int64 [batch, time], logits [batch, time, 259]
    logits, state = model.step(ids_t, state)
"""

from mlreviews.models.sequence_model import *
