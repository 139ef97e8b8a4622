"""Models of toy size, and bases that know what an answer looks like: `toy_base` in conftest.py trains each once."""

from experiments import pretrain
from minir1.model.config import ModelConfig, dense

MOE = ModelConfig(dim=32, layers=2, heads=2, kv_lora=16, nope=8, rope=8, v_dim=16, ffn=64, experts=4, expert_ffn=16)
DENSE = dense(dim=32, layers=2, heads=2, kv_heads=1, ffn=64)
# Half of the documents answer at once, the others try once: their format differs, so there is something to learn.
MIX = {"facts": 0, "untagged": 0, "at_once": 0.5, "at_once_right": 1, "orderly": 0, "forgetful": 0, "patient": 0}
MIX |= {"give_up": 1}
BASE = pretrain.Config(
    model=MOE, mix=MIX, steps=120, batch=1024, muon_lr=0.02, adam_lr=0.02, warmup=5, checkpoint_every=60
)
