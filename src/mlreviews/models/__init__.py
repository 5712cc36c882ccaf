"""Models that many techniques run on.

::

    from mlreviews.models import SequenceModel, TinyLM, TinyLMConfig
    from mlreviews.ssm import MinGRU

    model = TinyLM(TinyLMConfig(d_model=128, layers=4))     # a transformer; its attention is one argument
    out = model(ids)                        # ids int64 [batch, time], out.logits [batch, time, 259]
    out = model(ids_t, out.cache)

    model = load_pretrained("python-target")                # trained on Python source, ships with the package
    result = generate(model, ids, max_new_tokens=100)       # greedy; see Sampler

    model = SequenceModel(259, 64, [MinGRU(64), MinGRU(64)], mlp_ratio=2)
    logits, state = model(ids)
    logits, state = model.step(ids_t, state)
"""

from mlreviews.models.attention import *
from mlreviews.models.causal_lm import *
from mlreviews.models.generation import *
from mlreviews.models.recurrent_attention import *
from mlreviews.models.sequence_model import *
from mlreviews.models.tiny_lm import *
