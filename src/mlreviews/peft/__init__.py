"""Area peft: a trained model follows a new task through few trained numbers.

::

    from mlreviews.peft import LoRALinear, inject, merge, save_adapter, trainable_parameters

    inject(model, r"layers\\.\\d+\\.self_attn\\.[qv]_proj", lambda path, base: LoRALinear(base, rank=8))
    optimiser = torch.optim.AdamW(trainable_parameters(model).values())
    ...
    save_adapter(model, "folder")           # in peft's format
    merge(model)                            # no cost at inference; unmerge(model) gives the weights back bit for bit
"""

from mlreviews.common.adapter import *
from mlreviews.peft.eva import *
from mlreviews.peft.flexora import *
from mlreviews.peft.fourierft import *
from mlreviews.peft.intrinsic_dimension import *
from mlreviews.peft.intruder_dimensions import *
from mlreviews.peft.lora import *
from mlreviews.peft.neftune import *
from mlreviews.peft.slim import *
from mlreviews.peft.svf import *
