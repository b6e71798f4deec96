"""Settings of one training stage, under the names that users of Hugging Face trainers know. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from benthic.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of training. Defaults are the V3 paper's where it gives one."""

    max_steps: int
    """Optimiser updates in this stage."""
    per_device_train_batch_size: int
    """Rows of tokens in one update, over all processes."""
    max_length: int
    """Tokens in a row."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that one process splits its rows into."""
    learning_rate: float
    """Peak learning rate."""
    lr_scheduler_type: Literal["multi_step", "cosine", "linear", "constant"] = "multi_step"
    """Course after warmup: multi_step is x0.316 at 80% and x0.1 at 90% of the tokens (V1)."""
    warmup_steps: int = 0
    """Updates of linear warmup from zero."""
    adam_beta1: float = 0.9
    """AdamW first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW second-moment decay."""
    adam_epsilon: float = 1e-8
    """AdamW denominator floor."""
    weight_decay: float = 0.1
    """Applied to matrices, not to norms."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm here."""
    mtp_loss_weight: float = 0.3
    """Weight of the multi-token prediction loss, lambda."""
    balance_loss_weight: float = 1e-4
    """Weight of V3's sequence-wise balance loss, alpha."""
    batch_balance_loss_weight: float = 0.0
    """Weight of the same loss taken over all tokens of a micro-batch at once."""
    expert_balance_loss_weight: float = 0.0
    """Weight of V2's expert-level loss, alpha_1: per sequence, by the experts really chosen."""
    device_balance_loss_weight: float = 0.0
    """Weight of V2's device-level loss, alpha_2; the expert groups are the devices."""
    communication_balance_loss_weight: float = 0.0
    """Weight of V2's communication loss, alpha_3."""
    importance_loss_weight: float = 0.0
    """Weight of the squared deviation of the experts' summed gate values from their mean, over a micro-batch."""
    bias_update_speed: float = 1e-3
    """Step of the gate bias, gamma; 0 switches the auxiliary-loss-free balancing off."""
    bias_update_rule: Literal["sign", "proportional"] = "sign"
    """Whether an expert's bias moves by gamma, or by gamma times how far its load is from the mean."""
    bias_update_until: float = 1.0
    """Share of the stage's updates after which the bias rests (V3: 14.3 of 14.8 trillion tokens)."""
    expert_capacity_factor: float = 0.0
    """Token dropping: what the experts of one group may compute, in even shares (V2: 1.0); 0 drops nothing."""
    undropped_sequences: float = 0.1
    """Token dropping: share of sequences that never lose a token (V2)."""
    spike_factor: float = 20.0
    """Skip an update whose gradient norm exceeds this many times its running mean (and the clip)."""
    max_skipped_steps: int = 10
    """Stop after this many skipped updates in a row."""
    logging_steps: int = 10
    """Updates between rows of metrics."""
    eval_steps: int = 0
    """Updates between validations; 0 for none."""
    save_steps: int = 100
    """Updates between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints to keep; at least 2, so that a damaged one has a predecessor."""
    seed: int = 0
    """Seed of weights, data order and sampling in this stage."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("max_steps", "per_device_train_batch_size", "max_length", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} -> use 1 or more")
        for name in ("logging_steps", "save_steps", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} -> use 1 or more")
        for name in ("learning_rate", "max_grad_norm", "spike_factor"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} -> use a value above 0")
        for name in ("bias_update_until", "undropped_sequences"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} -> use a share from 0 to 1")
        if self.save_total_limit < 2:
            raise InputError(f"save_total_limit={self.save_total_limit} -> use 2 or more")
        if self.per_device_train_batch_size % self.gradient_accumulation_steps:
            raise InputError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} must divide "
                f"per_device_train_batch_size={self.per_device_train_batch_size}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update, padding included."""
        return self.per_device_train_batch_size * self.max_length
