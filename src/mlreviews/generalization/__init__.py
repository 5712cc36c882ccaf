"""Area generalization: why models that can memorise still generalise, and when they do not."""

from mlreviews.generalization.bias_variance_u_curve import *
from mlreviews.generalization.double_descent import *
from mlreviews.generalization.dropout import *
from mlreviews.generalization.fixed_vs_random_design import *
from mlreviews.generalization.mean_as_minimal_model import *
from mlreviews.generalization.min_norm_interpolation import *
from mlreviews.generalization.parameter_counting import *
from mlreviews.generalization.solution_multiplicity import *
