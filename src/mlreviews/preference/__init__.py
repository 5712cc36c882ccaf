"""Area preference: losses and procedures that learn from comparisons, rewards and verdicts."""

from mlreviews.preference.apo import *
from mlreviews.preference.bon_aware_sft import *
from mlreviews.preference.cdpo import *
from mlreviews.preference.cgpo import *
from mlreviews.preference.dpo import *
from mlreviews.preference.dpo_vs_ppo import *
from mlreviews.preference.efficient_rm_ensemble import *
from mlreviews.preference.gspo import *
from mlreviews.preference.kdpo import *
from mlreviews.preference.logps import *
from mlreviews.preference.losses import *
from mlreviews.preference.open_rs import *
from mlreviews.preference.ppo import *
from mlreviews.preference.reft import *
from mlreviews.preference.regularised_rm_ensembles import *
from mlreviews.preference.reward_robust_rlhf import *
from mlreviews.preference.rewards import *
from mlreviews.preference.rloo import *
from mlreviews.preference.rrm import *
from mlreviews.preference.rso import *
from mlreviews.preference.spurious_rewards import *
from mlreviews.preference.symdpo import *
from mlreviews.preference.tpo import *
from mlreviews.preference.trainer import *
from mlreviews.preference.unified_preference_gradient import *
from mlreviews.preference.warm import *
