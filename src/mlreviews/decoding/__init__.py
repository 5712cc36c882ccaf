"""Area decoding: from a language model's logits to text, exactly and faster than one token a step, or better."""

from mlreviews.decoding.adaptivedecoder import *
from mlreviews.decoding.cllm import *
from mlreviews.decoding.dola import *
from mlreviews.decoding.drafters import *
from mlreviews.decoding.eagle import *
from mlreviews.decoding.eagle_2 import *
from mlreviews.decoding.gated_lora_mtp import *
from mlreviews.decoding.genarm import *
from mlreviews.decoding.jacobi_decoding import *
from mlreviews.decoding.lookahead_decoding import *
from mlreviews.decoding.medusa import *
from mlreviews.decoding.numeric_decoding_regression import *
from mlreviews.decoding.speculative_decoding import *
from mlreviews.decoding.svip import *
