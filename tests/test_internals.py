"""What differs between the versions of libraries that we run on."""

from types import SimpleNamespace

import pytest
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from anyo_lightning.internals import keep_share_only


@pytest.mark.parametrize("several", [True, False], ids=["a list of groups", "one group"])
def test_a_layer_is_given_back_except_in_its_backward_pass(several: bool) -> None:
    """Both forms of FSDP2's state: only one of them runs with the torch that is installed (test_distributed.py)."""
    given_back = []
    for training in (TrainingState.FORWARD, TrainingState.PRE_BACKWARD):
        group = SimpleNamespace(_training_state=training, reshard=lambda training=training: given_back.append(training))
        state = SimpleNamespace(**({"_fsdp_param_groups": [group]} if several else {"_fsdp_param_group": group}))
        keep_share_only(SimpleNamespace(_get_fsdp_state=lambda state=state: state))
    keep_share_only(SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_group=None)))
    assert given_back == [TrainingState.FORWARD]
