"""Area attention: what takes the place of softmax over all pairs, and what is built around it."""

from mlreviews.attention.abacus_embeddings import *
from mlreviews.attention.adaptive_temperature_softmax import *
from mlreviews.attention.cag import *
from mlreviews.attention.differential_attention import *
from mlreviews.attention.efficient_attention_families import *
from mlreviews.attention.fftnet import *
from mlreviews.attention.inf_fs import *
from mlreviews.attention.lisa import *
from mlreviews.attention.memlong import *
from mlreviews.attention.polynomial_attention import *
from mlreviews.attention.selective_attention import *
from mlreviews.attention.star_attention import *
from mlreviews.attention.tree_attention import *
