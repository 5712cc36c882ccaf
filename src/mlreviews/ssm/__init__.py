"""Area ssm: state-space models and linear recurrences, what they compute and what they can't."""

from mlreviews.ssm.mamba import *
from mlreviews.ssm.mamba_2 import *
from mlreviews.ssm.mingru import *
from mlreviews.ssm.remamba import *
from mlreviews.ssm.ssamba import *
from mlreviews.ssm.ssm_state_tracking_limits import *
from mlreviews.ssm.state_collapse_mitigations import *
from mlreviews.ssm.ttt_layers import *
